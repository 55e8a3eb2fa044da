"""The one benchmark of a worker: a cell of the plan. Collected by ``running``, with ``plugin``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from sdpo_conformance.bench.bench_cells import CURRENT, BenchCell, read_plan, record_path, write_json
from sdpo_conformance.bench.rows import MEASURED, describe, measure

DEVICE_LOST = 70
"""Exit status of a worker whose GPU context is gone."""


def test_cell(bench_cell: BenchCell, benchmark: Any, bench_folder: Path) -> None:
    """Measure a cell and leave its record; never fails: the record says what happened."""
    (bench_folder / CURRENT).write_text(str(bench_cell.number), encoding="utf-8")
    if bench_cell.work.device.startswith("cuda:"):
        torch.cuda.set_device(bench_cell.work.device)
    _, deadline = read_plan(bench_folder)
    benchmark.group = bench_cell.work.group
    benchmark.name = bench_cell.name
    benchmark.fullname = f"sdpo-conformance bench: {bench_cell.name}"
    benchmark.param, benchmark.params = None, describe(bench_cell.work)
    record = measure(bench_cell, benchmark, deadline)
    document: dict[str, Any] = {"target": bench_cell.target, "work": bench_cell.work.write(), **record}
    benchmark.extra_info = {"sdpo": document}
    if record["status"] == MEASURED:
        stats = benchmark.stats
        stats.extra_info, stats.params, stats.param = benchmark.extra_info, benchmark.params, None
        stats.name, stats.fullname, stats.group = benchmark.name, benchmark.fullname, benchmark.group
        document = {**document, "benchmark": stats.as_dict(include_data=True)}
    else:
        benchmark.skipped = True
    write_json(record_path(bench_folder, bench_cell), document)
    if record.get("device_lost"):
        os._exit(DEVICE_LOST)
