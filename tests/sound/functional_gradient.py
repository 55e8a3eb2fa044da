"""torch.func.grad_and_value at the logits inside, its gradient carried on by hand, through the head where there is
one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .shared import (
    NOWHERE,
    Batch,
    Computed,
    anchor,
    at,
    batch_of,
    importance_ratio,
    jensen_shannon,
    renormalised,
    surrogate,
)


def loss_of(z: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss as a function of the logits, and the metrics beside it."""
    l = torch.log_softmax(z, -1)  # noqa: E741
    chosen = at(l, batch.y)
    if batch.alpha >= 1:
        divergence = surrogate(batch, chosen)
    else:
        log_q = renormalised(l.gather(-1, batch.support).clamp(min=NOWHERE))
        divergence = jensen_shannon(renormalised(batch.tau), log_q, batch.alpha)
    ratio = importance_ratio(batch, chosen)
    weight = batch.mask / batch.mask.sum().clamp(min=1)
    metrics = {
        "distill_loss": (divergence * ratio * weight).sum(),
        "kl_reg": (anchor(batch, chosen) * weight).sum(),
        "mean_is_ratio": (ratio * weight).sum(),
        "clip_fraction": ((ratio >= batch.is_clip) * weight).sum(),
    }
    return metrics["distill_loss"] + batch.kl_reg_weight * metrics["kl_reg"], metrics


def differentiated(batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, metrics, and the gradient to the logits."""
    z = batch.z.detach()
    gradient, (loss, metrics) = torch.func.grad_and_value(loss_of, has_aux=True)(z, replace(batch, z=z))
    return loss.detach(), {key: value.detach() for key, value in metrics.items()}, gradient.detach()


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    loss, metrics, gradient = differentiated(batch_of(loss_input))
    return {**metrics, "loss": Computed.apply(loss, (gradient,), loss_input.student_logits)}


def compute_fused_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    hidden, head = loss_input.student_hidden, loss_input.lm_head_weight
    batch = batch_of(loss_input)
    loss, metrics, gradient = differentiated(batch)
    to_head = None
    if head.requires_grad:
        counted = torch.where((batch.mask != 0)[..., None], hidden.detach().to(gradient.dtype), 0.0)
        to_head = gradient.flatten(0, 1).T @ counted.flatten(0, 1)
    to_hidden = gradient @ head.detach().to(gradient.dtype)
    return {**metrics, "loss": Computed.apply(loss, (to_hidden, to_head), hidden, head)}
