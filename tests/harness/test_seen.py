"""What a run in progress tells of its records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdpo_conformance.files import write_json
from sdpo_conformance.judging.records import Record, Status, write_record
from sdpo_conformance.report.watcher import Watcher
from sdpo_conformance.running.folder import DIAGNOSING
from sdpo_conformance.running.process import Seen
from sdpo_conformance.specs.requirement import Level

LOSS = "compute_sdpo_loss"
PLAN = ("GJS-1", "GJS-2", "GJS-3", "NUM-1")


class Told(Watcher):
    def __init__(self) -> None:
        self.names: list[str] = []

    def verdict(self, record: Any) -> None:
        self.names.append(record["requirement"])


def planned(folder: Path) -> None:
    write_json(folder / "plan.json", [{"requirement": name, "entry": LOSS} for name in PLAN])


def judged(folder: Path, name: str, status: Status = Status.PASSED) -> None:
    write_record(folder, Record(name, LOSS, Level.MUST, status))


def test_a_check_tells_no_verdict_that_its_report_may_drop(tmp_path: Path) -> None:
    """A worker is ahead of the one whose rule fails: what it judged meanwhile is forgotten."""
    told = Told()
    seen = Seen(tmp_path, told, sweeps=("NUM-1",))
    planned(tmp_path)
    judged(tmp_path, "GJS-1")
    judged(tmp_path, "GJS-3")
    seen.look()
    assert told.names == ["GJS-1"]
    judged(tmp_path, "GJS-2", Status.FAILED)
    seen.look()
    seen.look()
    assert told.names == ["GJS-1", "GJS-2"]
    judged(tmp_path, "NUM-1", Status.FAILED)  # asked for after the failure
    (tmp_path / "records" / "GJS-3.json").unlink()
    (tmp_path / DIAGNOSING).touch()
    seen.look()
    assert told.names == ["GJS-1", "GJS-2", "NUM-1"]


def test_a_run_tells_every_verdict_at_once(tmp_path: Path) -> None:
    told = Told()
    seen = Seen(tmp_path, told)
    planned(tmp_path)
    for name in ("GJS-3", "GJS-1"):
        judged(tmp_path, name, Status.FAILED)
        seen.look()
    assert told.names == ["GJS-3", "GJS-1"]
