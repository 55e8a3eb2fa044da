"""What a run asks of the CLaaS spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdpo_conformance.specs.claas.bounds import expectations
from sdpo_conformance.specs.claas.corners import visits
from sdpo_conformance.specs.claas.inputs.losses import build_case, loss_cases
from sdpo_conformance.specs.claas.inputs.recorded import recorded_within
from sdpo_conformance.specs.claas.loss_case import LossCase, ordinary_case
from sdpo_conformance.specs.claas.words import describe, intermediates
from sdpo_conformance.specs.spec import OnRanks, Parts, Timed


def defect(name: str) -> Any:
    """The executable form of a catalogued defect; raises KeyError."""
    from sdpo_conformance.specs.claas import defects

    return defects.load(name)


def diagnose(folder: Path, failed: Sequence[Any], offered: Sequence[Any]) -> Mapping[str, Any] | None:
    """What the failures of a run point to; where none returned a value, at most that the input is another spec's."""
    from sdpo_conformance.specs.claas import SPEC
    from sdpo_conformance.specs.claas.diagnosis import diagnose_run
    from sdpo_conformance.specs.shared.diagnosing import asks_for_another_spec

    if hint := asks_for_another_spec(failed, SPEC):
        return {"lines": [hint], "usable_for": "", "matches": []}
    if all(record.failure.get("kind") == "error" for record in failed):
        return None
    return diagnose_run(folder, failed, offered)


def asked_next(folder: Path, failed: Any) -> Sequence[str]:
    """The requirements that may name the cause of a first failure better than its own."""
    from sdpo_conformance.specs.claas import diagnosis

    return diagnosis.asked_next(folder, failed)


def on_ranks() -> OnRanks:
    """What a run on a mesh asks."""
    from sdpo_conformance.specs.claas.sharded.on_ranks import ON_RANKS

    return ON_RANKS


def timed() -> Timed:
    """What the bench asks."""
    from sdpo_conformance.specs.claas.timed import TIMED

    return TIMED


PARTS = Parts(
    visits=visits,
    build=build_case,
    strategy=loss_cases,
    recorded=recorded_within,
    expectations=expectations,
    load=LossCase.load,
    describe=describe,
    ordinary=ordinary_case,
    defect=defect,
    diagnose=diagnose,
    asked_next=asked_next,
    on_ranks=on_ranks,
    timed=timed,
    intermediates=intermediates,
)
