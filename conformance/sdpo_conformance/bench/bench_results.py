"""Reading a run's document: rows with the numbers that the table, Markdown, plots and comparison show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from sdpo_conformance.bench.peers import label
from sdpo_conformance.bench.workloads import Workload


@dataclass(frozen=True)
class BenchRow:
    """One implementation on one work. Times in ms (None where not measured), quartiles of the rounds; ``ratio``
    to the bare product, paired round by round; ``queued``: the same behind a full queue, on CUDA. ``wrong`` and
    ``nonconforming``: one line, or empty."""

    target: str
    work: Workload
    status: str
    reason: str = ""
    ms: float | None = None
    q1_ms: float = math.nan
    q3_ms: float = math.nan
    rounds: int = 0
    limit_ms: float = math.nan
    ratio: float = math.nan
    ratio_q1: float = math.nan
    ratio_q3: float = math.nan
    queued: float | None = None
    peak_mib: float | None = None
    error: float | None = None
    error_of: str = ""
    wrong: str = ""
    nonconforming: str = ""
    other: str = ""
    remarks: tuple[str, ...] = ()
    step: Mapping[str, Any] | None = None

    @property
    def label(self) -> str:
        return label(self.target)

    @property
    def measured(self) -> bool:
        return self.ms is not None

    @property
    def bad(self) -> bool:
        """A wrong answer, whether seen on the timed input or on the recorded cases."""
        return bool(self.wrong or self.nonconforming)

    @property
    def key(self) -> tuple[str, Workload]:
        return self.target, self.work


def rows_of(document: Mapping[str, Any]) -> list[BenchRow]:
    """Every row of a run, measured ones first; raises KeyError or TypeError on another program's document."""
    rows = [measured_row(benchmark) for benchmark in document["benchmarks"]]
    for record in document.get("sdpo_unmeasured", ()):
        rows.append(BenchRow(record["target"], Workload.read(record["work"]), record["status"], record["reason"]))
    return rows


def measured_row(benchmark: Mapping[str, Any]) -> BenchRow:
    record, stats = benchmark["extra_info"]["sdpo"], benchmark["stats"]
    return BenchRow(
        target=record["target"],
        work=Workload.read(record["work"]),
        status=record["status"],
        ms=1e3 * stats["median"],
        q1_ms=1e3 * stats["q1"],
        q3_ms=1e3 * stats["q3"],
        rounds=stats["rounds"],
        limit_ms=record["limit_ms"],
        ratio=record["limit_ratio"],
        ratio_q1=record["limit_ratio_q1"],
        ratio_q3=record["limit_ratio_q3"],
        queued=record.get("queued_ratio"),
        peak_mib=record["peak_mib"],
        error=record["error"],
        error_of=record["error_of"],
        wrong=record["wrong"],
        nonconforming=record["nonconforming"],
        other=record["other"],
        remarks=tuple(record["remarks"]),
        step=record.get("step"),
    )


@dataclass(frozen=True)
class Group:
    """The rows of one work, in the order the implementations were named. ``first``: the one ratios refer to."""

    work: Workload
    rows: Sequence[BenchRow]

    @property
    def first(self) -> BenchRow:
        return self.rows[0]

    @property
    def limit_ms(self) -> float:
        """The bare product: the median over the rows of the medians taken beside them."""
        return median(row.limit_ms for row in self.rows if row.measured)

    @property
    def measured(self) -> bool:
        return any(row.measured for row in self.rows)

    @property
    def queued(self) -> bool:
        """Whether rows were timed behind a full queue, too."""
        return any(row.queued is not None for row in self.rows)

    def to_first(self, row: BenchRow) -> float:
        """Time relative to the first implementation, through the product that both were paired with."""
        return row.ratio / self.first.ratio if self.first.measured and row.measured else math.nan


def groups_of(rows: Sequence[BenchRow], targets: Sequence[str]) -> list[Group]:
    """Rows by work, in the order of the run."""
    order = {target: index for index, target in enumerate(targets)}
    found: dict[Workload, list[BenchRow]] = {}
    for row in rows:
        found.setdefault(row.work, []).append(row)
    return [
        Group(work, sorted(members, key=lambda row: order.get(row.target, len(order))))
        for work, members in found.items()
    ]


def bytes_of_logits(work: Workload) -> int:
    """What the bare product writes: (N, V) in the work's dtype."""
    size = {"float64": 8, "float32": 4}.get(work.dtype, 2)
    return work.tokens * work.head.vocabulary * size
