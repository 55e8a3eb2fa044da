"""Which installed package, in which version, is behind an implementation's name. Nothing is imported."""

from __future__ import annotations

import ast
import importlib.util
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

from sdpo_conformance.judging.implementation import BUNDLED

OWN = "sdpo-conformance"
ADAPTERS = "adapters."


def version_of(target: str) -> str:
    """``"trl 1.16.0"``; empty for a file, or a package that no installed distribution holds."""
    module = target.partition(":")[0]
    if target.startswith("defect:") or module in BUNDLED:
        return named_version(OWN)
    if module.endswith(".py") or "/" in module:
        return ""
    if module.startswith(ADAPTERS):
        module = peer_of(module.removeprefix(ADAPTERS))
    package = module.partition(".")[0]
    distributions = packages_distributions().get(package, [])
    return named_version(distributions[0]) if distributions else ""


def named_version(distribution: str) -> str:
    """Name and version of an installed distribution; empty where there is none."""
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return ""


def peer_of(adapter: str) -> str:
    """The module that a bundled adapter requires: the first string argument of a ``require(...)`` in it."""
    spec = importlib.util.find_spec("sdpo_implementations.adapters")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    path = folder / f"{adapter}.py"
    if not path.is_file():
        return ""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                return str(argument.value)
    return ""
