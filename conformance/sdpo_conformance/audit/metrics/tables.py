"""Metrics in a table: CSV with commas, semicolons or tabs, one row per step or one per step and metric."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from sdpo_conformance.audit.errors import AuditError, shown
from sdpo_conformance.audit.run_files import read_text

_NAME_COLUMNS = ("metric", "key", "tag", "name", "variable")
_COMMA = re.compile(r"\s*[-+]?\d+,\d+(?:[eE][-+]?\d+)?\s*")
_POINT = re.compile(r"\s*[-+]?\d*\.\d+(?:[eE][-+]?\d+)?\s*")
_STEP_COLUMNS = ("step", "Step", "_step", "global_step", "train/global_step", "iteration", "iter")


def is_table(path: Path) -> bool:
    """Whether the name is a table's, packed or not."""
    return Path(path.name.lower().removesuffix(".gz")).suffix in (".csv", ".tsv")


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a table, without its blank cells.

    wandb's export names columns "run - metric" and adds __MIN and __MAX; TensorBoard's has one tag per file and names
    it in the file's name; a long table names the metric in a cell (MLflow, pandas' melt).
    """
    text = read_text(path).replace("\0", "")
    header = text.splitlines()[0]
    separator = max(("\t", ";", ","), key=header.count)
    try:
        parsed = list(csv.DictReader(io.StringIO(text), delimiter=separator))
    except csv.Error as error:
        raise AuditError(f"{shown(path)}: is not a table that can be read: {shown(error)}") from None
    if separator != "," and not any(_POINT.fullmatch(cell) for cell in _cells(parsed)):
        for record in parsed:  # a spreadsheet of a language that writes 0,5
            record.update({k: v.replace(",", ".") for k, v in record.items() if _is_cell(v) and _COMMA.fullmatch(v)})
    rows = []
    tag = re.search(r"tag-(.+)$", path.stem)
    for record in parsed:
        row: dict[str, Any] = {}
        for key, value in record.items():
            if not isinstance(key, str) or not isinstance(value, str) or not value.strip():
                continue
            name = key.strip().rsplit(" - ", 1)[-1]
            if name.endswith(("__MIN", "__MAX")):
                continue
            if name == "Value" and tag:
                name = tag[1].replace("_", "/", 1) if tag[1].startswith(("train_", "eval_")) else tag[1]
            row[name] = value
        if row:
            rows.append(_numbered(row))
    return _widened(rows)


def _cells(records: list[dict[str, Any]]) -> Iterator[str]:
    return (value for record in records for value in record.values() if _is_cell(value))


def _is_cell(value: object) -> TypeGuard[str]:
    """Not the list of what stands past the header's columns."""
    return isinstance(value, str)


def _widened(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per step, of a table that has one per step and metric; other tables as they are."""
    columns = {key.lower() for row in rows for key in row}
    name = next((column for column in _NAME_COLUMNS if column in columns), None)
    if name is None or "value" not in columns or not columns & {column.lower() for column in _STEP_COLUMNS}:
        return rows
    wide: dict[Any, dict[str, Any]] = {}
    for row in rows:
        low = {key.lower(): value for key, value in row.items()}
        step = next((low[column.lower()] for column in _STEP_COLUMNS if column.lower() in low), None)
        if step is not None and name in low and "value" in low:
            wide.setdefault(step, {"step": step})[str(low[name])] = low["value"]
    return list(wide.values())


def _numbered(row: dict[str, Any]) -> dict[str, Any]:
    """Step numbers of a table are text, some as "3.0"."""
    for key in _STEP_COLUMNS:
        value = row.get(key)
        if isinstance(value, str):
            try:
                number = float(value)
            except ValueError:
                continue
            if number.is_integer():
                row[key] = int(number)
    return row
