"""The truth about a scenario in float64, at whatever adapter weights a trainer happened to have.

Each step is judged at the trainer's own weights before it, so no step inherits the rounding, or the mistakes,
of those before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.protocol import Sample, TrainingConfig
from sdpo_conformance.specs.claas.oracle.loss import LossTruth
from sdpo_conformance.specs.claas.oracle.step_loop import (
    Gradient,
    StepTruth,
    clipped,
    mean_step,
    norm,
    sample_loss,
    step_loop,
    trainable,
)
from sdpo_conformance.trainer.observation import disturbed
from sdpo_conformance.trainer.policies import (
    PreparedSample,
    prepare,
    recorded_logprobs,
    response_logits,
    student_logprobs,
)
from sdpo_conformance.trainer.scenarios import Scenario, samples_of, start_of, twin_of

Weights = Mapping[str, Tensor]


class Ground:
    """One scenario in float64: ``model`` (whose adapter is overwritten at will), ``samples``, what is
    ``prepared`` before the first step, and the behaviour log-probs of step 1, ``recorded``."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.model = twin_of(scenario.model)
        self.samples: Sequence[Sample] = samples_of(scenario)
        self.start: Weights = start_of(scenario.model)
        top_k = scenario.training.teacher_top_k
        self.adapter = trainable(self.model)
        self._placed: tuple[Weights, list[int]] = {}, []
        model = self.at(self.start)
        self.prepared: list[PreparedSample] = prepare(model, self.samples, top_k)
        self.recorded: list[Tensor] = [recorded_logprobs(model, sample) for sample in self.samples]

    def from_weights(self, weights: Weights) -> Ground:
        """This ground for a run that began at other adapter weights, as a later call on one model does."""
        other = copy(self)
        for known in ("run", "first"):
            other.__dict__.pop(known, None)
        other.start = weights
        other.recorded = [recorded_logprobs(other.at(weights), sample) for sample in other.samples]
        return other

    @cached_property
    def earlier(self) -> Any:
        """The model that the first call of all was on, where that was another one; else None."""
        scenario = self.scenario
        if scenario.history[:1] != ("another",):
            return None
        return disturbed(self.at(self.start), scenario.seed).eval()

    def at(self, weights: Weights) -> Any:
        """The model with these adapter weights."""
        with torch.no_grad():
            torch._foreach_copy_([self.adapter[name] for name in weights], list(weights.values()))
        self._placed = weights, self._versions()
        return self.model

    def standing(self) -> Weights | None:
        """The weights that ``at`` was given last, where nobody has changed the adapter since."""
        weights, versions = self._placed
        return weights if versions == self._versions() else None

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self.adapter.values()]

    def own_logprobs(self, weights: Weights) -> list[Tensor]:
        """Each sample's response log-probs (1, T) under these weights."""
        model = self.at(weights)
        return [student_logprobs(model, sample) for sample in self.samples]

    @cached_property
    def first(self) -> Moment:
        """The first step, at the weights that the run begins with."""
        return Moment(self, [self.start])

    @cached_property
    def run(self) -> tuple[list[Mapping[str, float]], Weights]:
        """The whole loop from the start: metrics per step and the final adapter."""
        truth = step_loop(self.at(self.start), self.samples, self.scenario.training)
        return truth.per_step_metrics, truth.weights


@lru_cache(maxsize=32)
def ground_of(scenario: Scenario) -> Ground:
    """The ground of a scenario, made once."""
    return Ground(scenario)


@dataclass
class Moment:
    """A step about to be taken: ``history`` holds the adapter's weights before each step up to this one,
    ``left_over`` the gradient the previous step ended with (clipped), None at the first; ``handed`` the
    gradient that the trainer handed to its optimizer, where one is to be explained."""

    ground: Ground
    history: Sequence[Weights]
    left_over: Weights | None = None
    handed: Weights | None = None
    _own: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return len(self.history)

    @property
    def training(self) -> TrainingConfig:
        return self.ground.scenario.training

    def own(self, step: int | None = None) -> list[Tensor]:
        """Each sample's log-probs under the weights before ``step``, this one by default."""
        index = (step or self.step) - 1
        if index not in self._own:
            self._own[index] = self.ground.own_logprobs(self.history[index])
        return self._own[index]

    def behaviour(self) -> list[Tensor]:
        """What the ratio of this step is taken against."""
        return self.ground.recorded if self.step == 1 else self.own()

    def outcomes(
        self,
        behaviour: Sequence[Tensor] | None = None,
        prepared: Sequence[PreparedSample] | None = None,
        training: TrainingConfig | None = None,
        read: Callable[[Any, Sequence[int], Sequence[int]], Tensor] = response_logits,
    ) -> list[tuple[LossTruth, Gradient]]:
        """Each sample's loss and gradient at this step's weights; what is not given is as the spec has it."""
        behaviour = self.behaviour() if behaviour is None else behaviour
        model = self.ground.at(self.history[-1])
        return [
            sample_loss(model, one, old, training or self.training, read)
            for one, old in zip(prepared or self.ground.prepared, behaviour, strict=True)
        ]

    @cached_property
    def truth(self) -> StepTruth:
        """The step as the spec has it, before clipping."""
        return mean_step(self.outcomes(), self.training, self.step)

    @property
    def clips(self) -> bool:
        """Whether the gradient is longer than max_grad_norm."""
        return float(norm(self.truth.gradient)) > self.training.max_grad_norm

    @cached_property
    def gradient(self) -> Gradient:
        """The gradient the optimizer must get."""
        return clipped(self.truth.gradient, self.training.max_grad_norm)


def upcast(weights: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """float64 values; what is None is left out."""
    return {name: value.to(torch.float64) for name, value in weights.items() if value is not None}


__all__ = ["Ground", "Moment", "Weights", "ground_of", "norm", "upcast"]
