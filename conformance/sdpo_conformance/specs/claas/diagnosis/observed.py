"""What is known of one failure: the input, and what the implementation made of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sdpo_conformance.inputs.heads import HeadCase
from sdpo_conformance.judging.call import ImplementationError, Outcome, evaluate
from sdpo_conformance.judging.likeness import roundoff
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.bounds import Expectation, Expectations, expectations
from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.loss_case import LossCase

if TYPE_CHECKING:
    from sdpo_conformance.specs.claas.diagnosis.prediction import Fit

GRADIENT = "gradient."

FitKey = tuple[str, float | None, bool]
"""A defect's name and number, and whether it was predicted in the input's own dtypes."""


@dataclass(frozen=True, eq=False)
class Observed(ABC):
    """``values`` by result key, and ``gradient.<field>`` for gradients, float64; empty where the call raised or
    the check looked at something else. ``probe``: the kind of check; ``got``: its finding in words;
    ``secondary``: the rule that failed plays no part in it; ``fits``: what is known of defects on it."""

    requirement: str
    entry: Capability
    case: LossCase | HeadCase
    values: Mapping[str, Tensor]
    probe: str = "values"
    aspect: str = ""
    got: str = ""
    secondary: bool = False
    fits: dict[FitKey, Fit] = field(default_factory=dict, repr=False)

    @property
    @abstractmethod
    def truth(self) -> Expectations:
        """The oracle's values and bounds."""

    @abstractmethod
    def predicted(self, defect: Defect, native: bool, gradient: bool) -> Mapping[str, Tensor]:
        """What a defect returns on the input, in the form of ``values``: on the same numbers in float64, or, with
        ``native``, in the input's own dtypes. Raises ImplementationError where it returns nothing."""

    @property
    @abstractmethod
    def numeric(self) -> bool:
        """Whether the failure is one plain call that returned other numbers."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How much work a prediction is."""

    @property
    def roundoff(self) -> float:
        """Of the dtype that rounds most, of those that the input comes in."""
        return max(roundoff(one.dtype) for one in self.case.tensors().values() if one.is_floating_point())

    @cached_property
    def wrong(self) -> Mapping[str, Tensor]:
        """Those of the values that are beyond their bound."""
        known = {name: expectation_of(self.truth, name) for name in self.values}
        return {
            name: got
            for name, got in self.values.items()
            if (truth := known[name]) is not None
            and (got.shape != truth.value.shape or bool((truth.excess(got) > 1).any()))
        }

    @cached_property
    def input(self) -> tuple[object, ...]:
        """What tells the input from others: its options, and of each tensor the sum."""
        sums = (float(one.double().nan_to_num().sum()) for one in self.case.tensors().values())
        return (str(getattr(self.case, "training", "")), *sums)

    @cached_property
    def not_finite(self) -> bool:
        """Whether something observed is NaN or infinite."""
        return not all(bool(torch.isfinite(value).all()) for value in self.values.values())


@dataclass(frozen=True, eq=False)
class ObservedLoss(Observed):
    """A failure of a loss or a divergence."""

    case: LossCase

    @classmethod
    def load(cls, path: Path, requirement: str, entry: Capability, failure: Mapping[str, object]) -> ObservedLoss:
        """Read what a run left of a failure."""
        return cls(requirement, entry, LossCase.load(path), got_in(path), **words_of(failure))

    @cached_property
    def truth(self) -> Expectations:
        return expectations(self.case, self.entry)

    @cached_property
    def exact(self) -> LossCase:
        """The same numbers in float64."""
        floats = {
            key: value.double()
            for key, value in self.case.tensors().items()
            if value.is_floating_point() and key != "response_mask"
        }
        return replace(self.case.with_fields(**floats), name=self.case.name)

    def predicted(self, defect: Defect, native: bool, gradient: bool) -> Mapping[str, Tensor]:
        function = offered(defect, self.entry)
        return values_of(evaluate(function, self.entry, self.case if native else self.exact, gradient=gradient))

    @property
    def numeric(self) -> bool:
        return self.probe == "values" and bool(self.values)

    @property
    def size(self) -> int:
        return self.case.truth.logits.numel()


def got_in(path: Path) -> dict[str, Tensor]:
    """What a run kept of what came back, float64."""
    kept = load_file(path).items()
    return {name.removeprefix("got."): tensor.double() for name, tensor in kept if name.startswith("got.")}


def words_of(failure: Mapping[str, object]) -> dict[str, Any]:
    """What a record says about the failing check."""
    return {
        "probe": str(failure.get("probe", "values")),
        "aspect": str(failure.get("aspect", "")),
        "got": str(failure.get("got", "")),
        "secondary": bool(failure.get("secondary", False)),
    }


def offered(defect: Defect, entry: Capability) -> Callable[..., Any]:
    """The defect's attribute for the entry; raises ImplementationError where it has none."""
    function = getattr(defect.implementation(), entry.value, None)
    if function is None:
        raise ImplementationError(f"{defect.name} has no {entry.value}")
    found: Callable[..., Any] = function
    return found


def values_of(outcome: Outcome) -> dict[str, Tensor]:
    """An outcome in the form of ``Observed.values``."""
    found: dict[str, Tensor] = {}
    for key, value in outcome.result.items():
        if value is not None and not isinstance(value, str | bytes):
            found[key] = outcome.number(key)
    for key, gradient in outcome.gradients.items():
        if gradient is not None:
            found[GRADIENT + key] = gradient
    return found


def expectation_of(expected: Expectations, name: str) -> Expectation | None:
    """The oracle's value under a name of ``Observed.values``."""
    if name.startswith(GRADIENT):
        return expected.gradients.get(name.removeprefix(GRADIENT))
    return expected.results.get(name)
