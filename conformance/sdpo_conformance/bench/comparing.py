"""Against a baseline: what became slower, hungrier or wrong beyond the measured noise.

Times are compared as ratios to the bare product of the same rounds, which takes most of the clock's drift out.
Noise is what both runs measured, the two half interquartile ranges added, and at least ``BETWEEN_RUNS``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_conformance.bench.bench_results import BenchRow, rows_of
from sdpo_conformance.bench.rows import FAILED
from sdpo_conformance.running.options import RunError

BETWEEN_RUNS = 0.05
"""Single times were seen to move by 3 to 5 % between runs on one H200 (docs/fused.md); ratios by less."""

MEMORY_SHARE, MEMORY_MIB = 0.01, 1.0
"""Peak memory repeats to the byte on one machine; allocator rounding is allowed."""


@dataclass(frozen=True)
class Change:
    """One row that moved; ``worse`` is a regression."""

    row: BenchRow
    worse: bool
    words: str

    def __str__(self) -> str:
        kind = "REGRESSION" if self.worse else "improved"
        return f"{kind}  {self.row.label} · {self.row.work.group}: {self.words}"


def read_document(path: Path) -> dict[str, Any]:
    """A run's benchmark.json; raises RunError in one line for anything else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        rows_of(document)
    except OSError as error:
        raise RunError(f"cannot read the baseline {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{path} is no benchmark.json of this command (see --out)") from None
    if not isinstance(document["machine_info"].get("device"), str):
        raise RunError(f"{path} does not say on which device it was measured")
    return dict(document)


def comparable(baseline: Mapping[str, Any], document: Mapping[str, Any]) -> None:
    """Raise RunError where two runs come from different devices."""
    before, now = (run["machine_info"]["device"] for run in (baseline, document))
    if before != now:
        raise RunError(f"the baseline was measured on {before}, this run on {now}: not comparable")


def changes(baseline: Mapping[str, Any], document: Mapping[str, Any]) -> list[Change]:
    """Every row that is in both runs and moved beyond the noise."""
    before = {row.key: row for row in rows_of(baseline)}
    found = []
    for row in rows_of(document):
        old = before.get(row.key)
        if old is not None and old.measured:
            found += changes_of(old, row)
    return found


def changes_of(old: BenchRow, new: BenchRow) -> list[Change]:
    if not new.measured:
        return [Change(new, True, f"was measured, now {new.reason}")] if new.status == FAILED else []
    found = []
    if new.bad and not old.bad:
        found.append(Change(new, True, f"was right, now {new.wrong or new.nonconforming}"))
    moved, noise = new.ratio / old.ratio - 1, noise_of(old, new)
    if abs(moved) > noise:
        words = f"{old.ratio:.3g} to {new.ratio:.3g} × the product ({moved:+.0%}, noise {noise:.0%})"
        found.append(Change(new, moved > 0, words))
    if old.peak_mib is not None and new.peak_mib is not None:
        difference = new.peak_mib - old.peak_mib
        if abs(difference) > max(MEMORY_MIB, MEMORY_SHARE * old.peak_mib):
            found.append(Change(new, difference > 0, f"peak {old.peak_mib:.0f} to {new.peak_mib:.0f} MiB"))
    return found


def noise_of(old: BenchRow, new: BenchRow) -> float:
    """Relative: half the interquartile range of the paired ratios, of both runs."""
    half_ranges = [(row.ratio_q3 - row.ratio_q1) / 2 / row.ratio for row in (old, new)]
    return max(BETWEEN_RUNS, sum(half_ranges))
