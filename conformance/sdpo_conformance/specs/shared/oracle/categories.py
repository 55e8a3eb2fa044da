"""A divergence between two distributions over the same categories, and how categories are made of log-probs.

    alpha = 0      D = sum_c p_c (log p_c - log q_c)                                 forward KL
    alpha = 1      D = sum_c q_c (log q_c - log p_c)                                 reverse KL
    else           m = alpha p + (1 - alpha) q
                   D = alpha sum p (log p - log m) + (1 - alpha) sum q (log q - log m)

In the order of operations of lasgroup and TRL, so that what is left of a divergence of equal distributions is what is
left there.

Sources: lasgroup/SDPO verl/trainer/ppo/core_algos.py 1112-1162; trl 1.16.0 trl/experimental/sdpo/loss_utils.py 23-53;
ms-swift 4.6.0 swift/rlhf_trainers/gkd_loss.py 94-150.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TAIL_CLAMP = -1e-7
"""log of the largest mass that the support may have where a tail category follows."""


@dataclass(frozen=True)
class Categories:
    """One side: ``log`` (B, T, C), the support's categories first, the tail's last where there is one.

    ``open``: (B, T, 1) bool, whether the tail moves with the support; None without a tail category.
    """

    log: Tensor
    open: Tensor | None = None


def log_probs_at(logits: Tensor, support: Tensor) -> Tensor:
    """(B, T, K): logits at the support minus the whole vocabulary's logsumexp, the order in which lasgroup and TRL
    round. Near a tail of 1e-7 the last bits of these numbers decide the tail's."""
    return logits.gather(-1, support) - logits.logsumexp(-1, keepdim=True)


def renormalised(at_support: Tensor) -> Categories:
    """x_k / sum_j x_j through logsumexp, without a floor."""
    return Categories(at_support - at_support.logsumexp(-1, keepdim=True))


def with_tail(at_support: Tensor) -> Categories:
    """The support and one category for the rest: log(1 - exp(min(logsumexp, -1e-7))), open where the clamp does not
    hold (at equality it does not)."""
    mass = at_support.logsumexp(-1, keepdim=True)
    rest = torch.log(-torch.expm1(mass.clamp(max=TAIL_CLAMP)))
    return Categories(torch.cat((at_support, rest), dim=-1), mass <= TAIL_CLAMP)


def weighted(log_weight: Tensor, difference: Tensor, published: bool) -> Tensor:
    """exp(log_weight) * difference; 0 log 0 is its limit 0, and NaN as published."""
    weight = log_weight.exp()
    product = weight * difference
    return product if published else torch.where(weight == 0, torch.zeros_like(product), product)


def log_mixture(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """log(alpha p + (1 - alpha) q), 0 < alpha < 1."""
    return torch.logsumexp(torch.stack((log_q + math.log(1 - alpha), log_p + math.log(alpha))), dim=0)


def divergence(log_q: Tensor, log_p: Tensor, alpha: float, published: bool = False) -> Tensor:
    """D, (B, T), of the student's ``log_q`` and the teacher's ``log_p``, (B, T, C)."""
    if alpha == 0:
        return weighted(log_p, log_p - log_q, published).sum(-1)
    if alpha == 1:
        return weighted(log_q, log_q - log_p, published).sum(-1)
    log_m = log_mixture(log_p, log_q, alpha)
    teacher = weighted(log_p, log_p - log_m, published)
    student = weighted(log_q, log_q - log_m, published)
    return torch.lerp(student, teacher, alpha).sum(-1)


def slope(log_q: Tensor, log_p: Tensor, alpha: float, published: bool = False) -> Tensor:
    """dD / d log q_c, (B, T, C), every category moving alone."""
    if alpha == 0:
        return -log_p.exp()
    if alpha == 1:
        return weighted(log_q, log_q - log_p + 1, published)
    return (1 - alpha) * weighted(log_q, log_q - log_mixture(log_p, log_q, alpha), published)


def to_support(categories: Categories, moved: Tensor, renormalises: bool) -> Tensor:
    """dD / d l[S_k], (B, T, K), from ``moved`` = dD / d log q_c: through the tail, or through the renormalisation."""
    if categories.open is not None:
        at_support, tail = moved[..., :-1], moved[..., -1:]
        share = (categories.log[..., :-1] - categories.log[..., -1:]).exp()
        return at_support - torch.where(categories.open, tail * share, torch.zeros_like(share))
    if not renormalises:
        return moved
    pulled = moved - categories.log.exp() * moved.sum(-1, keepdim=True)
    largest = categories.log.argmax(-1, keepdim=True)
    rest = torch.where(categories.log.gather(-1, largest).exp() > 0.5, pulled.sum(-1, keepdim=True), 0.0)
    return pulled.scatter(-1, largest, pulled.gather(-1, largest) - rest)  # near q = 1 the others say it more exactly


def to_logits(at_support: Tensor, support: Tensor, logprobs: Tensor) -> Tensor:
    """dD / dz (B, T, V) from dD / d l[S_k] (B, T, K): l = z - logsumexp(z)."""
    dense = logprobs.exp() * at_support.sum(-1, keepdim=True)
    return torch.zeros_like(logprobs).scatter_add(-1, support, at_support) - dense
