"""No false alarms: a right implementation passes, whatever its method."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.judging.profiles import PROFILES
from sdpo_conformance.protocol import Capability, Claims
from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.requirement import Requirement

from .false_alarms import methods

METHODS = methods()
FEW = replace(PROFILES["quick"], visits=0, recorded=12, examples=5)
"""Of the recorded cases each requirement takes its share: together they see all."""
BROADEST = (
    *("NUM-1", "NUM-2", "NUM-3", "NUM-4", "NUM-5", "NUM-6", "NUM-7", "NUM-8"),
    *("GJS-8", "RED-5", "RED-6", "GRAD-1", "GRAD-4", "GRAD-5", "GRAD-6", "FUS-3", "FUS-6"),
)
"""Requirements that between them visit every corner; ``false_alarms`` runs all of them."""

PROJECTED = ("NUM-1", "NUM-2", "FUS-3", "FUS-6")
"""Those that a fused loss is judged by which is the loss itself, after the projection that all such share: the others
see the same code through the loss."""


def test_there_are_enough_methods() -> None:
    assert len(METHODS) >= 12


@pytest.mark.parametrize("name", METHODS)
def test_a_right_implementation_passes(name: str) -> None:
    module = importlib.import_module(f"{__package__}.{name}")
    torch.set_num_threads(1)
    claims = Claims.read(getattr(module, "SDPO_CLAIMS", None))
    for entry in (Capability.LOSS, Capability.FUSED):
        for requirement in judged_by(module, entry):
            if entry not in requirement.capabilities or requirement.id in claims.expected_failures:
                continue
            subject = Subject(module, entry, claims, FEW, dtypes=("float32", "bfloat16", "float16"))
            try:
                subject.run(requirement)
            except (Disagreement, ImplementationError) as alarm:
                pytest.fail(f"{requirement.id} on {name} through {entry.value}: {alarm}")
            except pytest.skip.Exception:
                continue


def judged_by(module: ModuleType, entry: Capability) -> list[Requirement]:
    """The requirements that an entry of an implementation is judged by; none where it is not offered."""
    loss, own = getattr(module, Capability.LOSS.value, None), getattr(module, entry.value, None)
    if own is None:
        return []
    names = PROJECTED if entry is Capability.FUSED and own is loss else BROADEST
    return [find_spec("claas").requirements()[name] for name in names]
