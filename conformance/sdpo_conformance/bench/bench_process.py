"""A run: the plan, worker processes that measure it, and one document of everything they found.

A worker that crashes, hangs or loses its GPU costs the cell it was at; another goes on with the next.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sdpo_conformance.bench.bench_cells import (
    CURRENT,
    RECORDS,
    SESSION,
    BenchCell,
    cells_of,
    record_path,
    write_json,
    write_plan,
)
from sdpo_conformance.bench.workloads import Workload
from sdpo_conformance.running.children import end_group
from sdpo_conformance.running.options import RunError
from sdpo_conformance.running.process import child_environment

Progress = Callable[[int, int], None]

STARTING_SECONDS = 180.0
"""A worker may take this long to its first cell, beside the time of a cell."""

LOG = "pytest.log"
DOCUMENT = "benchmark.json"


def run_bench(
    works: Sequence[Workload],
    targets: Sequence[str],
    folder: Path,
    *,
    time_limit: float | None = None,
    cell_timeout: float = 300.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure every target on every work; the document, also written to ``folder``/benchmark.json.

    ``time_limit``: seconds after which no further cell is begun; ``cell_timeout``: seconds after which a cell is
    given up. Raises RunError where no worker could start.
    """
    cells = cells_of(works, targets)
    write_plan(folder, cells, None if time_limit is None else time.time() + time_limit)
    while left := [cell for cell in cells if not record_path(folder, cell).exists()]:
        status, stuck = run_worker(folder, cells, cell_timeout, progress)
        still = [cell for cell in cells if not record_path(folder, cell).exists()]
        current = current_cell(folder, still)
        if current is not None:
            give_up(folder, current, status, stuck, cell_timeout)
        elif len(still) == len(left):
            raise RunError(why_not(folder, status, stuck))
    document = collect(folder, cells)
    write_json(folder / DOCUMENT, document)
    return document


def measured_so_far(folder: Path, works: Sequence[Workload], targets: Sequence[str]) -> tuple[dict[str, Any], int, int]:
    """Of a run that was ended: the document of the rows that are done, how many these are, and of how many; an empty
    document before the first."""
    cells = cells_of(works, targets)
    done = [cell for cell in cells if record_path(folder, cell).exists()]
    return collect(folder, done) if done else {}, len(done), len(cells)


def run_worker(
    folder: Path, cells: Sequence[BenchCell], cell_timeout: float, progress: Progress | None
) -> tuple[int, bool]:
    """One process over the cells that have no record; its exit status, and whether it had to be stopped."""
    (folder / CURRENT).unlink(missing_ok=True)
    environment = {**child_environment(), "TRL_EXPERIMENTAL_SILENCE": "1"}
    with (folder / LOG).open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            worker_command(folder),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        stuck, seen, since = False, (False, -1), time.monotonic()
        try:
            while process.poll() is None:
                time.sleep(0.1)
                done = len(list((folder / RECORDS).glob("*.json")))
                if progress is not None:
                    progress(done, len(cells))
                begun = (folder / CURRENT).exists()
                if (begun, done) != seen:
                    seen, since = (begun, done), time.monotonic()
                if time.monotonic() - since > (cell_timeout if begun else STARTING_SECONDS):
                    stuck = True
                    break
        finally:
            stop(process)
    return process.returncode, stuck


def worker_command(folder: Path) -> list[str]:
    """pytest, shielded from the configuration of the user's project."""
    configuration = Path(__file__).parents[1] / "running" / "pytest.ini"
    plugins = ("pytest_benchmark.plugin", "sdpo_conformance.bench.bench_plugin", "no:cacheprovider", "no:faulthandler")
    return [
        sys.executable,
        *("-m", "pytest", "-q", "-c", str(configuration), "--noconftest"),
        *(option for plugin in plugins for option in ("-p", plugin)),
        *("--pyargs", "sdpo_conformance.bench.test_cells"),
        f"--bench-folder={folder}",
        f"--benchmark-storage=file://{folder}",  # else it leaves an empty .benchmarks where the user is
        "--benchmark-timer=sdpo_conformance.bench.measuring.clock",
        "--benchmark-disable-gc",
    ]


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started."""
    end_group(process)


def current_cell(folder: Path, left: Sequence[BenchCell]) -> BenchCell | None:
    """The cell that a worker had begun and not finished."""
    try:
        number = int((folder / CURRENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return next((cell for cell in left if cell.number == number), None)


def give_up(folder: Path, cell: BenchCell, status: int, stuck: bool, cell_timeout: float) -> None:
    """Record a cell that took its worker with it."""
    if stuck:
        reason = f"took more than {cell_timeout:g} s"
    elif status == -signal.SIGKILL:
        reason = "its process was killed, as happens when the machine runs out of memory"
    elif status < 0:
        reason = f"crashed its process ({signal.Signals(-status).name})"
    else:
        reason = f"ended its process with status {status}"
    document = {"target": cell.target, "work": cell.work.write(), "status": "failed", "reason": reason}
    write_json(record_path(folder, cell), document)


def why_not(folder: Path, status: int, stuck: bool) -> str:
    """One line on a worker that got to no cell."""
    lines = [line for line in (folder / LOG).read_text(encoding="utf-8").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    found = (errors or lines or ["no output"])[-1].strip()
    how = "took too long to start" if stuck else f"ended with status {status}"
    return f"the worker {how}: {found[:200]}"


def collect(folder: Path, cells: Sequence[BenchCell]) -> dict[str, Any]:
    """pytest-benchmark's document of the measured cells; the others under ``sdpo_unmeasured``."""
    session = json.loads((folder / SESSION).read_text(encoding="utf-8"))
    benchmarks, unmeasured = [], []
    for cell in cells:
        record = json.loads(record_path(folder, cell).read_text(encoding="utf-8"))
        measured = record.pop("benchmark", None)
        if measured is None:
            unmeasured.append(record)
        else:
            benchmarks.append(measured)
    return {
        "machine_info": session["machine_info"],
        "commit_info": session["commit_info"],
        "benchmarks": benchmarks,
        "datetime": datetime.now(UTC).isoformat(),
        "version": session["version"],
        "sdpo_unmeasured": unmeasured,
    }
