"""How far a right trainer may be from the truth, stated once, with reasons.

Truth is the float64 step at the trainer's own weights. float32: what the forward and backward of a two-layer
model lose; the reference, a fused trainer and upstream were measured at up to 1e-5 of a tensor's gradient
norm on the scenarios, the mildest mistake at 5e-2. Half precision: twice what plain PyTorch loses with the
same model in the same dtype (``eager_step``), plus a floor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.protocol import METRIC_KEYS, SDPOLossInput
from sdpo_conformance.specs.claas.oracle.eager import eager_loss
from sdpo_conformance.specs.claas.oracle.step_loop import clipped, load_weights, norm, trainable
from sdpo_conformance.specs.claas.step_loop.ground import Moment
from sdpo_conformance.trainer.models import ModelSpec, build
from sdpo_conformance.trainer.policies import chosen, response_logits

EAGER_FACTOR = 2.0
"""How much worse than plain PyTorch in half precision a trainer may be; as for the loss."""

UPDATE = 2e-3
"""Of the learning rate: what float32 moments and weights may change an AdamW update by."""


@dataclass(frozen=True)
class Precision:
    """Per gradient tensor, relative to its norm and to that of the whole gradient; per metric, relative and
    absolute.

    ``run_metrics`` and ``run_adapter``, relative, are for a trainer whose steps could not be observed: AdamW
    turns a rounding error of a small gradient into one of the size of the step, and every step inherits it.
    Measured on the reference: 1e-4 of the adapter's movement in float32, 0.16 in bfloat16.
    """

    of_tensor: float
    of_whole: float
    metric_relative: float
    metric_absolute: float
    run_metrics: float
    run_adapter: float


SINGLE = Precision(
    of_tensor=5e-4,
    of_whole=1e-5,
    metric_relative=2e-4,
    metric_absolute=1e-5,
    run_metrics=5e-3,
    run_adapter=2e-2,
)
HALF = Precision(
    of_tensor=5e-2,
    of_whole=5e-3,
    metric_relative=2e-2,
    metric_absolute=1e-2,
    run_metrics=0.1,
    run_adapter=0.5,
)
PRECISIONS: Mapping[str, Precision] = {"float32": SINGLE, "float64": SINGLE, "bfloat16": HALF}
"""By the dtype of the base model; models compute norms and rotations in float32 even in float64."""


@dataclass(frozen=True)
class Bounds:
    """What a step may be off by: the norm of the difference per tensor; per metric, the difference."""

    gradient: Mapping[str, float]
    metrics: Mapping[str, float]


def bounds_of(moment: Moment) -> Bounds:
    """The bounds of one step, around its truth."""
    spec = moment.ground.scenario.model
    precision = PRECISIONS[spec.dtype]
    whole = float(norm(moment.gradient))
    gradient = {
        name: precision.of_tensor * float(g.norm()) + precision.of_whole * whole for name, g in moment.gradient.items()
    }
    metrics = {
        key: precision.metric_relative * abs(value) + precision.metric_absolute
        for key, value in moment.truth.metrics.items()
        if key != "step"
    }
    if precision is HALF:
        eager_gradient, eager_metrics = eager_step(moment)
        for name, g in moment.gradient.items():
            gradient[name] += EAGER_FACTOR * float((eager_gradient[name] - g).norm())
        for key, value in eager_metrics.items():
            metrics[key] += EAGER_FACTOR * abs(value - moment.truth.metrics[key])
    return Bounds(gradient, metrics)


@lru_cache(maxsize=4)
def eager_model(spec: ModelSpec) -> Any:
    """The model in its own dtype."""
    return build(spec).eval()


def eager_step(moment: Moment) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The clipped gradient and the metrics that plain PyTorch gets in the model's own dtype, log-softmax and
    loss included."""
    model = eager_model(moment.ground.scenario.model)
    load_weights(model, moment.history[-1])
    gradients: list[dict[str, Tensor]] = []
    metrics: list[dict[str, float]] = []
    for index, sample in enumerate(moment.ground.samples):
        prompt, teacher_prompt, response = (
            sample.prompt_token_ids,
            sample.teacher_prompt_token_ids,
            sample.response_token_ids,
        )
        y = moment.ground.prepared[index].response_ids
        with torch.no_grad(), model.disable_adapter():
            base = chosen(response_logits(model, prompt, response), y)
            teacher = response_logits(model, teacher_prompt, response).log_softmax(-1)
        values, indices = teacher.topk(moment.ground.prepared[index].teacher_indices.shape[-1], dim=-1)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name in moment.history[-1]:
            model.get_parameter(name).requires_grad_(True)
        logits = response_logits(model, prompt, response)
        own = chosen(logits.detach(), y).float()
        loss = eager_loss(
            SDPOLossInput(
                student_logits=logits.detach(),
                teacher_logprobs=values,
                teacher_indices=indices,
                base_logprobs=base,
                response_mask=torch.ones_like(own),
                old_student_logprobs=moment.ground.recorded[index].float() if moment.step == 1 else own,
                response_ids=y,
                training=moment.training,
            )
        )
        adapter = trainable(model)
        incoming = loss.gradients["student_logits"].to(logits.dtype)
        found = torch.autograd.grad(logits, list(adapter.values()), incoming)
        gradients.append({name: g.double() for name, g in zip(adapter, found, strict=True)})
        numbers = {key: float(getattr(loss, key)) for key in METRIC_KEYS if hasattr(loss, key)}
        metrics.append({"total_loss": float(loss.loss), **numbers})
    mean = {name: torch.stack([g[name] for g in gradients]).mean(0) for name in gradients[0]}
    summary = {key: sum(one[key] for one in metrics) / len(metrics) for key in metrics[0]}
    summary["grad_norm"] = float(norm(mean))
    return clipped(mean, moment.training.max_grad_norm), summary
