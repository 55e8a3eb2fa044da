"""What a catalogued defect is: words for people, and the parts it replaces."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.defects.loss_parts import Parts, Work, enter_divergence
from sdpo_conformance.specs.claas.defects.parameter import Parameter
from sdpo_conformance.specs.claas.defects.sources import Citation

Change = Callable[[Parts], Parts]

LOSSES = (Capability.LOSS, Capability.FUSED)
NUMBER = re.compile(r"(?<!\+)-?\d+(\.\d+)?(e-?\d+)?")

DIVERGENCES = (*LOSSES, Capability.DIVERGENCE)


def replacing(**parts: Any) -> Change:
    """Put these parts in place of what was there."""

    def change(before: Parts) -> Parts:
        return replace(before, **parts)

    return change


def around(part: str, wrapper: Callable[..., Any]) -> Change:
    """Wrap one part: ``wrapper`` gets the part as it was, then the part's own arguments."""

    def change(before: Parts) -> Parts:
        return replace(before, **{part: partial(wrapper, getattr(before, part))})

    return change


def both(*changes: Change) -> Change:
    """One change after the other."""

    def change(before: Parts) -> Parts:
        for one in changes:
            before = one(before)
        return before

    return change


@dataclass(frozen=True)
class Defect:
    """One known way to get CLaaS SDPO wrong.

    ``violates``: requirement ids; the first is the one that names the defect, and has to catch it in every
    entry that it applies to. ``seen``: public issues or pull requests, empty where none was found.
    ``usable_for``: what an implementation with this defect may still be used for, empty for nothing.
    Exactly one of ``change`` (a loss, divergence, log-probs or top-k defect) and ``distill`` (a defective
    step loop) is set. ``parameter``: the number in it, where that may be another; ``value``: the number it has,
    None for the one that the sentence names. ``rounded``: a step loop that rounds sums on its way, which no two
    trainers add up alike: a gradient that comes near its own is its own.
    """

    name: str
    sentence: str
    violates: tuple[str, ...]
    fix: str
    change: Change | None = field(default=None, repr=False)
    distill: Callable[..., Any] | None = field(default=None, repr=False)
    seen: tuple[Citation, ...] = ()
    usable_for: str = ""
    capabilities: tuple[Capability, ...] = LOSSES
    parameter: Parameter | None = field(default=None, repr=False)
    value: float | None = None
    rounded: bool = False

    def at(self, value: float) -> Defect:
        """The same defect with another number in it."""
        assert self.parameter is not None
        made = self.parameter.make(value)
        stated = self.parameter.stated
        sentence = self.sentence.replace(stated, NUMBER.sub(f"{value:.5g}", stated))
        numbered = replace(self, sentence=sentence, usable_for=self.usable_at(value), value=value)
        if self.change is None:
            from sdpo_conformance.specs.claas.defects.step_loop_variants import distill

            return replace(numbered, distill=partial(distill, made))
        return replace(numbered, change=made)

    def usable_at(self, value: float) -> str:
        """What the defect is usable for with another number; nothing where the words name the one that it no longer
        has."""
        assert self.parameter is not None
        stated = NUMBER.search(self.parameter.stated)
        number = abs(float(stated[0])) if stated else math.nan
        named = any(abs(float(one[0])) == number for one in NUMBER.finditer(self.usable_for))
        return "" if named and not math.isclose(abs(value), number, rel_tol=1e-3) else self.usable_for

    @property
    def shown(self) -> str:
        """The name, with the number where it was fitted."""
        if self.parameter is None or self.value is None:
            return self.name
        return f"{self.name} ({self.parameter.words} {self.value:.5g})"

    @property
    def touched(self) -> frozenset[str]:
        """The parts that the change replaces."""
        if self.change is None:
            return frozenset({"distill"})
        right, wrong = Parts(), self.change(Parts())
        return frozenset(
            part.name for part in fields(Parts) if getattr(right, part.name) is not getattr(wrong, part.name)
        )

    def implementation(self) -> ExecutableDefect:
        """The executable form: an object with the attributes of ``capabilities``."""
        if self.change is None:
            assert self.distill is not None
            return ExecutableDefect(self.name, {Capability.DISTILL.value: self.distill})
        return ExecutableDefect(self.name, entries(self.change(Parts()), self.capabilities))


class ExecutableDefect:
    """An implementation that offers exactly the given callables."""

    def __init__(self, name: str, offered: dict[str, Callable[..., Any]]) -> None:
        self.__name__ = name
        vars(self).update(offered)

    def __repr__(self) -> str:
        return f"<{self.__name__}: {', '.join(key for key in vars(self) if not key.startswith('_'))}>"


def entries(parts: Parts, capabilities: tuple[Capability, ...]) -> dict[str, Callable[..., Any]]:
    """The protocol's callables made of these parts."""
    known: dict[Capability, Callable[..., Any]] = {
        Capability.LOSS: partial(parts.entry, parts),
        Capability.FUSED: partial(parts.entry, parts),
        Capability.DIVERGENCE: partial(enter_divergence, parts),
        Capability.RESPONSE_LOGPROBS: parts.response_logprobs,
        Capability.TEACHER_TOPK: parts.teacher_topk,
    }
    return {capability.value: known[capability] for capability in capabilities}


def combine(first: Defect, second: Defect) -> Defect:
    """Both at once; raises ValueError where they are not independent (the same part, or no entry in common)."""
    if first.change is None or second.change is None:
        raise ValueError(f"{first.name} and {second.name}: step loops do not combine")
    if shared := first.touched & second.touched:
        raise ValueError(f"{first.name} and {second.name} both change {', '.join(sorted(shared))}")
    capabilities = tuple(c for c in first.capabilities if c in second.capabilities)
    if not capabilities:
        raise ValueError(f"{first.name} and {second.name} have no entry in common")
    return Defect(
        name=f"{first.name}+{second.name}",
        sentence=f"{first.sentence} {second.sentence}",
        violates=(*first.violates, *(i for i in second.violates if i not in first.violates)),
        fix=f"{first.fix} {second.fix}",
        change=both(first.change, second.change),
        seen=(*first.seen, *second.seen),
        usable_for="",
        capabilities=capabilities,
    )


__all__ = [
    "DIVERGENCES",
    "LOSSES",
    "Change",
    "Defect",
    "ExecutableDefect",
    "Work",
    "around",
    "both",
    "combine",
    "replacing",
]
