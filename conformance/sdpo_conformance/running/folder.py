"""The folder of one run: ``.sdpo-conformance/<implementation>/``, what lies where, and starting it afresh."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

MARKER = ".sdpo-run"
RESULTS = "results.json"
ERROR = "error.txt"


def folder_name(target: str) -> str:
    """A file name for an implementation: ``mypkg.loss`` stays, a path becomes its stem."""
    name = target.removesuffix("/")
    if name.endswith(".py") or "/" in name:
        name = Path(name.partition(":")[0]).stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "implementation"


def default_folder(target: str) -> Path:
    """Where a run leaves its results unless told otherwise."""
    return Path(".sdpo-conformance") / folder_name(target)


def start_afresh(folder: Path) -> None:
    """Empty a folder that an earlier run made, or make it; raises ValueError for anybody else's folder."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder for the results with --out")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise ValueError(f"{folder} holds files that no run of this suite wrote; name another folder with --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("Written by sdpo-conformance; the next run of the same implementation empties it.\n")
