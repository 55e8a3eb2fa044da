"""The specs, a folder each, and finding one by name."""

from __future__ import annotations

import difflib
import importlib

from sdpo_conformance.specs.spec import Spec

FOLDERS = {
    "claas": "claas",
    "lasgroup": "lasgroup",
    "trl": "trl",
    "ms-swift": "ms_swift",
    "verl-topk": "verl_topk",
}
"""Name as ``--spec`` takes it -> folder."""

DEFAULT = "claas"


def find_spec(name: str) -> Spec:
    """The spec of that name; raises ValueError with the names there are."""
    if name not in FOLDERS:
        near = difflib.get_close_matches(name, FOLDERS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no spec {name!r}; specs: {', '.join(FOLDERS)}{hint}")
    found: Spec = importlib.import_module(f"sdpo_conformance.specs.{FOLDERS[name]}").SPEC
    return found


def specs() -> list[Spec]:
    """Every spec, in the order of ``list specs``."""
    return [find_spec(name) for name in FOLDERS]
