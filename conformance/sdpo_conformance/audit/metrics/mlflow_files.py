"""MLflow's file store: a file per metric, a line "timestamp value step" per entry."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sdpo_conformance.audit.errors import AuditError
from sdpo_conformance.audit.run_files import open_regular, read_text

_LINE = re.compile(r"(\d{10,16}) (\S+) (\d{1,12})(?: .*)?")
_MOST_FILES = 2000


def is_mlflow_folder(path: Path) -> bool:
    """Whether a folder's first file without an ending holds such lines."""
    if not path.is_dir():
        return False
    files = _files(path)
    if not files:
        return False
    try:
        with open_regular(files[0]) as file:
            head = file.readline(200)
    except (AuditError, OSError):
        return False
    return bool(_LINE.fullmatch(head.decode("utf-8", "replace").strip()))


def read_mlflow_folder(path: Path) -> list[dict[str, Any]]:
    """One row per step with every metric of that step; a metric's name is its path (`train/loss`)."""
    rows: dict[int, dict[str, Any]] = {}
    for file in _files(path):
        name = file.relative_to(path).as_posix()
        for line in read_text(file).splitlines():
            if match := _LINE.fullmatch(line.strip()):
                step = int(match[3])
                rows.setdefault(step, {"step": step})[name] = match[2]
    return [rows[step] for step in sorted(rows)]


def _files(path: Path) -> list[Path]:
    found = [entry for entry in sorted(path.rglob("*"))[:_MOST_FILES] if entry.is_file() and not entry.suffix]
    return [entry for entry in found if not entry.name.startswith(".")]
