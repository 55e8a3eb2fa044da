"""How far a right implementation may be off: first-order rounding analysis of what several specs share.

All errors are absolute and per unit: the caller multiplies them by the factor of the dtype. A logit carries eps |z|,
and its temperature as much again; a log-prob the logsumexp's error besides; a category's probability the relative error
of its log. The tail is the exception: 1 - exp(logsumexp) of a confident token is lost in rounding, so that its mass may
be anything between two ends, clamped or not, and its terms are taken at both (``TailRange``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_conformance.specs.shared.oracle.categories import TAIL_CLAMP

TAIL_UNITS = 4.0
"""Units of rounding by which the support's log-mass may be off where the tail's ends are taken."""

FACTORS = (4.0, 0.5)
"""By how much the caller multiplies errors in float32 and float64, and in half precision: what is no multiple of a
rounding, as the tail's ends, is divided by it first."""


def factor_of(eps: float) -> float:
    """The caller's factor for this unit roundoff."""
    return FACTORS[eps > 1e-5]


LOG_CLAMP = 20.0


def logprob_errors(logits: Tensor, logprobs: Tensor, eps: float, tempered: bool, given: Tensor | None = None) -> Tensor:
    """(B, T, V) errors of log_softmax(logits): ``logits`` after the temperature; ``given``: errors that they come
    with."""
    size = torch.where(logits.isinf(), 0.0, logits.abs())
    error = eps * size * (2.0 if tempered else 1.0)
    if given is not None:
        error = error + given
    log_sum = torch.where(logits.isinf(), 0.0, logits - logprobs).amax(-1, keepdim=True).abs()
    softmax = logprobs.exp()
    summed = (softmax * error).sum(-1, keepdim=True) + eps * (log_sum + 2 + logits.shape[-1] / 1000)
    return error + summed + eps * (torch.where(logprobs.isinf(), 0.0, logprobs.abs()) + 2)


@dataclass(frozen=True)
class TailRange:
    """What a tail may be computed as: its ``low`` and ``high`` probability, and whether it may be ``open`` and may be
    ``closed``; all (B, T, 1)."""

    low: Tensor
    high: Tensor
    may_open: Tensor
    may_close: Tensor


@dataclass(frozen=True)
class SideErrors:
    """``log`` (B, T, K) errors of one side's category logs, the tail's left out; ``tail`` its range, or None."""

    log: Tensor
    tail: TailRange | None = None


def side_errors(at_support: Tensor, errors: Tensor, finish: str, eps: float) -> SideErrors:
    """Errors of the categories that ``finish`` (tail, renormalised, whole) makes of log-probs at the support."""
    share = (at_support - at_support.logsumexp(-1, keepdim=True)).exp()
    mass_error = (share * errors).sum(-1, keepdim=True) + 2 * eps
    if finish == "whole":
        return SideErrors(errors)
    if finish == "renormalised":
        return SideErrors(errors + mass_error + 2 * eps)
    mass = at_support.logsumexp(-1, keepdim=True)
    smallest = -torch.expm1(torch.tensor(TAIL_CLAMP, dtype=torch.float64))
    slack = TAIL_UNITS * (mass_error + eps)
    low = (-torch.expm1((mass + slack).clamp(max=TAIL_CLAMP))).clamp(min=smallest)
    high = (-torch.expm1((mass - slack).clamp(max=TAIL_CLAMP))).clamp(min=smallest)
    wide = 1 + TAIL_UNITS * 8 * eps
    return SideErrors(errors, TailRange(low / wide, high * wide, mass - slack <= TAIL_CLAMP, mass + slack > TAIL_CLAMP))


@dataclass(frozen=True)
class DivergenceErrors:
    """``value`` (B, T): of D; ``at_support`` (B, T, K): of dD / d l[S_k]; ``tail_slope`` (B, T, 1): |dD / dq| of the
    tail, or None where there is none."""

    value: Tensor
    at_support: Tensor
    tail_slope: Tensor | None = None


def _value_of(alpha: float) -> Callable[[Tensor, Tensor], Tensor]:
    """One category's share of D, of p and q."""

    def term(q: Tensor, p: Tensor) -> Tensor:
        log_q, log_p = q.log(), p.log()
        if alpha == 0:
            return p * (log_p - log_q)
        if alpha == 1:
            return q * (log_q - log_p)
        log_m = (alpha * p + (1 - alpha) * q).log()
        return alpha * p * (log_p - log_m) + (1 - alpha) * q * (log_q - log_m)

    return term


def _slope_of(alpha: float) -> Callable[[Tensor, Tensor], Tensor]:
    """dD / dq of one category."""

    def slope(q: Tensor, p: Tensor) -> Tensor:
        if alpha == 0:
            return -p / q
        if alpha == 1:
            return (q / p).log() + 1
        return (1 - alpha) * (q / (alpha * p + (1 - alpha) * q)).log()

    return slope


def divergence_errors(
    log_q: Tensor, log_p: Tensor, student: SideErrors, teacher: SideErrors, alpha: float, eps: float
) -> DivergenceErrors:
    """Errors of D and of its derivative by the student's log-probs at the support."""
    has_tail = student.tail is not None
    if has_tail:
        all_q, all_p = log_q, log_p
        log_q, log_p = log_q[..., :-1], log_p[..., :-1]
    hq, hp = student.log, teacher.log
    q, p = log_q.exp(), log_p.exp()
    log_q, log_p = torch.where(q > 0, log_q, 0.0), torch.where(p > 0, log_p, 0.0)
    if alpha == 0:
        by_q, by_p = p, p * (log_p - log_q + 1).abs()
        size = p * (log_p.abs() + log_q.abs() + 1)
        curved = p * (hp**2 + hq**2)
        h_error, h = p * (hp + eps), p
    elif alpha == 1:
        by_q, by_p = q * (log_q - log_p + 1).abs(), q
        size = q * (log_p.abs() + log_q.abs() + 1)
        curved = q * (hq**2 + hp**2)
        h = q * (log_q - log_p + 1).abs()
        h_error = h * (hq + eps) + q * (hq + hp + eps * (log_q.abs() + log_p.abs() + 1))
    else:
        m = alpha * p + (1 - alpha) * q
        log_m = torch.where(m > 0, m.log(), 0.0)
        of_p, of_q = torch.where(p > 0, log_p - log_m, 0.0), torch.where(q > 0, log_q - log_m, 0.0)
        share = torch.where(m > 0, alpha * p / m, 0.0)
        by_q, by_p = (1 - alpha) * q * of_q.abs(), alpha * p * of_p.abs()
        size = alpha * p * (log_p.abs() + log_m.abs() + 1) + (1 - alpha) * q * (log_q.abs() + log_m.abs() + 1)
        size = size + p * of_p.abs() + q * of_q.abs()  # alpha itself is rounded
        curved = (1 - alpha) * q * share * hq**2 + alpha * p * (1 - share) * hp**2
        h = (1 - alpha) * q * of_q.abs()
        slope_error = (1 - alpha) * (share * (hq + hp) + eps * (log_q.abs() + log_m.abs() + 2)) + eps * of_q.abs()
        h_error = h * (hq + eps) + q * slope_error
    value = (by_q * hq + by_p * hp + curved + 2 * eps * size).sum(-1)
    if not has_tail:
        return DivergenceErrors(value, h_error)
    return _with_tail(all_q, all_p, student, teacher, alpha, eps, DivergenceErrors(value, h_error), q, hq)


def _with_tail(
    log_q: Tensor,
    log_p: Tensor,
    student: SideErrors,
    teacher: SideErrors,
    alpha: float,
    eps: float,
    rest: DivergenceErrors,
    q: Tensor,
    hq: Tensor,
) -> DivergenceErrors:
    """Adds the tail: its terms at the ends of both ranges."""
    assert student.tail is not None
    assert teacher.tail is not None
    mine, theirs = student.tail, teacher.tail
    term, slope = _value_of(alpha), _slope_of(alpha)
    q0, p0 = log_q[..., -1:].exp(), log_p[..., -1:].exp()
    is_open = log_q[..., :-1].logsumexp(-1, keepdim=True) <= TAIL_CLAMP
    here = slope(q0, p0) * is_open
    value, tail_slope = torch.zeros_like(q0), torch.zeros_like(q0)
    for q_end in (mine.low, q0, mine.high):
        for p_end in (theirs.low, p0, theirs.high):
            value = torch.maximum(value, (term(q_end, p_end) - term(q0, p0)).abs())
            opened = torch.where(mine.may_open, (slope(q_end, p_end) - here).abs(), 0.0)
            tail_slope = torch.maximum(tail_slope, 1.25 * opened)
    tail_slope = torch.maximum(tail_slope, torch.where(mine.may_close, 1.25 * here.abs(), 0.0)) / factor_of(eps)
    size, logs = _tail_size(q0, p0, alpha)
    at_support = rest.at_support + q * (tail_slope + eps * logs + here.abs() * (hq + 2 * eps))
    # PyTorch takes expm1's derivative as its result + 1: a support of little mass has that mass off by eps,
    # which its members share.
    at_support = at_support + eps * here.abs() * q / q.sum(-1, keepdim=True).clamp(min=1e-300)
    value = rest.value + (value / factor_of(eps) + 2 * eps * size).squeeze(-1)
    return DivergenceErrors(value, at_support, here.abs())


def _tail_size(q: Tensor, p: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The absolute terms of the tail's share of D, whose logs are rounded one by one, and those of its slope."""
    log_q, log_p = q.log().abs(), p.log().abs()
    if alpha == 0:
        return p * (log_p + log_q + 1), p / q
    if alpha == 1:
        return q * (log_p + log_q + 1), log_p + log_q + 2
    log_m = (alpha * p + (1 - alpha) * q).log().abs()
    size = alpha * p * (log_p + log_m + 1) + (1 - alpha) * q * (log_q + log_m + 1)
    return size, (1 - alpha) * (log_q + log_m + 2)


def renormalised_errors(errors: DivergenceErrors, moved: Tensor, q: Tensor, hq: Tensor, eps: float) -> Tensor:
    """Errors of u_k = h_k - q_k sum h, from those of h; ``moved``: h."""
    total = moved.sum(-1, keepdim=True).abs()
    summed = errors.at_support.sum(-1, keepdim=True) + eps * moved.abs().sum(-1, keepdim=True)
    return errors.at_support + q * (summed + total * (hq + eps))


def logits_gradient_errors(
    at_support: Tensor,
    at_support_error: Tensor,
    support: Tensor,
    logprobs: Tensor,
    l_error: Tensor,
    eps: float,
    tail_slope: Tensor | None = None,
) -> Tensor:
    """(B, T, V) errors of dD / dz' from those of dD / d l[S_k] (``at_support``: its true value). A tail that is summed
    from the rest of the vocabulary hands its ``tail_slope`` to every member of it, which the support's share then takes
    back: both are rounded."""
    total = at_support.sum(-1, keepdim=True).abs()
    total_error = at_support_error.sum(-1, keepdim=True) + eps * at_support.abs().sum(-1, keepdim=True)
    if tail_slope is not None:
        total_error = total_error + 4 * eps * tail_slope
    dense = logprobs.exp() * (total_error + total * (l_error + 2 * eps))
    here = at_support_error + 2 * eps * at_support.abs()
    return dense.scatter_add(-1, support, here)


def chosen_gradient_errors(
    slope: Tensor, slope_error: Tensor, y: Tensor, logprobs: Tensor, l_error: Tensor, eps: float
) -> Tensor:
    """(B, T, V) errors of slope * (onehot(y) - softmax)."""
    softmax = logprobs.exp()
    onehot = torch.zeros_like(softmax).scatter_(-1, y, 1.0)
    slope, slope_error = slope.abs().unsqueeze(-1), slope_error.unsqueeze(-1)
    direction = softmax * (l_error + 2 * eps) + 2 * eps * onehot
    return slope_error * (onehot - softmax).abs() + (slope + slope_error) * direction


def ratio_errors(chosen: Tensor, chosen_error: Tensor, old: Tensor, cap: float, eps: float) -> Tensor:
    """(B, T) relative errors of the capped ratio."""
    log_ratio = chosen - old
    saturated = (log_ratio.abs() > LOG_CLAMP + 1) | (
        log_ratio.clamp(max=LOG_CLAMP) > torch.tensor(cap).log().item() + 1
    )
    moving = chosen_error + eps * (torch.nan_to_num(old.abs() + log_ratio.abs(), posinf=0.0) + 2)
    return torch.where(saturated, 2 * eps, moving)
