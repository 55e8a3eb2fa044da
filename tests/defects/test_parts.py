"""Unchanged, the parts are a right implementation: the oracle's values and gradients on upstream's recordings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sdpo_conformance.judging.call import evaluate
from sdpo_conformance.judging.compare import compare
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.judging.profiles import PROFILES
from sdpo_conformance.protocol import Capability, Claims
from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.claas.bounds import expectations
from sdpo_conformance.specs.claas.defects.defect import ExecutableDefect, entries
from sdpo_conformance.specs.claas.defects.loss_parts import Parts
from sdpo_conformance.specs.claas.loss_case import LossCase, recorded_cases
from sdpo_conformance.specs.claas.rules.aspects import ALL
from sdpo_conformance.specs.requirement import Requirement

ENTRIES = (
    Capability.LOSS,
    Capability.FUSED,
    Capability.DIVERGENCE,
    Capability.RESPONSE_LOGPROBS,
    Capability.TEACHER_TOPK,
)
RIGHT = ExecutableDefect("right", entries(Parts(), ENTRIES))


@pytest.mark.parametrize(("case", "entry"), recorded_cases(), ids=lambda value: getattr(value, "name", ""))
def test_recorded_cases(case: LossCase, entry: dict[str, object]) -> None:
    function = getattr(RIGHT, Capability.LOSS.value)
    outcome = evaluate(function, Capability.LOSS, case)
    assert compare(case, outcome, ALL, expectations(case, Capability.LOSS)) is None


@pytest.mark.parametrize(
    "requirement", find_spec("claas").requirements().values(), ids=lambda requirement: requirement.id
)
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_requirement_holds(requirement: Requirement, entry: Capability) -> None:
    if entry not in requirement.capabilities:
        pytest.skip("not tested through this entry")
    torch.set_num_threads(1)
    profile = replace(PROFILES["quick"], visits=0, examples=6)
    Subject(RIGHT, entry, Claims(), profile, dtypes=("float32", "bfloat16", "float16")).run(requirement)
