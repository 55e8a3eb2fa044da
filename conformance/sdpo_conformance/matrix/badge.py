"""A badge for each implementation, as shields.io's endpoint reads it."""

from __future__ import annotations

from typing import Any

from sdpo_conformance.matrix.columns import Column

LABEL = "CLaaS SDPO"


def badge(column: Column) -> dict[str, Any]:
    """The endpoint's JSON: schemaVersion, label, message, color (https://shields.io/badges/endpoint-badge)."""
    verdict = column.verdict
    if verdict is None:
        message, color = str(column.standing), "lightgrey"
    elif not verdict["must_judged"]:
        message, color = "nothing judged", "lightgrey"
    else:
        tally = f"{verdict['must_met']}/{verdict['must_judged']} MUST"
        if verdict["conforming"] and verdict["passed"]:
            message, color = f"conforming, {tally}", "brightgreen"
        elif verdict["passed"]:
            message, color = f"{tally}, rest claimed", "yellow"
        else:
            message, color = tally, "red"
    return {"schemaVersion": 1, "label": LABEL, "message": message, "color": color}
