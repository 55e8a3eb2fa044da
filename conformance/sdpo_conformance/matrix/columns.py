"""One implementation's column of the matrix: the results of its run, or why there are none."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from sdpo_conformance.judging.records import Status
from sdpo_conformance.protocol import Capability
from sdpo_conformance.report.results import scope_of

LARGEST_INPUT = 64 * 1024
"""Bytes of a reproduction's input that is taken into the document; a larger one stays in the run's folder."""


class Standing(StrEnum):
    """Whether an implementation could be judged at all."""

    JUDGED = "judged"
    NOT_INSTALLED = "not installed"
    COULD_NOT_RUN = "could not run"


@dataclass(frozen=True)
class Reproduction:
    """A program that shows one failure: its text, and its ``.safetensors`` input in base64 ("" if too large)."""

    program: str
    input: str = ""


@dataclass(frozen=True)
class Column:
    """``implementation`` as the user named it; ``version`` the package and version behind it, "" if unknown.

    ``results`` is the document of ``results.schema.json`` where ``standing`` is JUDGED, else None, and
    ``message`` is the one line that says why. ``reproductions`` by the file name that a failure refers to.
    """

    implementation: str
    standing: Standing
    device: str
    version: str = ""
    message: str = ""
    results: Mapping[str, Any] | None = None
    reproductions: Mapping[str, Reproduction] = field(default_factory=dict)

    @property
    def verdict(self) -> Mapping[str, Any] | None:
        """The verdict of the run, or None where there was none."""
        return None if self.results is None else self.results["verdict"]

    @property
    def scope(self) -> str:
        """What alone was judged: "only IS", "response log-probs alone"; empty for all of a loss or a trainer."""
        if self.results is None:
            return ""
        return scope_of([Capability(name) for name in self.results["offered"]], self.results["run"])

    @property
    def internal_errors(self) -> list[str]:
        """Requirements on which the suite itself went wrong, and so has no verdict."""
        records = () if self.results is None else self.results["records"]
        return sorted({record["requirement"] for record in records if record["status"] == Status.INTERNAL_ERROR})

    @property
    def passed(self) -> bool:
        """Judged in full, and nothing fails but what was claimed to fail."""
        return self.verdict is not None and bool(self.verdict["passed"]) and not self.internal_errors

    def as_json(self) -> dict[str, Any]:
        """The column as ``matrix.schema.json`` describes it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Column:
        """The inverse of ``as_json``."""
        programs = {name: Reproduction(**found) for name, found in content["reproductions"].items()}
        return cls(**{**content, "standing": Standing(content["standing"]), "reproductions": programs})

    @classmethod
    def judged(cls, results: Mapping[str, Any], folder: Path, version: str) -> Column:
        """The column of a run whose results and reproductions lie in ``folder``."""
        return cls(
            implementation=results["implementation"],
            standing=Standing.JUDGED,
            device=results["run"]["device"],
            version=version,
            results={**results, "records": [without_local_paths(record) for record in results["records"]]},
            reproductions=reproductions_of(results, folder),
        )


def without_local_paths(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record with the files of a traceback named from where they are imported: a matrix is made to be shown."""
    failure = record["failure"]
    detail = failure.get("detail", "")
    for folder in sorted({str(Path(entry).resolve()) for entry in sys.path}, key=len, reverse=True):
        detail = detail.replace(folder.rstrip(os.sep) + os.sep, "")
    return record if detail == failure.get("detail", "") else {**record, "failure": {**failure, "detail": detail}}


def reproductions_of(results: Mapping[str, Any], folder: Path) -> dict[str, Reproduction]:
    """Every failure's program that is still in the run's folder."""
    found = {}
    for record in results["records"]:
        name = record["failure"].get("reproduction")
        program = folder / name if name else None
        if program is None or not program.is_file():
            continue
        data = program.with_suffix(".safetensors")
        small = data.is_file() and data.stat().st_size <= LARGEST_INPUT
        content = base64.b64encode(data.read_bytes()).decode("ascii") if small else ""
        found[name] = Reproduction(program.read_text(encoding="utf-8"), content)
    return found
