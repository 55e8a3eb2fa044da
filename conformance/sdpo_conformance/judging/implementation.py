"""Finding an implementation by the name a user gives.

``pkg.module``, ``pkg.module:object``, ``path/to/file.py`` (``:object`` likewise), a bundled name
(``reference``, ``triton_fused``, ``adapters.NAME``) or ``defect:NAME``.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_conformance.judging.nothing_offered import likely_mistake, needs_instance
from sdpo_conformance.protocol import Capability, Claims
from sdpo_conformance.specs import specs
from sdpo_conformance.specs.spec import Spec

BUNDLED = ("reference", "triton_fused")


class LoadingError(Exception):
    """No implementation can be had under this name; the message is one line for the user."""


@dataclass(frozen=True)
class Implementation:
    """``target`` as the user named it; ``offered`` what conformance can call in it."""

    target: str
    object: Any
    offered: tuple[Capability, ...]
    claims: Claims


def load_implementation(target: str, spec: Spec) -> Implementation:
    """Import ``target`` and see what it offers; raises LoadingError. ``sys.exit`` at import included."""
    folder = Path.cwd()
    search_here()
    try:
        found = _find(target, spec)
    finally:
        os.chdir(folder)  # results and reproductions are written by relative paths
    judged = [capability for capability in Capability if capability.value in spec.entries]
    offered = tuple(capability for capability in judged if callable(getattr(found, capability.value, None)))
    if not offered:
        names = ", ".join(spec.entries)
        raise LoadingError(
            f"{target} offers nothing that the {spec.title} spec can call: looked for {names}"
            + (
                likely_mistake(found, target, spec.entries)
                or "; 'sdpo-conformance init' writes a ten-line adapter to start from"
            )
        )
    if method := needs_instance(found, [one.value for one in offered]):
        name = target.rpartition(":")[2]
        raise LoadingError(
            f"{target} is a class whose {method} needs an instance; make one in the module, as in "
            f"'judged = {name}(...)', and name {target.rpartition(':')[0]}:judged"
        )
    try:
        claims = Claims.read(getattr(found, "SDPO_CLAIMS", None))
    except ValueError as error:
        raise LoadingError(f"{target}: {error}") from None
    return Implementation(target, found, offered, claims)


def search_here() -> None:
    """Search the current folder first, as ``python -m`` does; but only now, for a types.py that lies there would hide
    the standard module from Python's own start."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _find(target: str, spec: Spec) -> Any:
    if not target.strip():
        raise LoadingError(
            "no implementation was named: expected a module, module:object, a .py file or a bundled name"
        )
    if target.startswith("defect:"):
        return _defect(target.removeprefix("defect:"), spec)
    name, _, attribute = _split(target)
    if name.endswith(".py") or "/" in name:
        module = _from_file(Path(name))
    else:
        bundled = name in BUNDLED or name.startswith("adapters.")
        path = spec.bundled.get(name, f"sdpo_implementations.{name}" if bundled else name)
        _refuse_another_loss(name, path, spec)
        module = _import(path, target)
    for part in attribute.split(".") if attribute else ():
        if not hasattr(module, part):
            raise LoadingError(f"{target}: {name} has no attribute {attribute!r}")
        module = getattr(module, part)
    return module


def bundled_of(spec: Spec) -> Mapping[str, str]:
    """Name -> module of what is bundled for a spec."""
    return spec.bundled or {name: f"sdpo_implementations.{name}" for name in BUNDLED}


def _refuse_another_loss(name: str, path: str, spec: Spec) -> None:
    """What is bundled for another spec would fail rule by rule at the first field that it does not know."""
    for other in specs():
        if other.name != spec.name and path in bundled_of(other).values():
            raise LoadingError(
                f"{name} computes {other.title}'s loss, not {spec.title}'s; bundled for the spec {spec.name}: "
                + ", ".join(f"{short} ({module})" for short, module in bundled_of(spec).items())
            )


def _split(target: str) -> tuple[str, str, str]:
    drive = 2 if len(target) > 2 and target[1] == ":" and target[2] in "/\\" else 0
    name, colon, attribute = target[drive:].partition(":")
    return target[:drive] + name, colon, attribute


def _defect(name: str, spec: Spec) -> Any:
    try:
        return spec.parts.defect(name)
    except KeyError as error:
        raise LoadingError(f"{error.args[0]}; 'sdpo-conformance list defects' lists the names") from None


def near_bundled(name: str) -> str:
    """``; did you mean X?`` for a bundled implementation or a file beside, or nothing."""
    known = [*BUNDLED, *(str(path) for path in Path(".").glob("*.py")), *(path.stem for path in Path(".").glob("*.py"))]
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def near_file(path: Path) -> str:
    """``; did you mean X?`` for a .py file beside the path, or nothing."""
    known = [str(one) for one in path.parent.glob("*.py")]
    near = difflib.get_close_matches(str(path), known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def in_package(path: Path) -> str:
    """How a file of a package is named instead, or nothing for any other."""
    folder, parts = path.resolve().parent, [] if path.stem == "__init__" else [path.stem]
    while (folder / "__init__.py").is_file():
        parts.append(folder.name)
        folder = folder.parent
    name = ".".join(reversed(parts))
    return f"; the file is part of a package: name the module {name}, in {folder}" if "." in name else ""


def _from_file(path: Path) -> Any:
    if not path.is_file():
        what = "is a folder, expected a .py file" if path.is_dir() else "does not exist"
        raise LoadingError(f"{path} {what}{near_file(path)} (looked in {Path.cwd()})")
    if path.suffix != ".py":
        raise LoadingError(f"{path} is not a .py file; name a module with dots, or a file ending in .py")
    unique = f"_sdpo_impl_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    with _import_errors(str(path)):
        spec.loader.exec_module(module)
    return module


def _import(name: str, target: str) -> Any:
    with _import_errors(target):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if name != missing and not name.startswith(missing + "."):
                raise
            searched = list(dict.fromkeys(entry or "." for entry in sys.path if "zip" not in entry))[:4]
            raise LoadingError(
                f"no module {missing!r} for {target!r}{near_bundled(name)}; searched {', '.join(searched)}, ...; "
                "install it, or name a .py file"
            ) from None
        except TypeError as error:
            if name.startswith("."):
                raise LoadingError(f"{target} is a relative module name; give the full dotted path") from error
            raise


class _import_errors:
    """Turns whatever a user's module raises at import into one line."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, LoadingError | KeyboardInterrupt):
            return
        if isinstance(error, ImportError) and type(error).__name__ == "NotInstalled":
            raise LoadingError(str(error)) from None
        frame = trace
        while frame.tb_next is not None:
            frame = frame.tb_next
        where = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"
        if isinstance(error, SyntaxError) and error.filename:
            where = f"{Path(error.filename).name}:{error.lineno}"
        text = " ".join(str(error).split()) or "no message"
        hint = in_package(Path(self.target)) if "attempted relative import" in text else ""
        said = f"importing {self.target} raised {type(error).__name__} at {where}: {text[:300]}{hint}"
        raise LoadingError(said) from error
