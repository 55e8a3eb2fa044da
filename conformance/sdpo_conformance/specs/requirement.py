"""The requirements: a public, stable id, an RFC 2119 level, a statement and its source, kept beside the test.

``@requirement`` registers a check and turns it into a pytest test. ``docs/spec.md`` is generated from the
registry, ``explain`` prints an entry of it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

from sdpo_conformance.protocol import Capability

UPSTREAM = "claas/training/sdpo_loss.py"
UPSTREAM_TRAINER = "claas/training/distillation.py"


class Level(StrEnum):
    """RFC 2119."""

    MUST = "MUST"
    SHOULD = "SHOULD"


@dataclass(frozen=True)
class Requirement:
    """One rule of the spec. ``source`` says where the rule stands; ``why`` what goes wrong without it;
    ``capabilities`` which entries it is tested through; ``check`` the test's function."""

    id: str
    level: Level
    statement: str
    source: str
    why: str
    capabilities: tuple[Capability, ...]
    check: Callable[..., None]

    @property
    def family(self) -> str:
        return self.id.rsplit("-", 1)[0]

    @property
    def number(self) -> int:
        return int(self.id.rsplit("-", 1)[1])


_REGISTRY: dict[str, Requirement] = {}


def register(requirement: Requirement) -> None:
    """Add a requirement; a second one with its id is a programming error."""
    known = _REGISTRY.get(requirement.id)
    if known is not None and known.check.__qualname__ != requirement.check.__qualname__:
        raise ValueError(f"requirement {requirement.id} is defined twice")
    _REGISTRY[requirement.id] = requirement


def requirement(
    id: str,
    level: Level,
    statement: str,
    *,
    source: str,
    why: str,
    capabilities: tuple[Capability, ...],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register the decorated check and make it a test that pytest runs once per capability offered.

    The check takes a ``Subject`` and raises ``Disagreement`` or ``ImplementationError``.
    """

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        found = Requirement(id, level, statement, source, why, capabilities, check)
        register(found)

        def test(subject: Any) -> None:
            subject.run(found)

        test.__name__ = check.__name__
        test.__qualname__ = check.__name__
        test.__doc__ = f"{id} ({level}): {statement}"
        test.__module__ = check.__module__
        test.requirement = found  # type: ignore[attr-defined]
        return test

    return decorate


@cache
def registered(rules: str, families: tuple[str, ...]) -> Mapping[str, Requirement]:
    """Every requirement of the package ``rules``, in the order of its ``families``; imports its modules."""
    package = importlib.import_module(rules)
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("test_"):
            importlib.import_module(f"{rules}.{module.name}")
    mine = [found for found in _REGISTRY.values() if found.family in families]
    return {found.id: found for found in sorted(mine, key=lambda one: (families.index(one.family), one.number))}


def selected(ids: Mapping[str, Requirement], only: tuple[str, ...]) -> set[str]:
    """The ids that ``--only`` names: ids or families, in any case; raises ValueError for an unknown one."""
    if not only:
        return set(ids)
    found: set[str] = set()
    for name in only:
        wanted = name.strip().upper()
        matches = {id for id, entry in ids.items() if wanted in (id, entry.family)}
        if not matches:
            families = dict.fromkeys(entry.family for entry in ids.values())
            raise ValueError(
                f"no requirement or family {name!r}; families: {', '.join(families)}; ids look like {next(iter(ids))}"
            )
        found |= matches
    return found
