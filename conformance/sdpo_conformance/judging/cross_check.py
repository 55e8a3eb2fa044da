"""Whether a suspect breaks a rule that the implementation held: then it is not what went wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import pytest

from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.judging.likeness import Input, coarsest, roundoff
from sdpo_conformance.judging.profiles import PROFILES
from sdpo_conformance.protocol import Capability, Claims
from sdpo_conformance.specs.requirement import Level
from sdpo_conformance.specs.spec import Spec

Suspect = TypeVar("Suspect")

SURE = 4
"""Failures from which on a name that explains them all, alone, is not cross-checked."""

SECONDS = 1.5
"""Time for one suspect. A suspect that breaks a rule mostly does so at one of the first cases."""


def judged_in(cases: Sequence[Input]) -> str:
    """The dtype to ask in: half precision where only that failed, for a path of its own may be at fault."""
    finest = min((coarsest(case) for case in cases), key=roundoff)
    return str(finest).removeprefix("torch.")


def breaks_what_held(
    suspect: Any, first: Sequence[str], entry: Capability, spec: Spec, held: Collection[str], dtype: str
) -> str | None:
    """The first MUST of ``held`` that the suspect breaks on the recorded cases and at the corners; None if there is
    none, or none in time. ``first``: the rules that it is known to break, asked before the others, and after them those
    of their families."""
    rules = spec.requirements()
    families = {rule.rpartition("-")[0] for rule in first}
    order = sorted(
        (one for one in held if one in rules and rules[one].level is Level.MUST and entry in rules[one].capabilities),
        key=lambda one: (one not in first, one.rpartition("-")[0] not in families),
    )
    end = time.monotonic() + SECONDS
    for rule in order:
        if time.monotonic() > end:
            break
        try:
            Subject(suspect, entry, Claims(), PROFILES["check"], dtypes=(dtype,), spec=spec).run(rules[rule])
        except (Disagreement, ImplementationError):
            return rule
        except pytest.skip.Exception:  # a rule that this dtype has no part in
            continue
    return None


def left_standing(suspects: Sequence[Suspect], stands: Callable[[Suspect], bool], many: bool) -> list[Suspect]:
    """The suspects that break nothing that held. Where none is left: all of them if ``many`` failures speak for them,
    for what went wrong may be a milder form; else none."""
    return [one for one in suspects if stands(one)] or (list(suspects) if many else [])
