"""From errors of single tokens to those of a loss and its gradient: what lasgroup's and TRL's bounds share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_conformance.specs.shared.oracle.categories import slope
from sdpo_conformance.specs.shared.rounding import (
    chosen_gradient_errors,
    divergence_errors,
    logits_gradient_errors,
    renormalised_errors,
    side_errors,
)

FLOAT32_EPS = torch.finfo(torch.float32).eps

FLOAT16_RECIPROCAL = 2 / torch.finfo(torch.float16).max

TOKENS_PER_ROUNDING = 16
"""A mean that is summed token by token rounds at every token, and equal terms round one way."""


@dataclass(frozen=True)
class TokenBounds:
    """Errors per unit: ``value`` (B, T) of D; ``gradient`` (B, T, V) of dD / dz', before temperature and factors;
    ``fragile`` (B, T) bool: where float16 cannot hold 1 / tail, so that plain PyTorch's gradient is not finite."""

    value: Tensor
    gradient: Tensor
    fragile: Tensor | None = None


def over_categories(
    l: Tensor,  # noqa: E741  (the symbol of the spec)
    l_error: Tensor,
    teacher_at_support: Tensor,
    teacher_error: Tensor,
    support: Tensor,
    log_q: Tensor,
    log_p: Tensor,
    finish: str,
    alpha: float,
    at_support: Tensor,
    eps: float,
) -> TokenBounds:
    """Errors of a divergence over categories; ``at_support``: the true dD / d l[S_k], (B, T, K)."""
    a, a_error = l.gather(-1, support), l_error.gather(-1, support)
    student = side_errors(a, a_error, finish, eps)
    teacher = side_errors(teacher_at_support, teacher_error, finish, eps)
    errors = divergence_errors(log_q, log_p, student, teacher, alpha, eps)
    moved_error = errors.at_support
    if finish == "renormalised":
        moved = slope(log_q, log_p, alpha)
        moved_error = renormalised_errors(errors, moved, log_q.exp(), student.log, eps)
    gradient = logits_gradient_errors(at_support, moved_error, support, l, l_error, eps, errors.tail_slope)
    fragile = None if student.tail is None else student.tail.low.squeeze(-1) < FLOAT16_RECIPROCAL
    return TokenBounds(errors.value, gradient, fragile)


def of_sampled_token(
    l: Tensor,  # noqa: E741  (the symbol of the spec)
    l_error: Tensor,
    y: Tensor,
    difference: Tensor,
    teacher_error: Tensor,
    eps: float,
) -> TokenBounds:
    """Errors of sg(l[y] - lt[y]) l[y]; ``difference`` (B, T); ``y`` (B, T, 1)."""
    chosen, chosen_error = l.gather(-1, y).squeeze(-1), l_error.gather(-1, y).squeeze(-1)
    slope_error = chosen_error + teacher_error + eps * difference.abs()
    value = chosen.abs() * slope_error + difference.abs() * chosen_error + 2 * eps * (difference * chosen).abs()
    return TokenBounds(value, chosen_gradient_errors(difference, slope_error, y, l, l_error, eps))


def mean_error(mask: Tensor, given: torch.dtype, eps: float) -> float:
    """Relative error of a mean's weights; ``given``: the mask's dtype. Sums of an integer mask, and quotients of them,
    are float32 in PyTorch."""
    eps_sum = FLOAT32_EPS if eps > 1e-12 or given != torch.float64 else eps
    mask_eps = torch.finfo(given).eps if given.is_floating_point else 0.0
    return 2 * max(mask_eps, eps_sum) + eps_sum * float((mask != 0).sum()) / TOKENS_PER_ROUNDING
