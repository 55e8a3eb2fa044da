"""The matrix as one HTML page: styles, script and data inside, nothing fetched.

The table is complete without the script; the script opens cells and filters. Text from an implementation reaches
the page through the template's escaping or as JSON that the script shows with ``textContent``, and the page's
content security policy admits no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import groupby
from typing import TYPE_CHECKING, Any

from sdpo_conformance.matrix.cells import Cell, CellStatus, Row, cell_of, spec_of, tally
from sdpo_conformance.matrix.columns import Column
from sdpo_conformance.protocol import ENTRIES, Capability

if TYPE_CHECKING:
    from jinja2 import Environment

MARKS = {
    CellStatus.PASSED: "✓",
    CellStatus.FAILED: "✗",
    CellStatus.EXPECTED_FAILURE: "≈",
    CellStatus.UNEXPECTED_PASS: "!",
    CellStatus.NOT_JUDGED: "–",
    CellStatus.NOT_OFFERED: "·",
    CellStatus.NOT_INSTALLED: "∅",
    CellStatus.COULD_NOT_RUN: "⨯",
    CellStatus.INTERNAL_ERROR: "?",
}
"""In the order of the legend. A status is never told by colour alone."""

SHOWN_IN_FAILURE = ("summary", "aspect", "expected", "got", "detail", "words", "kind", "secondary", "reproduction")


def templates() -> Environment:
    """The templates of this folder, everything escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("sdpo_conformance.matrix", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page(columns: Sequence[Column], rows: Sequence[Row], created: str, above: str = "", below: str = "") -> str:
    """The whole page; ``created`` is the document's time stamp, ``above`` and ``below`` are markup around the table."""
    environment = templates()
    spec = spec_of(columns)
    families = spec.families
    files = resources.files("sdpo_conformance.matrix")
    script, style = ((files / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    environment.filters["breakable"] = breakable
    cells = {row.id: [cell_of(column, row.id) for column in columns] for row in rows}
    counts = dict.fromkeys(MARKS, 0)
    for row in cells.values():
        for cell in row:
            counts[cell.status] += 1
    text: str = environment.get_template("page.html.jinja").render(
        columns=columns,
        heads=[head(column, rows) for column in columns],
        families=[
            {
                "id": family,
                "words": families.get(family, family),
                "rows": members,
                "tallies": [tally(column, members) for column in columns],
            }
            for family, members in ((name, list(group)) for name, group in groupby(rows, lambda row: row.family))
        ],
        cells=cells,
        marks=MARKS,
        counts={status: count for status, count in counts.items() if count},
        created=created,
        requirements=len(rows),
        spec=spec.label,
        above=above,
        below=below,
        data=embedded(view(columns, rows, cells)),
        script=script,
        style=style,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return text


def breakable(text: str) -> Any:
    """A dotted name that may be broken after its dots and underscores."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[._:/-])", text))


def head(column: Column, rows: Sequence[Row]) -> dict[str, Any]:
    """What stands above a column."""
    met, judged = tally(column, [row for row in rows if row.level == "MUST"])
    if column.results is None:
        status = CellStatus(column.standing.value)
        return {"tone": "idle", "sign": MARKS[status], "verdict": str(column.standing), "found": "", "dtypes": ""}
    verdict, words = column.results["verdict"], f"{met}/{judged} MUST"
    if column.internal_errors:
        tone, status, words = "odd", CellStatus.INTERNAL_ERROR, f"suite error · {words}"
    elif verdict["conforming"] and verdict["passed"] and column.scope:
        tone, status, words = "claimed", CellStatus.PASSED, f"{column.scope} · {words}"
    elif verdict["conforming"] and verdict["passed"]:
        tone, status, words = "good", CellStatus.PASSED, f"conforming · {words}"
    elif verdict["passed"]:
        tone, status, words = "claimed", CellStatus.EXPECTED_FAILURE, f"as claimed · {words}"
    elif verdict["conforming"]:
        tone, status, words = "claimed", CellStatus.UNEXPECTED_PASS, f"drop a claim · {words}"
    else:
        tone, status = "bad", CellStatus.FAILED
    dtypes = ", ".join(column.results["run"]["dtypes"])
    return {"tone": tone, "sign": MARKS[status], "verdict": words, "found": recognised(column), "dtypes": dtypes}


def recognised(column: Column) -> str:
    """The defects or dialects that the diagnosis names: an algorithm's name says more than many red cells."""
    diagnosis = column.results["diagnosis"] if column.results is not None else None
    return ", ".join(dict.fromkeys(match["name"] for match in diagnosis["matches"])) if diagnosis else ""


def view(columns: Sequence[Column], rows: Sequence[Row], cells: Mapping[str, Sequence[Cell]]) -> dict[str, Any]:
    """What the script shows when a cell or a column's head is opened."""
    families = spec_of(columns).families
    return {
        "requirements": {
            row.id: {
                "level": row.level,
                "family": families.get(row.family, row.family),
                "statement": row.statement,
                "why": row.why,
                "source": row.source,
            }
            for row in rows
        },
        "columns": [column_view(column) for column in columns],
        "cells": {id: [cell_view(cell) for cell in row] for id, row in cells.items()},
    }


def column_view(column: Column) -> dict[str, Any]:
    """An implementation: how it was judged, with what, and what came out."""
    shown: dict[str, Any] = {
        "name": column.implementation,
        "standing": column.standing,
        "device": column.device,
        "version": column.version,
        "message": column.message,
        "programs": {name: [found.program, found.input] for name, found in column.reproductions.items()},
        "diagnosis": [],
    }
    if column.results is None:
        return shown
    run, diagnosis = column.results["run"], column.results["diagnosis"]
    return {
        **shown,
        "device": run["device"] if run["device"] == "cpu" else f"{run['device']} ({run['device_name']})",
        "offered": column.results["offered"],
        "dtypes": run["dtypes"],
        "refused": run["refused_dtypes"],
        "run": f"profile {run['profile']}, seed {run['seed']}, {run['seconds']:.0f} s",
        "versions": run["versions"],
        "verdict": column.results["verdict"]["text"],
        "diagnosis": diagnosis["lines"] if diagnosis else [],
    }


def cell_view(cell: Cell) -> dict[str, Any]:
    """A cell: its status, and each entry's verdict with the failing example."""
    return {
        "status": cell.status,
        "reason": cell.reason,
        "entries": [
            {
                "entry": ENTRIES[Capability(record["entry"])].label,
                "status": record["status"],
                "reason": record["reason"],
                "examples": record["examples"],
                "recorded": record["recorded"],
                "outOfTime": record["out_of_time"],
                "failure": {name: record["failure"][name] for name in SHOWN_IN_FAILURE if record["failure"].get(name)},
            }
            for record in cell.records
        ],
    }


def embedded(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
