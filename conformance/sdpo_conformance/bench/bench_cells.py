"""A cell: one implementation on one work; a plan: the cells of a run, as the worker processes read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdpo_conformance.bench.peers import COMPILE
from sdpo_conformance.bench.workloads import UNIFORM, Workload, support_name
from sdpo_conformance.files import write_json

PLAN, CURRENT, SESSION, RECORDS = "plan.json", "current", "session.json", "cells"


@dataclass(frozen=True)
class BenchCell:
    """``number`` orders the cells of a run; ``target`` is the implementation as the user named it."""

    number: int
    target: str
    work: Workload

    @property
    def name(self) -> str:
        """Stable between runs: what pytest-benchmark compares by."""
        work = self.work
        parts = [work.workload, str(work.tokens), str(work.direction)]
        if work.direction.has_objective:
            parts += [f"alpha={work.alpha:g}", f"anchor={work.anchor:g}"]
        if work.support != UNIFORM:
            parts.append(f"support={support_name(work.support)}")
        return "-".join([*parts, work.dtype, self.target])


def cells_of(works: Sequence[Workload], targets: Sequence[str]) -> list[BenchCell]:
    """Every implementation on every work, side by side in time so that a table's rows share the machine's mood.
    What has to be compiled first for long comes last: a time limit should cut that."""
    pairs = [(target, work) for work in works for target in targets]
    pairs.sort(key=lambda pair: pair[0].startswith(COMPILE))
    return [BenchCell(number, target, work) for number, (target, work) in enumerate(pairs)]


def write_plan(folder: Path, cells: Sequence[BenchCell], deadline: float | None) -> None:
    """``deadline``: seconds since the epoch after which no cell is begun."""
    listed = [{"number": cell.number, "target": cell.target, "work": cell.work.write()} for cell in cells]
    (folder / RECORDS).mkdir(exist_ok=True)
    write_json(folder / PLAN, {"deadline": deadline, "cells": listed})


def read_plan(folder: Path) -> tuple[list[BenchCell], float | None]:
    document = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    cells = [BenchCell(one["number"], one["target"], Workload.read(one["work"])) for one in document["cells"]]
    return cells, document["deadline"]


def record_path(folder: Path, cell: BenchCell) -> Path:
    return folder / RECORDS / f"{cell.number:04}.json"
