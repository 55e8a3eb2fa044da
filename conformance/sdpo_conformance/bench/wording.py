"""The words and figures that terminal, Markdown and plots share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sdpo_conformance.bench.bench_results import BenchRow, Group
from sdpo_conformance.bench.rows import NOT_OFFERED, NOT_RUN, UNAVAILABLE

BEFORE_QUEUED, QUEUED, AFTER_QUEUED = ("", "ms", "± %", "× h·Wᵀ"), "queued", ("× first", "peak MiB", "error")
LIMIT = "h @ W.T, the limit"


def title(group: Group) -> str:
    """What a group's rows compute, with the head's two sizes."""
    head = group.work.head
    return f"{group.work.group} · {head.model} head {head.hidden} × {head.vocabulary}"


def headers(group: Group) -> tuple[str, ...]:
    """The columns of a group's table."""
    return (*BEFORE_QUEUED, *((QUEUED,) if group.queued else ()), *AFTER_QUEUED)


def figures(group: Group, row: BenchRow) -> tuple[str, ...]:
    """The cells under ``headers``."""
    name = f"{row.label} †" if row.other else row.label
    if row.ms is None:
        return (name, *("–",) * (len(headers(group)) - 1))
    return (
        name,
        number(row.ms),
        f"{50 * (row.q3_ms - row.q1_ms) / row.ms:.1f}",
        number(row.ratio),
        *(("–" if row.queued is None else number(row.queued),) if group.queued else ()),
        number(group.to_first(row)),
        "not measured" if row.peak_mib is None else f"{row.peak_mib:.0f}",
        "–" if row.error is None else f"{row.error:.1e}",
    )


def limit_figures(group: Group) -> tuple[str, ...]:
    return (LIMIT, number(group.limit_ms), "", "1", *(("1",) if group.queued else ()), "", "", "")


def number(value: float) -> str:
    """Three digits that mean something."""
    if not math.isfinite(value):
        return "–"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 20 else f"{value:.2f}" if value >= 0.1 else f"{value:.3g}"


def verdict_of(row: BenchRow) -> str:
    """What is wrong with a row, or why it has no numbers; empty for a good one."""
    if not row.measured:
        return f"{row.status}: {row.reason}"
    parts = []
    if row.wrong:
        parts.append(f"WRONG ANSWER: {row.wrong}")
    if row.nonconforming:
        parts.append(f"NOT CONFORMING: {row.nonconforming}")
    return "; ".join(parts)


def step_of(row: BenchRow) -> str:
    """A whole step in one line: tokens a second, how far from the floor, where the time goes; empty elsewhere."""
    if row.step is None or row.ms is None:
        return ""
    floor = row.step["floor_ms"]
    parts = [
        f"{row.step['tokens_per_second']:.0f} response tokens/s",
        f"floor {number(floor)} ms, × {number(row.ms / floor)}",
    ]
    if phases := row.step["phases_ms"]:
        parts.append("ms by phase: " + ", ".join(f"{name} {number(ms)}" for name, ms in phases.items()))
    return " · ".join(parts)


def notes(rows: Sequence[BenchRow]) -> list[str]:
    """One line per implementation on what is worth knowing beside the figures; † marks another objective."""
    found: dict[str, list[str]] = {}
    for row in filter(lambda row: row.measured, rows):
        said = [f"† another objective: {row.other}"] if row.other else []
        found.setdefault(row.label, []).extend([*said, *row.remarks])
    return [f"{name}: {'; '.join(dict.fromkeys(parts))}" for name, parts in found.items() if parts]


def shown(group: Group) -> list[BenchRow]:
    """The rows that belong into a table: what is only absent is said once, below."""
    return [row for row in group.rows if row.status not in (NOT_OFFERED, UNAVAILABLE, NOT_RUN)]


def absences(rows: Sequence[BenchRow]) -> list[str]:
    """One line per implementation for what could not be timed at all, and why."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        if row.status in (NOT_OFFERED, UNAVAILABLE, NOT_RUN):
            reasons = found.setdefault(row.label, {})
            reason = row.reason if row.status == NOT_OFFERED else f"{row.status}: {row.reason}"
            reasons[reason] = reasons.get(reason, 0) + 1
    lines = []
    for name, reasons in found.items():
        words = [reason if count == 1 else f"{reason} ({count} rows)" for reason, count in reasons.items()]
        lines.append(f"{name}: {'; '.join(words)}")
    return lines


def machine(document: Mapping[str, Any]) -> str:
    """Device, libraries and date of a run."""
    info = document["machine_info"]
    parts = [info.get("device", "?"), f"torch {info.get('torch', '?')}"]
    parts += [f"{name} {version}" for name, version in info.get("packages", {}).items()]
    if info.get("device_type") == "cpu":
        parts.append(f"{info.get('threads', '?')} threads")
    return " · ".join([*parts, document["datetime"][:10]])


READING = (
    "ms: median of synchronised rounds; ± %: half the interquartile range; × h·Wᵀ: ratio to the bare product timed "
    "in the same rounds; queued: that ratio of the device's time where the host is ahead, as in a training step; "
    "peak MiB: beyond the inputs; error: relative, of the gradient (median token) or the loss, in nats for log-probs, "
    "against the float64 oracle"
)
