"""Filling in a program of ``programs``: its docstring and constants, and of its probes the one that failed."""

from __future__ import annotations

import ast
import os
import pprint
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdpo_conformance.judging.implementation import BUNDLED
from sdpo_conformance.specs.spec import Spec

BEGIN, END = "# filled in: begin\n", "# filled in: end\n"
PROGRAMS = Path(__file__).parent / "programs"
PROBE = "probe_"


def filled(name: str, docstring: str, constants: Mapping[str, Any], probe: str = "") -> str:
    """The text of ``programs/NAME.py`` with these constants in place of its own; of several functions ``probe_*`` the
    one of this probe stays and is called. Raises ValueError for a constant or probe that the program lacks."""
    text = (PROGRAMS / f"{name}.py").read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    block, _, after = rest.partition(END)
    targets = [one.target if isinstance(one, ast.AnnAssign) else one for one in ast.parse(block).body]
    known = [ast.unparse(one.targets[0] if isinstance(one, ast.Assign) else one) for one in targets]
    if sorted(known) != sorted(constants):
        raise ValueError(f"programs/{name}.py has the constants {known}, not {sorted(constants)}")
    lines = [f"{key} = {pprint.pformat(constants[key], width=116, sort_dicts=False)}\n" for key in known]
    quoted = '"""' + docstring.replace("\\", "\\\\").replace('"""', "'''").rstrip().rstrip('"') + '\n"""'
    text = f"{before}{''.join(lines)}{after}".replace('"""DOCSTRING"""', quoted, 1)
    return only_probe(text, probe) if probe else text


def only_probe(text: str, probe: str) -> str:
    """The program without its other probes, calling this one."""
    lines = text.splitlines(keepends=True)
    functions = [one for one in ast.parse(text).body if isinstance(one, ast.FunctionDef) and one.name.startswith(PROBE)]
    if PROBE + probe not in [one.name for one in functions]:
        raise ValueError(f"no probe {probe!r}")
    for one in reversed(functions):
        if one.name != PROBE + probe:
            assert one.end_lineno is not None
            del lines[one.lineno - 1 : one.end_lineno + 2]
    return re.sub(rf"^    {PROBE}\w+\(\)$", f"    {PROBE}{probe}()", "".join(lines), flags=re.MULTILINE)


def location(target: str, spec: Spec) -> dict[str, Any]:
    """How a program without this harness imports ``target``; ``search``: folders that it was found through."""
    found: dict[str, Any] = {"module": "", "file": "", "attribute": [], "defect": "", "search": []}
    if target.startswith("defect:"):
        return {**found, "module": f"{spec.package}.defects", "defect": target.removeprefix("defect:")}
    name, _, attribute = target.partition(":")
    found["attribute"] = attribute.split(".") if attribute else []
    if name.endswith(".py") or "/" in name:
        return {**found, "file": str(Path(name).resolve())}
    bundled = name in BUNDLED or name.startswith("adapters.")
    found["module"] = spec.bundled.get(name, f"sdpo_implementations.{name}" if bundled else name)
    folders = [os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    found["search"] = list(dict.fromkeys(str(Path(folder).resolve()) for folder in folders if folder in sys.path))
    return found
