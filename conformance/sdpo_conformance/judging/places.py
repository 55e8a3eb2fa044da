"""Where in the user's files something stands: file and line, as an editor opens them."""

from __future__ import annotations

import inspect
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any


def place(function: Any) -> str:
    """``path/to/loss.py:12``, where the user wrote the function; empty where Python cannot tell."""
    function = inspect.unwrap(function)
    function = getattr(function, "func", function)
    kind = function if inspect.isclass(function) else type(function)
    methods = (getattr(kind, name, None) for name in ("forward", "__call__", "__init__"))
    candidates = (getattr(function, "__func__", function), *methods)
    code = next((found for one in candidates if (found := getattr(one, "__code__", None)) is not None), None)
    if code is None:
        return ""
    return f"{shown(Path(code.co_filename))}:{code.co_firstlineno}"


def innermost_of_user(trace: TracebackType | None) -> str:
    """``path/to/loss.py:12``: the innermost frame outside this package and the installed ones, or nothing."""
    package = str(Path(__file__).parents[1])
    for frame in reversed(traceback.extract_tb(trace)):
        installed = "site-packages" in frame.filename or frame.filename.startswith(("<", sys.base_prefix))
        if not installed and not frame.filename.startswith(package):
            return f"{shown(Path(frame.filename))}:{frame.lineno}"
    return ""


def shown(path: Path) -> str:
    """As seen from the current folder; a file of this package (a catalogued defect's) as it is imported."""
    for folder in (Path.cwd(), Path(__file__).parents[2]):
        if path.is_relative_to(folder):
            return str(path.relative_to(folder))
    return str(path)
