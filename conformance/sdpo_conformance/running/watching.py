"""``--watch``: judge again whenever a source file of the implementation changes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path

from sdpo_conformance.running.children import Interrupted

EVERY_SECONDS = 0.3


def sources_of(target: str) -> list[Path]:
    """The files to watch: the .py file named, or the folder of the module, found without importing it."""
    name = target.partition(":")[0]
    if name.endswith(".py") or "/" in name:
        return [Path(name)]
    if target.startswith("defect:"):
        return []
    path: list[str] | None = [str(Path.cwd()), *sys.path]
    found = None
    for part in name.split("."):
        found = PathFinder.find_spec(part, path)
        if found is None:
            return []
        path = list(found.submodule_search_locations or [])
    if found is None or not found.origin:
        return []
    origin = Path(found.origin)
    return sorted(origin.parent.rglob("*.py")) if "." in name or origin.name == "__init__.py" else [origin]


def stamps(target: str) -> dict[Path, int]:
    """When each source was last written."""
    found = {}
    for path in sources_of(target):
        try:
            found[path] = path.stat().st_mtime_ns
        except OSError:
            continue
    return found


def watch(target: str, judge: Callable[[], int]) -> None:
    """Judge now and after every change, until a signal ends it. Raises ValueError where there is nothing to watch."""
    if not sources_of(target):
        raise ValueError(f"--watch: no source file of {target} was found; name a .py file or a module of yours")
    while True:
        before = stamps(target)
        judge()
        print(f"watching {target}; Ctrl-C ends", file=sys.stderr, flush=True)
        try:
            while stamps(target) == before:
                time.sleep(EVERY_SECONDS)
        except Interrupted:  # between two runs, as it was said to end
            return
