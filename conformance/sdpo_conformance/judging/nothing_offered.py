"""What a module or object has in place of an entry: the likely mistake, in words."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from sdpo_conformance.protocol import Capability

NEAR = 0.85
"""How alike two names are, by difflib, where one is a misspelling of the other."""


def likely_mistake(found: Any, target: str, entries: Sequence[str]) -> str:
    """``; its compute_spdo_loss: did you mean compute_sdpo_loss?``, or nothing. ``found`` is what ``target`` names."""
    with suppress(Exception):  # an object of theirs may do anything when it is looked at
        return next(mistakes(found, target, entries), "")
    return ""


def mistakes(found: Any, target: str, entries: Sequence[str]) -> Iterator[str]:
    """Every reading of what was found, the likeliest first."""
    if inspect.isroutine(found):
        home, _, name = target.rpartition(":")
        yield f"; {target} is a function: name {home or 'its module'} alone" + (
            "" if name in entries else f", with {name} under one of these names"
        )
        return
    names = [name for name in vars_of(found) if not name.startswith("__")]
    for entry in entries:
        if entry in names:
            kind = type(getattr(found, entry, None)).__name__
            yield f"; its {entry} is a {kind}, expected a function"
    other = [one.value for one in Capability if one.value in names and one.value not in entries]
    if other:
        yield f"; its {other[0]} is an entry of another spec: --spec, as 'sdpo-conformance list specs' names them"
    for name in names:
        if near := difflib.get_close_matches(name, entries, n=1, cutoff=NEAR):
            yield f"; its {name}: did you mean {near[0]}?"
    holders = {name: getattr(found, name, None) for name in names} if ":" not in target else {}
    for name, value in sorted(holders.items(), key=lambda item: inspect.isclass(item[1])):
        if inspect.ismodule(value):
            continue
        if held := next((entry for entry in entries if callable(getattr(value, entry, None))), ""):
            made = " (a class: name an instance of it)" if inspect.isclass(value) else ""
            yield f"; its {name} has {held}: name {target}:{name}{made}"


def vars_of(found: Any) -> list[str]:
    """The names in a module, class or instance, in the order they were written."""
    try:
        return list(vars(found))
    except TypeError:
        return []


def needs_instance(found: Any, entries: Sequence[str]) -> str:
    """The entry that a class has as a method of its instances, or nothing."""
    for entry in entries if inspect.isclass(found) else ():
        method = inspect.getattr_static(found, entry, None)
        if inspect.isfunction(method) and next(iter(inspect.signature(method).parameters), "") == "self":
            return entry
    return ""
