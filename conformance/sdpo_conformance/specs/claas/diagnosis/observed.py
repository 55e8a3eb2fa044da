"""What is known of one failure: the input, and what the implementation made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from sdpo_conformance.judging.call import Outcome
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.bounds import Expectation, Expectations, expectations
from sdpo_conformance.specs.claas.loss_case import LossCase

if TYPE_CHECKING:
    from sdpo_conformance.specs.claas.diagnosis.prediction import Fit

GRADIENT = "gradient."

FitKey = tuple[str, float | None, bool]
"""A defect's name and number, and whether it was predicted in the input's own dtypes."""


@dataclass(frozen=True, eq=False)
class Observed:
    """``values`` by result key, and ``gradient.<field>`` for gradients, float64; empty where the call raised or
    the check looked at something else. ``probe``: the kind of check; ``got``: its finding in words;
    ``secondary``: the rule that failed plays no part in it; ``fits``: what is known of defects on it."""

    requirement: str
    entry: Capability
    case: LossCase
    values: Mapping[str, Tensor]
    probe: str = "values"
    aspect: str = ""
    got: str = ""
    secondary: bool = False
    fits: dict[FitKey, Fit] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, path: Path, requirement: str, entry: Capability, failure: Mapping[str, object]) -> Observed:
        """Read what a run left of a failure."""
        values = {
            name.removeprefix("got."): tensor.double()
            for name, tensor in load_file(path).items()
            if name.startswith("got.")
        }
        return cls(
            requirement,
            entry,
            LossCase.load(path),
            values,
            probe=str(failure.get("probe", "values")),
            aspect=str(failure.get("aspect", "")),
            got=str(failure.get("got", "")),
            secondary=bool(failure.get("secondary", False)),
        )

    @cached_property
    def truth(self) -> Expectations:
        """The oracle's values and bounds."""
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

    @cached_property
    def not_finite(self) -> bool:
        """Whether something observed is NaN or infinite."""
        return not all(bool(torch.isfinite(value).all()) for value in self.values.values())

    @property
    def numeric(self) -> bool:
        """Whether the failure is one plain call that returned other numbers."""
        return self.probe == "values" and bool(self.values)


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
