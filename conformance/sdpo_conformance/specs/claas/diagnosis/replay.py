"""Failures that are no numbers (a missing key, a modified input, an exception): the requirement's own check, run
on the failing input with the defect in the implementation's place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sdpo_conformance.inputs.heads import HeadCase
from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.judging.findings_alike import alike, place
from sdpo_conformance.judging.profiles import PROFILES
from sdpo_conformance.protocol import Claims
from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.claas.corners import Corner
from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.diagnosis.observed import Observed
from sdpo_conformance.specs.claas.diagnosis.prediction import NO_FIT, Fit
from sdpo_conformance.specs.claas.loss_case import LossCase


@dataclass
class Replay(Subject):
    """A subject whose every check sees one given input."""

    only: LossCase | HeadCase | None = None

    def for_all(
        self,
        corner: Corner,
        check: Callable[[LossCase], object],
        share: float = 1.0,
        shape_of: Any = None,
    ) -> None:
        """The one input, whatever the corner."""
        del corner, share, shape_of
        self.given(None, check)

    def given(self, strategy: Any, check: Callable[[Any], object], share: float = 1.0) -> None:
        """The one input, whatever the strategy."""
        del strategy, share
        assert self.only is not None
        check(self.only)

    def each(self, cases: Iterable[Any], check: Callable[[Any], object]) -> None:
        """The one input, whatever the cases."""
        del cases
        self.given(None, check)


def replayed(defect: Defect, observed: Observed) -> Fit:
    """Whether the defect fails the same check in the same way."""
    requirement = find_spec("claas").requirements().get(observed.requirement)
    if requirement is None or observed.entry not in defect.capabilities:
        return NO_FIT
    dtypes = tuple(
        dict.fromkeys(
            str(tensor.dtype).removeprefix("torch.")
            for tensor in observed.case.tensors().values()
            if tensor.is_floating_point()
        )
    )
    subject = Replay(
        defect.implementation(),
        observed.entry,
        Claims(),
        PROFILES["quick"],
        dtypes=dtypes,
        only=observed.case,
    )
    try:
        requirement.check(subject)
    except Disagreement as found:
        same = (
            found.probe == observed.probe
            and place(found.aspect) == place(observed.aspect)
            and alike(found.got, observed.got)
        )
    except ImplementationError as found:
        same = observed.probe == "raises" and kind(found.summary) == kind(observed.got)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return NO_FIT
    else:
        return NO_FIT
    return Fit(True, 0.0, frozenset({observed.aspect})) if same else NO_FIT


def kind(summary: str) -> str:
    """What an exception's line says before its message."""
    return summary.partition(":")[0]
