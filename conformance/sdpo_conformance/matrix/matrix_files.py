"""Writing the matrix: matrix.json, matrix.html and badges/, each whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdpo_conformance.files import write_json, write_text
from sdpo_conformance.matrix.badge import badge
from sdpo_conformance.matrix.cells import Row
from sdpo_conformance.matrix.columns import Column
from sdpo_conformance.matrix.page import page
from sdpo_conformance.running.folder import folder_name


def write_matrix(
    folder: Path, content: Mapping[str, Any], columns: Sequence[Column], rows: Sequence[Row]
) -> list[Path]:
    """The files written: the document ``content``, the page, and a badge for each implementation."""
    html = page(columns, rows, content["created"])
    json_path, page_path = folder / "matrix.json", folder / "matrix.html"
    write_json(json_path, content)
    write_text(page_path, html)
    for name, column in zip(badge_names(columns), columns, strict=True):
        write_json(folder / "badges" / f"{name}.json", badge(column))
    return [json_path, page_path, folder / "badges"]


def badge_names(columns: Sequence[Column]) -> list[str]:
    """A file stem for each column; the device where one implementation was judged on several."""
    names = [folder_name(column.implementation) for column in columns]
    kinds = [column.device.partition(":")[0] for column in columns]
    first = [f"{name}-{kind}" if names.count(name) > 1 else name for name, kind in zip(names, kinds, strict=True)]
    return [
        f"{name}-{first[:index].count(name) + 1}" if name in first[:index] else name for index, name in enumerate(first)
    ]
