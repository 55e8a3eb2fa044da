"""A badge for each implementation, as shields.io's endpoint reads it."""

from __future__ import annotations

from typing import Any

from sdpo_conformance.matrix.cells import rows_of, spec_of, tally
from sdpo_conformance.matrix.columns import Column
from sdpo_conformance.specs.requirement import Level


def badge(column: Column) -> dict[str, Any]:
    """The endpoint's JSON: schemaVersion, label, message, color (https://shields.io/badges/endpoint-badge)."""
    verdict = column.verdict
    met, judged = tally(column, [row for row in rows_of([column]) if row.level == Level.MUST])
    if verdict is None:
        message, color = str(column.standing), "lightgrey"
    elif not judged:
        message, color = "nothing judged", "lightgrey"
    elif column.internal_errors:
        message, color = "suite error", "lightgrey"
    elif not verdict["passed"]:
        message, color = f"{met}/{judged} MUST", "red"
    elif not verdict["conforming"]:
        message, color = f"{met}/{judged} MUST, rest claimed", "yellow"
    elif column.scope:
        message, color = f"{column.scope}, {met}/{judged} MUST", "yellowgreen"
    else:
        message, color = f"conforming, {met}/{judged} MUST", "brightgreen"
    return {"schemaVersion": 1, "label": f"{spec_of([column]).label} SDPO", "message": message, "color": color}
