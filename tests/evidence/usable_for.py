"""What the catalogue's losses are said to be usable for, held against the inputs that a run judges.

``python -m tests.evidence.usable_for`` runs every defect of a loss through profile quick until five examples passed on
inputs of the kind that its words name, and prints the words for which fewer did; exit status 1 where there are any.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tests.defects.usable_kinds import KINDS, Kind

from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.judging.profiles import PROFILES
from sdpo_conformance.protocol import Capability, Claims
from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.claas.defects import catalogue
from sdpo_conformance.specs.claas.defects.defect import Defect

ENOUGH = 5
ENTRIES = (Capability.LOSS, Capability.FUSED, Capability.DIVERGENCE)
DTYPES = ("float32", "bfloat16", "float16")


class ShownError(BaseException):
    """Enough examples passed."""


class CountingSubject(Subject):
    """Counts the examples of one kind on which a check passed."""

    kind: Kind
    passed: int = 0

    def _attempt(self, check: Any, case: Any) -> None:
        super()._attempt(check, case)
        if hasattr(case, "tensors") and type(self).kind(case):
            type(self).passed += 1
            if type(self).passed >= ENOUGH:
                raise ShownError


def shown(defect: Defect, entry: Capability) -> int:
    """How many examples of the kind passed, ``ENOUGH`` at most."""

    class OfOneKind(CountingSubject):
        kind = staticmethod(KINDS[defect.usable_for])

    subject = OfOneKind(defect.implementation(), entry, Claims(), PROFILES["quick"], dtypes=DTYPES)
    for requirement in find_spec("claas").requirements().values():
        if entry not in requirement.capabilities:
            continue
        try:
            subject.run(requirement)
        except ShownError:
            break
        except (Disagreement, ImplementationError, pytest.skip.Exception):
            continue
    return OfOneKind.passed


def main() -> int:
    torch.set_num_threads(1)
    judged, left = 0, 0
    for defect in catalogue().values():
        for entry in ENTRIES:
            if entry not in defect.capabilities or not defect.usable_for:
                continue
            judged += 1
            if (count := shown(defect, entry)) < ENOUGH:
                left += 1
                print(f"{defect.name} through {entry.value}: {count} on {defect.usable_for!r}", flush=True)
    print(f"{judged - left} of {judged} lines shown on inputs of their kind")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
