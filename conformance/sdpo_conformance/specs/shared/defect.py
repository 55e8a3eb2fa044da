"""A known way to get a spec's loss wrong: words for people, and the stages it replaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from sdpo_conformance.specs.shared.pipeline import Change, Pipeline, both
from sdpo_conformance.specs.shared.wrong_teachers import TeacherDefect


@dataclass(frozen=True)
class Parameter:
    """A number that a defect comes with: its ``name`` in the words of the answer, the range [``low``, ``high``] in
    which it is looked for, and ``values`` that are tried first."""

    name: str
    low: float
    high: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class SpecDefect:
    """``name``, ``sentence`` and ``fix`` are for people. ``violates``: requirement ids, the first of which names the
    defect. ``pipeline``: the right loss; ``change``: what is wrong with it. ``parameter``, ``with_value``: the number
    that it comes with, and the change for another one. ``dialect``: whose algorithm this is, "" for nobody's.
    ``usable_for``: what it may still be used for."""

    name: str
    sentence: str
    violates: tuple[str, ...]
    fix: str
    pipeline: Pipeline = field(repr=False)
    change: Change = field(repr=False)
    parameter: Parameter | None = None
    with_value: Callable[[float], Change] | None = field(default=None, repr=False)
    dialect: str = ""
    usable_for: str = ""

    @property
    def wrong(self) -> Pipeline:
        """The executable form."""
        return self.change(self.pipeline)

    @property
    def touched(self) -> frozenset[str]:
        """The stages that the change replaces."""
        return self.pipeline.touched(self.wrong)

    def at(self, value: float) -> SpecDefect:
        """The same defect with another number."""
        assert self.with_value is not None
        return replace(self, change=self.with_value(value))


@dataclass(frozen=True)
class Maker:
    """Makes a spec's entries: ``name`` goes before theirs, ``prefix`` before their ids, ``words`` into
    the sentences."""

    name: str
    prefix: str
    pipeline: Pipeline
    words: Mapping[str, str]

    def __call__(
        self, name: str, sentence: str, violates: str, fix: str, change: Change | None = None, **more: Any
    ) -> SpecDefect:
        """One entry; ``violates`` is one id without the prefix, or several with blanks between."""
        if change is not None:
            more["change"] = change
        usable = more.pop("usable_for", "").format_map(self.words)
        return SpecDefect(
            name=f"{self.name}-{name}",
            sentence=sentence.format_map(self.words),
            violates=tuple(f"{self.prefix}-{one}" for one in violates.split()),
            fix=fix.format_map(self.words),
            pipeline=self.pipeline,
            usable_for=usable,
            **more,
        )


def combine(first: SpecDefect, second: SpecDefect) -> SpecDefect:
    """Both at once; raises ValueError where they change the same stage."""
    if shared := first.touched & second.touched:
        raise ValueError(f"{first.name} and {second.name} both change {', '.join(sorted(shared))}")
    return replace(
        first,
        name=f"{first.name}+{second.name}",
        sentence=f"{first.sentence} {second.sentence}",
        violates=tuple(dict.fromkeys((*first.violates, *second.violates))),
        fix=f"{first.fix} {second.fix}",
        change=both(first.change, second.change),
        parameter=None,
        with_value=None,
        usable_for="",
    )


def named(change_of: Callable[[float], Change], parameter: Parameter) -> dict[str, Any]:
    """The three arguments of a defect with a number."""
    return {"change": change_of(parameter.values[0]), "parameter": parameter, "with_value": change_of}


def executable(
    name: str,
    catalogue: Mapping[str, SpecDefect],
    dialects: Sequence[SpecDefect],
    teachers: Sequence[TeacherDefect] = (),
) -> Any:
    """An implementation that has this defect, or both of ``one+other``; raises KeyError."""
    for one in teachers:
        if one.name == name:
            return one.implementation()
    known = {**catalogue, **{one.name: one for one in dialects}}
    first, _, second = name.partition("+")
    found = combine(known[first], known[second]) if second else known[first]
    return SimpleNamespace(__name__=found.name, compute_sdpo_loss=found.wrong)
