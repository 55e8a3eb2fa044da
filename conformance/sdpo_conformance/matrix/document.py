"""matrix.json: every column with its results, reproductions and versions (``matrix.schema.json``)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sdpo_conformance.matrix.columns import Column
from sdpo_conformance.matrix.gather import FORMAT


def document(columns: Sequence[Column], created: datetime | None = None) -> dict[str, Any]:
    """The whole document; ``created`` is now unless given."""
    when = created or datetime.now(UTC)
    return {
        "format": FORMAT,
        "created": time_stamp(when),
        "implementations": [column.as_json() for column in columns],
    }


def time_stamp(when: datetime) -> str:
    """``2026-11-27T21:19:32Z``."""
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def exit_status(columns: Sequence[Column]) -> int:
    """0 every implementation that is installed passes, 1 one does not or could not run, 2 none could run.

    A package that is not installed is no verdict on anything: its column says so and costs nothing.
    """
    if not any(column.results is not None for column in columns):
        return 2
    installed = [column for column in columns if column.standing != "not installed"]
    return 0 if all(column.passed for column in installed) else 1
