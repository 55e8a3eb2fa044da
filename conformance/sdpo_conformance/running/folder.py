"""The folder of one run: ``.sdpo-conformance/<implementation>/``, what lies where, and starting it afresh."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARKER = ".sdpo-run"
RESULTS = "results.json"
BENCHMARK = "benchmark.json"
ERROR = "error.txt"
DIAGNOSING = "diagnosing"
MARKED = "Written by sdpo-conformance; the next run of the same implementation empties it.\n"


def folder_name(target: str) -> str:
    """A file name for an implementation: ``mypkg.loss`` stays, a path becomes its stem."""
    name = target.removesuffix("/")
    if name.endswith(".py") or "/" in name:
        name = Path(name.partition(":")[0]).stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "implementation"


def default_folder(target: str) -> Path:
    """Where a run leaves its results unless told otherwise."""
    return Path(".sdpo-conformance") / folder_name(target)


def check_ours(folder: Path) -> None:
    """Raise ValueError for a folder that no run of this suite made."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder for the results with --out")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise ValueError(f"{folder} holds files that no run of this suite wrote; name another folder with --out")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``folder`` for a run to write to. It takes ``folder``'s place at the end where it
    holds results; otherwise it goes, with the folders made for it, and the earlier results stay.

    Raises ValueError for a folder that no run of this suite made.
    """
    check_ours(folder)
    made = [parent for parent in folder.parents if not parent.exists()]
    stage = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(stage, ignore_errors=True)
    try:
        stage.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"cannot make {folder} for the results: {error.strerror}; name a folder with --out") from None
    (stage / MARKER).write_text(MARKED)
    try:
        yield stage
        if (stage / RESULTS).exists() or (stage / BENCHMARK).exists():
            old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            if folder.exists():
                folder.rename(old)
            stage.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def start_afresh(folder: Path) -> None:
    """Empty a folder that an earlier run made, or make it; raises ValueError for anybody else's folder."""
    check_ours(folder)
    if folder.is_dir() and any(folder.iterdir()):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(MARKED)
