"""Generalised Jensen-Shannon divergence over the teacher's top-k (alpha < 1), value and gradient.

    p_k = exp(tau_k) / max(sum_k exp(tau_k), 1e-8)        q_k = exp(l[S_k]) / max(sum_k exp(l[S_k]), 1e-8)
    m_k = alpha p_k + (1 - alpha) q_k
    D   = alpha sum_k p_k (log p_k - log m_k) + (1 - alpha) sum_k q_k (log q_k - log m_k),   0 log 0 = 0

Source: claas/training/sdpo_loss.py, compute_sdpo_loss, step 2 (alpha < 1), kfallah/CLaaS at e2331f7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_conformance.protocol import MASS_FLOOR


@dataclass(frozen=True)
class Divergence:
    """All (B, T, K) float64 but ``value`` (B, T) and ``on_floor`` (B, T, bool).

    ``slope`` is dD/dq_k = (1 - alpha) (log q_k - log m_k); ``on_floor`` marks tokens whose student mass on
    the support lies below 1e-8, where q is no longer normalised.
    """

    value: Tensor
    log_p: Tensor
    log_q: Tensor
    log_m: Tensor
    slope: Tensor
    on_floor: Tensor


def renormalise(logprobs: Tensor) -> Tensor:
    """log of exp(x_k) / max(sum_k exp(x_k), 1e-8), along the last dimension."""
    log_mass = torch.logsumexp(logprobs, dim=-1, keepdim=True)
    return logprobs - log_mass.clamp(min=math.log(MASS_FLOOR))


def weighted(log_weight: Tensor, difference: Tensor) -> Tensor:
    """exp(log_weight) * difference with 0 log 0 = 0: a zero weight gives 0 whatever it multiplies."""
    weight = log_weight.exp()
    return torch.where(weight > 0, weight * difference, torch.zeros_like(weight))


def generalised_jensen_shannon(student_at_support: Tensor, teacher_logprobs: Tensor, alpha: float) -> Divergence:
    """``student_at_support`` l[S] and ``teacher_logprobs`` tau, both (B, T, K) float64; 0 <= alpha < 1."""
    log_p = renormalise(teacher_logprobs)
    log_q = renormalise(student_at_support)
    log_alpha = math.log(alpha) if alpha > 0 else -math.inf
    log_m = torch.logaddexp(log_alpha + log_p, math.log1p(-alpha) + log_q)
    teacher_part = weighted(log_p, log_p - log_m).sum(-1) if alpha > 0 else torch.zeros_like(log_p.sum(-1))
    student_part = weighted(log_q, log_q - log_m).sum(-1)
    nowhere = torch.isneginf(log_q)
    slope = (1 - alpha) * torch.where(nowhere, torch.zeros_like(log_q), log_q - log_m)
    return Divergence(
        value=alpha * teacher_part + (1 - alpha) * student_part,
        log_p=log_p,
        log_q=log_q,
        log_m=log_m,
        slope=slope,
        on_floor=torch.logsumexp(student_at_support, dim=-1) < math.log(MASS_FLOOR),
    )


def divergence_gradient(divergence: Divergence, student_logprobs: Tensor, teacher_indices: Tensor) -> Tensor:
    """dD/dz, (B, T, V).

    Above the floor q is a softmax over the K logits of the support and the partition function cancels:
    dD/dz[S_k] = q_k (slope_k - sum_j q_j slope_j), zero off the support. On the floor q_k = exp(l[S_k]) / 1e-8
    and dl/dz = onehot - softmax: dD/dz_v = sum_k slope_k q_k ([v = S_k] - softmax_v).
    """
    push = weighted(divergence.log_q, divergence.slope)
    total = push.sum(-1, keepdim=True)
    on_floor = divergence.on_floor.unsqueeze(-1)
    at_support = torch.where(on_floor, push, push - divergence.log_q.exp() * total)
    gradient = torch.zeros_like(student_logprobs).scatter_add(-1, teacher_indices, at_support)
    everywhere = torch.where(on_floor, total, torch.zeros_like(total))
    return gradient - everywhere * student_logprobs.exp()
