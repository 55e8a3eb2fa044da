"""Value and gradient of the logits by formula, under no_grad: what a kernel does in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .shared import (
    LOG_FLOOR,
    NOWHERE,
    Batch,
    Computed,
    anchor,
    at,
    batch_of,
    importance_ratio,
    jensen_shannon,
    logarithm,
    renormalised,
    teacher_at_response,
)


def results_and_gradient(batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """Results, and the gradient of the loss with respect to z (B, T, V)."""
    l = torch.log_softmax(batch.z, -1)  # noqa: E741
    softmax = l.exp()
    chosen = at(l, batch.y)
    ratio = importance_ratio(batch, chosen)
    weight = batch.mask / batch.mask.sum().clamp(min=1)
    scale = (ratio * weight)[..., None]

    if batch.alpha >= 1:
        slope = chosen - teacher_at_response(batch)
        divergence = slope * chosen
        onto_chosen = slope * ratio * weight
        gradient = torch.zeros_like(l)
    else:
        l_k = l.gather(-1, batch.support).clamp(min=NOWHERE)
        log_p, log_q = renormalised(batch.tau), renormalised(l_k)
        divergence = jensen_shannon(log_p, log_q, batch.alpha)
        log_m = torch.logaddexp(log_p + logarithm(batch.alpha), log_q + logarithm(1 - batch.alpha))
        q = log_q.exp()
        push = (1 - batch.alpha) * q * (log_q - log_m)
        total = push.sum(-1, keepdim=True)
        floored = torch.logsumexp(l_k, -1, keepdim=True) < LOG_FLOOR
        at_support = torch.where(floored, push, push - q * total)
        gradient = torch.zeros_like(l).scatter_add(-1, batch.support, scale * at_support)
        gradient = gradient - torch.where(floored, scale * total, torch.zeros_like(total)) * softmax
        onto_chosen = torch.zeros_like(chosen)

    drift = chosen - batch.base
    k3_slope = torch.where(drift.abs() <= 20, torch.expm1(drift.clamp(-20, 20)), torch.zeros_like(drift))
    onto_chosen = onto_chosen + batch.kl_reg_weight * k3_slope * weight
    gradient = gradient - onto_chosen[..., None] * softmax
    gradient.scatter_add_(-1, batch.y[..., None], onto_chosen[..., None])

    distill_loss = (divergence * ratio * weight).sum()
    kl_reg = (anchor(batch, chosen) * weight).sum()
    results = {
        "loss": distill_loss + batch.kl_reg_weight * kl_reg,
        "distill_loss": distill_loss,
        "kl_reg": kl_reg,
        "mean_is_ratio": (ratio * weight).sum(),
        "clip_fraction": ((ratio >= batch.is_clip) * weight).sum(),
    }
    return results, gradient


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    logits = loss_input.student_logits
    with torch.no_grad():
        results, gradient = results_and_gradient(batch_of(loss_input))
    return {**results, "loss": Computed.apply(results["loss"], (gradient,), logits)}


def compute_fused_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    hidden, head = loss_input.student_hidden, loss_input.lm_head_weight
    with torch.no_grad():
        batch = batch_of(loss_input)
        results, gradient = results_and_gradient(batch)
        to_hidden = gradient @ head.to(gradient.dtype)
        to_head = None
        if head.requires_grad:
            counted = torch.where((batch.mask != 0)[..., None], hidden.to(gradient.dtype), 0.0)
            to_head = torch.einsum("btv,bth->vh", gradient, counted)
    return {**results, "loss": Computed.apply(results["loss"], (to_hidden, to_head), hidden, head)}
