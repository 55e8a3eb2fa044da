"""The catalogue of known ways to get CLaaS SDPO wrong, each with an executable form. Imports no pytest."""

from __future__ import annotations

import difflib
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sdpo_conformance.specs.claas.defects.defect import Defect, ExecutableDefect, combine
from sdpo_conformance.specs.claas.defects.sources import Citation

if TYPE_CHECKING:
    from collections.abc import Mapping

FAMILIES = (
    "divergence",
    "reverse_kl",
    "importance",
    "anchor",
    "reduction",
    "plumbing",
    "numerics",
    "fused",
    "factors",
    "hidden_states",
    "trainer",
    "samples",
    "batches",
    "tokens",
    "prompts",
    "masks",
    "caches",
    "refresh",
    "precision",
    "clipping",
    "updates",
    "metrics",
)
"""The catalogue's modules, in the order of the spec."""


@cache
def catalogue() -> Mapping[str, Defect]:
    """Every defect by name, in the order of the families, with the number it has. Needs no transformers or peft."""
    from sdpo_conformance.specs.claas.defects.numbers import NUMBERS

    known = {defect.name: defect for family in FAMILIES for defect in of_family(family)}
    for name, parameter in NUMBERS.items():
        known[name] = replace(known[name], parameter=parameter)
    return MappingProxyType(known)


def of_family(family: str) -> tuple[Defect, ...]:
    """The defects of one family."""
    from importlib import import_module

    defects: tuple[Defect, ...] = import_module(f"sdpo_conformance.specs.claas.defects.wrong_{family}").DEFECTS
    return defects


class UnknownDefectError(KeyError):
    """No defect has this name; the message is one line for the user."""

    def __str__(self) -> str:
        return str(self.args[0])


def find(name: str) -> Defect:
    """A defect, or ``one+other`` for two at once, or a dialect; raises UnknownDefectError."""
    from sdpo_conformance.specs.claas.defects.dialects import DIALECTS

    known = {**catalogue(), **{dialect.name: dialect for dialect in DIALECTS}}
    if "+" in name:
        first, second = name.split("+", 1)
        return combine(find(first), find(second))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UnknownDefectError(f"no defect is called {name!r}{hint}")
    return known[name]


def load(name: str) -> Any:
    """The executable form of a defect, as ``--impl=defect:NAME`` takes it, one of those on a mesh among them; raises
    UnknownDefectError."""
    from sdpo_conformance.specs.claas.sharded.defects import sharded_catalogue

    if name in sharded_catalogue():
        return sharded_catalogue()[name].implementation()
    return find(name).implementation()


__all__ = [
    "FAMILIES",
    "Citation",
    "Defect",
    "ExecutableDefect",
    "UnknownDefectError",
    "catalogue",
    "combine",
    "find",
    "load",
    "of_family",
]
