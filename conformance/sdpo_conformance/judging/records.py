"""What a run leaves on disk: one JSON record per requirement and entry, written by whichever process ran it.

Files, not memory, because the process may die of the implementation: what is missing at the end was lost to a
crash, and ``last_case`` says on which input.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from sdpo_conformance.files import write_json
from sdpo_conformance.protocol import ENTRIES, Capability
from sdpo_conformance.specs.requirement import Level


class Status(StrEnum):
    """Verdict of one requirement through one entry."""

    PASSED = "passed"
    FAILED = "failed"
    EXPECTED_FAILURE = "expected failure"
    UNEXPECTED_PASS = "unexpected pass"
    NOT_JUDGED = "not judged"
    INTERNAL_ERROR = "internal error"


@dataclass(frozen=True)
class Record:
    """``failure`` holds aspect, expected, got, detail, words (the input in words), secondary, probe, and
    ``files`` relative to the run's folder."""

    requirement: str
    entry: str
    level: Level
    status: Status
    reason: str = ""
    examples: int = 0
    rejected: int = 0
    recorded: int = 0
    seconds: float = 0.0
    out_of_time: bool = False
    failure: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return record_key(self.requirement, self.entry)


def names_a_rule(record: Record, sweeps: Collection[str]) -> bool:
    """Whether a failure says which rule is broken: not one that follows from another, nor one found by a sweep."""
    bad = record.status in (Status.FAILED, Status.INTERNAL_ERROR) and record.level is Level.MUST
    return bad and not record.failure.get("secondary") and record.requirement not in sweeps


def record_key(requirement: str, entry: str) -> str:
    """File stem of a record: the id, and the entry where it is not the plain loss."""
    suffix = ENTRIES[Capability(entry)].suffix
    return f"{requirement}-{suffix}" if suffix else requirement


def write_record(folder: Path, record: Record) -> None:
    """Store one record under ``folder``/records."""
    write_json(folder / "records" / f"{record.key}.json", asdict(record))


def read_record(folder: Path, key: str) -> Record | None:
    """The record under a key, or None where there is none."""
    path = folder / "records" / f"{key}.json"
    return record_in(path) if path.exists() else None


def forget_record(folder: Path, key: str) -> None:
    """As if it had not been judged."""
    (folder / "records" / f"{key}.json").unlink(missing_ok=True)


def record_in(path: Path) -> Record:
    """What ``write_record`` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["level"], content["status"] = Level(content["level"]), Status(content["status"])
    return Record(**content)


def read_records(folder: Path) -> dict[str, Record]:
    """Every record under ``folder``/records by key."""
    found = [record_in(path) for path in sorted((folder / "records").glob("*.json"))]
    return {record.key: record for record in found}
