"""The step loop: ``steps_per_batch`` optimizer steps on one batch, the behaviour log-probs refreshed between.

    behaviour = what the sampler recorded
    for each step:
        loss = mean over samples of the sample's loss (B = 1), the ratio taken against behaviour
        g = d loss / d adapter;   g <- g * min(1, max_grad_norm / (|g| + 1e-6));   AdamW;   g forgotten
        behaviour = log-probs of the response under the updated adapter

Give it a float64 model: ``float64_copy``. Source: claas/training/distillation.py,
DistillationTrainer.distill, kfallah/CLaaS at e2331f7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.protocol import Sample, SDPOLossInput, TrainingConfig
from sdpo_conformance.specs.claas.oracle.loss import LossTruth, sdpo_loss
from sdpo_conformance.trainer.policies import (
    PreparedSample,
    prepare,
    recorded_logprobs,
    response_logits,
    student_logprobs,
)

BETAS = (0.9, 0.999)
WEIGHT_DECAY = 0.01
EPSILON = 1e-8
"""AdamW's settings; epsilon is torch's default. Only the learning rate comes from the config."""

CLIP_EPSILON = 1e-6
"""What torch.nn.utils.clip_grad_norm_ adds to the norm it divides by."""

Gradient = dict[str, Tensor]
"""Trainable parameter name -> tensor of the parameter's shape."""


@dataclass(frozen=True)
class StepTruth:
    """One step before its update: the ``metrics`` (keys of ``StepMetrics``), the ``gradient`` before clipping,
    each sample's loss."""

    metrics: Mapping[str, float]
    gradient: Gradient
    losses: tuple[LossTruth, ...]


@dataclass(frozen=True)
class StepLoopTruth:
    """A whole run: each step, and the adapter's ``weights`` after the last."""

    steps: tuple[StepTruth, ...]
    weights: Gradient

    @property
    def per_step_metrics(self) -> list[Mapping[str, float]]:
        return [step.metrics for step in self.steps]


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """The adapter: every parameter that takes a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def norm(gradient: Mapping[str, Tensor]) -> Tensor:
    """The Euclidean norm over all parameters at once, 0-dim."""
    return torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt()


def clipped(gradient: Gradient, max_grad_norm: float) -> Gradient:
    """clip_grad_norm_: scaled down to the norm, never up."""
    factor = (max_grad_norm / (norm(gradient) + CLIP_EPSILON)).clamp(max=1.0)
    return {name: g * factor for name, g in gradient.items()}


def sample_loss(
    model: Any,
    prepared: PreparedSample,
    behaviour: Tensor,
    training: TrainingConfig,
    read: Callable[[Any, Sequence[int], Sequence[int]], Tensor] = response_logits,
) -> tuple[LossTruth, Gradient]:
    """One sample's loss and its gradient with respect to the adapter. ``behaviour`` (1, T). ``read`` gives the
    student's logits otherwise, for what is not the spec."""
    adapter = trainable(model)
    with torch.enable_grad():
        logits = read(model, prepared.sample.prompt_token_ids, prepared.sample.response_token_ids)
    truth = sdpo_loss(
        SDPOLossInput(
            student_logits=logits,
            teacher_logprobs=prepared.teacher_logprobs,
            teacher_indices=prepared.teacher_indices,
            base_logprobs=prepared.base_logprobs,
            response_mask=torch.ones_like(behaviour),
            old_student_logprobs=behaviour,
            response_ids=prepared.response_ids,
            training=training,
        )
    )
    gradients = torch.autograd.grad(
        logits,
        list(adapter.values()),
        grad_outputs=truth.grad_logits,
        allow_unused=True,
        materialize_grads=True,
    )
    return truth, dict(zip(adapter, gradients, strict=True))


def step_truth(
    model: Any,
    prepared: Sequence[PreparedSample],
    behaviour: Sequence[Tensor],
    training: TrainingConfig,
    step: int = 1,
) -> StepTruth:
    """One step at the model's present weights."""
    outcomes = [sample_loss(model, one, old, training) for one, old in zip(prepared, behaviour, strict=True)]
    return mean_step(outcomes, training, step)


def mean_step(
    outcomes: Sequence[tuple[LossTruth, Gradient]],
    training: TrainingConfig,
    step: int,
    shares: Sequence[float] | None = None,
) -> StepTruth:
    """The mean over samples of their losses, gradients and metrics: a mean of per-sample token means.
    ``shares`` weighs the samples otherwise, for what is not the spec."""
    shares = shares or [1 / len(outcomes)] * len(outcomes)
    losses = tuple(loss for loss, _ in outcomes)

    def mean(key: str) -> float:
        return sum(share * float(getattr(loss, key)) for share, loss in zip(shares, losses, strict=True))

    gradient = {
        name: torch.stack([share * g[name] for share, (_, g) in zip(shares, outcomes, strict=True)]).sum(0)
        for name in outcomes[0][1]
    }
    distill_loss, kl_reg = mean("distill_loss"), mean("kl_reg")
    metrics = {
        "step": float(step),
        "total_loss": distill_loss + training.kl_reg_weight * kl_reg,
        "distill_loss": distill_loss,
        "kl_reg": kl_reg,
        "mean_is_ratio": mean("mean_is_ratio"),
        "clip_fraction": mean("clip_fraction"),
        "grad_norm": float(norm(gradient)),
    }
    return StepTruth(metrics=metrics, gradient=gradient, losses=losses)


@dataclass
class AdamW:
    """Decoupled weight decay, then Adam with bias correction (Loshchilov and Hutter), as torch does it."""

    learning_rate: float
    count: int = 0
    first: Gradient = field(default_factory=dict)
    second: Gradient = field(default_factory=dict)

    def updated(self, weights: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> Gradient:
        """The weights after one step; remembers the moments."""
        self.count += 1
        after: Gradient = {}
        for name, g in gradient.items():
            zero = torch.zeros_like(g)
            m = self.first[name] = BETAS[0] * self.first.get(name, zero) + (1 - BETAS[0]) * g
            v = self.second[name] = BETAS[1] * self.second.get(name, zero) + (1 - BETAS[1]) * g.square()
            m_hat = m / (1 - BETAS[0] ** self.count)
            v_hat = v / (1 - BETAS[1] ** self.count)
            decayed = weights[name] * (1 - self.learning_rate * WEIGHT_DECAY)
            after[name] = decayed - self.learning_rate * m_hat / (v_hat.sqrt() + EPSILON)
        return after


@torch.no_grad()
def load_weights(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Copy these weights into the model's parameters of those names."""
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)


def step_loop(model: Any, samples: Sequence[Sample], training: TrainingConfig) -> StepLoopTruth:
    """Run the loop on a float64 model, whose adapter it updates in place."""
    prepared = prepare(model, samples, training.teacher_top_k)
    behaviour = [recorded_logprobs(model, sample) for sample in samples]
    optimizer = AdamW(training.learning_rate)
    steps: list[StepTruth] = []
    for step in range(1, training.steps_per_batch + 1):
        truth = step_truth(model, prepared, behaviour, training, step)
        steps.append(truth)
        before = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
        load_weights(model, optimizer.updated(before, clipped(truth.gradient, training.max_grad_norm)))
        behaviour = [student_logprobs(model, sample) for sample in samples]
    weights = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    return StepLoopTruth(steps=tuple(steps), weights=weights)
