"""The CLaaS SDPO loss in plain PyTorch, written to be read beside the formulas.

Computes in float32 (float64 for float64 inputs) whatever the inputs are, in log space, so that it is finite
wherever the limit is. Source of every rule: claas/training/sdpo_loss.py of kfallah/CLaaS at e2331f7.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MASS_FLOOR = 1e-8
LOG_RATIO_CLAMP = 20.0
OUTSIDE_SUPPORT_LOGPROB = -20.0
LOWEST_LOGPROB = -1e4
"""Stands in for log 0: its exp is 0 in every dtype, and 0 times it is 0 where 0 times -inf would be NaN."""


def working_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def renormalised(logprobs: Tensor) -> Tensor:
    """log of exp(x) / max(sum exp(x), 1e-8) along the last dimension."""
    logprobs = logprobs.clamp(min=LOWEST_LOGPROB)
    log_mass = logprobs.logsumexp(-1, keepdim=True).clamp(min=math.log(MASS_FLOOR))
    return logprobs - log_mass


def divergence_over_support(student_logprobs: Tensor, teacher_logprobs: Tensor, alpha: float) -> Tensor:
    """Generalised Jensen-Shannon divergence (B, T) of log-probs (B, T, K), 0 <= alpha < 1."""
    log_q, log_p = renormalised(student_logprobs), renormalised(teacher_logprobs)
    log_m = torch.logaddexp(log_q + math.log1p(-alpha), log_p + math.log(alpha)) if alpha > 0 else log_q
    teacher_to_mixture = (log_p.exp() * (log_p - log_m)).sum(-1)
    student_to_mixture = (log_q.exp() * (log_q - log_m)).sum(-1)
    return alpha * teacher_to_mixture + (1 - alpha) * student_to_mixture


def reverse_kl_surrogate(
    chosen: Tensor, teacher_logprobs: Tensor, teacher_indices: Tensor, response_ids: Tensor
) -> Tensor:
    """sg(l[y] - tau_y) * l[y], (B, T)."""
    match = teacher_indices == response_ids.unsqueeze(-1)
    found = teacher_logprobs.masked_fill(~match, 0.0).sum(-1)
    teacher_chosen = torch.where(match.any(-1), found, OUTSIDE_SUPPORT_LOGPROB)
    return (chosen - teacher_chosen).detach() * chosen


def importance_ratio(chosen: Tensor, old_student_logprobs: Tensor, is_clip: float) -> Tensor:
    """min(exp(clamp(sg(l[y] - old), -20, 20)), is_clip), (B, T), without graph."""
    log_ratio = (chosen - old_student_logprobs).detach().clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    return log_ratio.exp().clamp(max=is_clip)


def k3_anchor(chosen: Tensor, base_logprobs: Tensor) -> Tensor:
    """exp(d) - 1 - d with d = clamp(l[y] - base, -20, 20), (B, T)."""
    d = (chosen - base_logprobs).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    return torch.expm1(d) - d


def compute_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
    """The loss and its metrics.

    ``loss_input``: student_logits (B, T, V), teacher_logprobs and teacher_indices (B, T, K), base_logprobs,
    response_mask, old_student_logprobs, response_ids (B, T), training.{alpha, is_clip, kl_reg_weight}.
    Returns 0-dim tensors: loss, differentiable with respect to the logits, and without graph distill_loss,
    kl_reg, mean_is_ratio, clip_fraction.
    """
    training = loss_input.training
    dtype = working_dtype(loss_input.student_logits)
    mask = loss_input.response_mask.to(dtype)
    ignored = mask == 0
    logits = loss_input.student_logits.to(dtype).masked_fill(ignored.unsqueeze(-1), 0.0)
    teacher_logprobs = loss_input.teacher_logprobs.detach().to(dtype).masked_fill(ignored.unsqueeze(-1), 0.0)
    old = loss_input.old_student_logprobs.detach().to(dtype).masked_fill(ignored, 0.0)
    base = loss_input.base_logprobs.detach().to(dtype).masked_fill(ignored, 0.0)
    teacher_indices, response_ids = loss_input.teacher_indices.long(), loss_input.response_ids.long()

    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, response_ids.unsqueeze(-1)).squeeze(-1)
    if training.alpha < 1:
        per_token = divergence_over_support(logprobs.gather(-1, teacher_indices), teacher_logprobs, training.alpha)
    else:
        per_token = reverse_kl_surrogate(chosen, teacher_logprobs, teacher_indices, response_ids)
    ratio = importance_ratio(chosen, old, training.is_clip)

    weight = mask / mask.sum().clamp(min=1.0)
    distill_loss = (per_token * ratio * weight).sum()
    kl_reg = (k3_anchor(chosen, base) * weight).sum()
    # A weight of 0 must leave no 0 * inf behind in the gradient.
    loss = distill_loss + training.kl_reg_weight * kl_reg if training.kl_reg_weight else distill_loss
    return {
        "loss": loss,
        "distill_loss": distill_loss.detach(),
        "kl_reg": kl_reg.detach(),
        "mean_is_ratio": (ratio * weight).sum(),
        "clip_fraction": ((ratio >= training.is_clip) * weight).sum(),
    }


class _FromLogits:
    """A fused loss input with the logits computed: the head and hidden states in the working dtype."""

    def __init__(self, fused: Any) -> None:
        dtype = working_dtype(fused.student_hidden)
        hidden = fused.student_hidden.to(dtype)
        hidden = hidden.masked_fill((fused.response_mask == 0).unsqueeze(-1), 0.0)
        self.student_logits = hidden @ fused.lm_head_weight.to(dtype).T
        self.teacher_logprobs = fused.teacher_logprobs
        self.teacher_indices = fused.teacher_indices
        self.base_logprobs = fused.base_logprobs
        self.response_mask = fused.response_mask
        self.old_student_logprobs = fused.old_student_logprobs
        self.response_ids = fused.response_ids
        self.training = fused.training


def compute_fused_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
    """``compute_sdpo_loss`` from student_hidden (B, T, H) and lm_head_weight (V, H); unfused, it holds the
    float32 logits. Differentiable with respect to both."""
    return compute_sdpo_loss(_FromLogits(loss_input))


def compute_divergence(
    student_hidden: Tensor, lm_head_weight: Tensor, teacher_logprobs: Tensor, teacher_indices: Tensor, alpha: float
) -> Tensor:
    """The divergence alone, (B, T), for 0 <= alpha < 1: no ratio, no anchor, no mask. Raises ValueError for
    other alpha: the surrogate at alpha = 1 needs the response tokens."""
    if not 0 <= alpha < 1:
        raise ValueError(f"compute_divergence is defined for 0 <= alpha < 1, got {alpha}; use the loss at alpha = 1")
    dtype = working_dtype(student_hidden)
    logprobs = (student_hidden.to(dtype) @ lm_head_weight.to(dtype).T).log_softmax(-1)
    at_support = logprobs.gather(-1, teacher_indices.long())
    return divergence_over_support(at_support, teacher_logprobs.detach().to(dtype), alpha)
