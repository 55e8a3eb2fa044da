"""What every method does alike: cleaning the input, the ratio, the anchor, the reduction."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

LOG_FLOOR = math.log(1e-8)
NOWHERE = -1e4
"""Stands for log 0."""


@dataclass(frozen=True)
class Batch:
    """The input in the working precision, masked positions blanked; ``z`` carries the graph."""

    z: Tensor
    tau: Tensor
    support: Tensor
    base: Tensor
    old: Tensor
    mask: Tensor
    y: Tensor
    alpha: float
    is_clip: float
    kl_reg_weight: float


def working(dtype: torch.dtype) -> torch.dtype:
    """float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def batch_of(loss_input: Any, dtype: torch.dtype | None = None) -> Batch:
    """``loss_input`` with its logits, or the projection of its hidden states."""
    fused = hasattr(loss_input, "student_hidden")
    given = loss_input.student_hidden if fused else loss_input.student_logits
    inside = dtype or working(given.dtype)
    mask = loss_input.response_mask.to(inside)
    counted = mask != 0

    def clean(tensor: Tensor) -> Tensor:
        where = counted if tensor.dim() == 2 else counted[..., None]
        return torch.where(where, tensor.to(inside), torch.zeros((), dtype=inside, device=tensor.device))

    z = clean(given)
    if fused:
        z = z @ loss_input.lm_head_weight.to(inside).T
    training = loss_input.training
    return Batch(
        z=z,
        tau=clean(loss_input.teacher_logprobs).detach().clamp(min=NOWHERE),
        support=loss_input.teacher_indices.long(),
        base=clean(loss_input.base_logprobs).detach(),
        old=clean(loss_input.old_student_logprobs).detach(),
        mask=mask,
        y=loss_input.response_ids.long(),
        alpha=training.alpha,
        is_clip=training.is_clip,
        kl_reg_weight=training.kl_reg_weight,
    )


def logarithm(probability: float) -> float:
    """log with log 0 = -inf."""
    return math.log(probability) if probability > 0 else -math.inf


def importance_ratio(batch: Batch, chosen: Tensor) -> Tensor:
    """r, (B, T), without graph."""
    return (chosen.detach() - batch.old).clamp(-20, 20).exp().clamp(max=batch.is_clip)


def anchor(batch: Batch, chosen: Tensor) -> Tensor:
    """k3, (B, T)."""
    drift = (chosen - batch.base).clamp(-20, 20)
    return torch.expm1(drift) - drift


def teacher_at_response(batch: Batch) -> Tensor:
    """tau_y, (B, T)."""
    match = batch.support == batch.y[..., None]
    values = (batch.tau * match).sum(-1)
    return torch.where(match.any(-1), values, torch.full_like(values, -20.0))


def surrogate(batch: Batch, chosen: Tensor) -> Tensor:
    """The objective at alpha = 1, (B, T)."""
    return (chosen.detach() - teacher_at_response(batch)) * chosen


def reduced(batch: Batch, divergence: Tensor, chosen: Tensor) -> Mapping[str, Any]:
    """The mapping of results."""
    ratio = importance_ratio(batch, chosen)
    weight = batch.mask / batch.mask.sum().clamp(min=1)
    distill_loss = (divergence * ratio * weight).sum()
    kl_reg = (anchor(batch, chosen) * weight).sum()
    return {
        "loss": distill_loss + batch.kl_reg_weight * kl_reg,
        "distill_loss": distill_loss.item(),
        "kl_reg": kl_reg.item(),
        "mean_is_ratio": (ratio * weight).sum().item(),
        "clip_fraction": ((ratio >= batch.is_clip) * weight).sum().item(),
    }


def renormalised(logprobs: Tensor) -> Tensor:
    """log of the distribution on the support, its mass floored at 1e-8."""
    return logprobs - torch.logsumexp(logprobs, -1, keepdim=True).clamp(min=LOG_FLOOR)


def jensen_shannon(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """D of two log-distributions on the support, (B, T)."""
    log_m = torch.logaddexp(log_p + logarithm(alpha), log_q + logarithm(1 - alpha))
    teacher = (log_p.exp() * (log_p - log_m)).sum(-1)
    student = (log_q.exp() * (log_q - log_m)).sum(-1)
    return alpha * teacher + (1 - alpha) * student


def at(values: Tensor, ids: Tensor) -> Tensor:
    """values (B, T, V) at ids (B, T)."""
    return values.gather(-1, ids[..., None]).squeeze(-1)


def replaced(loss_input: Any, **fields: Tensor) -> Any:
    """The input with other tensors."""
    return replace(loss_input, **fields)


LossFunction = Callable[[Any], Mapping[str, Any]]


class Computed(torch.autograd.Function):
    """A loss whose gradient to ``inputs`` was computed beside it, in the working precision: rounding it to half
    before the incoming gradient is multiplied in would flush what loss scaling is there to save."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor | None, ...], *inputs: Tensor) -> Tensor:
        ctx.gradients, ctx.dtypes = gradients, [tensor.dtype for tensor in inputs]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Any:
        pairs = zip(ctx.gradients, ctx.dtypes, strict=True)
        return None, None, *(None if g is None else (g * incoming).to(dtype) for g, dtype in pairs)
