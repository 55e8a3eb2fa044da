"""A rule of a spec as data: what it says, where it stands, which inputs try it, and what would exonerate it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.compare import GRADIENT, Disagreement, compare
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.requirement import Level, requirement

LOSS = "loss"
VALUE = (LOSS,)
ALL = (LOSS, GRADIENT)
CASES = Callable[[Any], Any]


@dataclass(frozen=True)
class Rule:
    """``corner``: the inputs; ``aspects``: what is judged on them. ``control``: the input, or inputs, with the rule
    made idle: what is wrong there too has another cause. ``together``: inputs on which a breach of the rule shows as
    well: what is right there has another cause. ``value_first``: a wrong value is another rule's finding.
    ``of_several``: a breach shows only where tokens come together; ``of_each``: it shows as much on the same tokens
    several times over. ``dtypes``: the only ones that can show it.
    ``check``: another check than comparing ``aspects``.
    """

    id: str
    level: Level
    statement: str
    source: str
    why: str
    corner: Any = None
    aspects: Sequence[str] = ALL
    control: Callable[[Any], Any] | None = None
    together: Callable[[Any], Any] | None = None
    value_first: bool = False
    of_several: bool = False
    of_each: bool = False
    dtypes: tuple[str, ...] = ()
    share: float = 1.0
    check: Callable[[Subject, Any], None] | None = None
    entries: tuple[Capability, ...] = (Capability.LOSS,)


def listed(cases: Any) -> list[Any]:
    """One case or several as a list."""
    return list(cases) if isinstance(cases, list | tuple) else [cases]


def judge(rule: Rule, subject: Subject, case: Any) -> None:
    """Compare the rule's aspects on one input; raises Disagreement."""
    try:
        subject.agrees(case, rule.aspects, control=listed(rule.control(case)) if rule.control else ())
    except Disagreement as found:
        if rule.value_first and not found.secondary:
            found.secondary = subject.wrong_on(case, VALUE)
        if rule.together and not found.secondary:
            found.secondary = not all(subject.wrong_on(one, rule.aspects) for one in listed(rule.together(case)))
        if rule.of_several and not found.secondary:
            found.secondary = any(subject.wrong_on(token, rule.aspects) for token in case.tokens_alone())
        if rule.of_each and not found.secondary:
            found.secondary = fades(subject, case, rule.aspects, found.excess)
        raise


TIMES = 8
"""How many times over a case's tokens are taken."""


def fades(subject: Subject, case: Any, aspects: Sequence[str], excess: float) -> bool:
    """Whether an error is less than half as many bounds on the same tokens TIMES over: then it is beside their count,
    not in each of them."""
    wide = case.columns([*range(case.loss_input.student_logits.shape[1])] * TIMES)
    expected = subject.expectations(wide)
    if expected is None:
        return False
    try:
        found = compare(wide, subject.evaluate(wide, gradient=GRADIENT in aspects), aspects, expected)
    except ImplementationError:
        return False
    return found is None or 2 * found.excess < excess


def run(rule: Rule, subject: Subject) -> None:
    """Run a rule on the inputs of its corner."""
    import pytest

    if rule.dtypes:
        kept = tuple(name for name in subject.dtypes if name in rule.dtypes)
        if not kept:
            pytest.skip(f"{' and '.join(rule.dtypes)} not claimed, not asked for, or refused")
        subject = subject.narrowed(kept)
    if rule.corner is None:
        assert rule.check is not None
        rule.check(subject, None)
        return

    def check(case: Any) -> None:
        if rule.check is not None:
            rule.check(subject, case)
        else:
            judge(rule, subject, case)

    subject.for_all(rule.corner, check, rule.share)


def as_test(rule: Rule) -> Callable[..., None]:
    """The rule registered, as a test that pytest collects."""

    def check(subject: Subject) -> None:
        run(rule, subject)

    name = f"test_{rule.id.lower().replace('-', '_')}"
    check.__name__ = check.__qualname__ = name
    return requirement(
        rule.id, rule.level, rule.statement, source=rule.source, why=rule.why, capabilities=rule.entries
    )(check)
