"""Divergences over categories in plain PyTorch: what the references of lasgroup, TRL and ms-swift share.

Log-probs are kept above ``LOWEST_LOGPROB``, so that a probability of 0 gives the limit 0 log 0 = 0 and no NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TAIL_CLAMP = -1e-7
LOWEST_LOGPROB = -1e4
LOG_RATIO_CLAMP = 20.0


def working_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def renormalised(logprobs: Tensor) -> Tensor:
    """log of x_k / sum_j x_j along the last dimension."""
    return logprobs - logprobs.logsumexp(-1, keepdim=True)


def with_tail(logprobs: Tensor) -> Tensor:
    """(..., K) -> (..., K + 1): the last category holds what the support leaves, at least 1 - exp(-1e-7)."""
    mass = logprobs.logsumexp(-1, keepdim=True).clamp(max=TAIL_CLAMP)
    return torch.cat((logprobs, torch.log(-torch.expm1(mass))), dim=-1)


def divergence(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """Forward KL at 0, reverse KL at 1, generalised Jensen-Shannon between; (..., C) -> (...)."""
    log_q, log_p = log_q.clamp(min=LOWEST_LOGPROB), log_p.clamp(min=LOWEST_LOGPROB)
    if alpha == 0:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if alpha == 1:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_q + math.log1p(-alpha), log_p + math.log(alpha))
    teacher = (log_p.exp() * (log_p - log_m)).sum(-1)
    student = (log_q.exp() * (log_q - log_m)).sum(-1)
    return alpha * teacher + (1 - alpha) * student


def importance_ratio(chosen: Tensor, old: Tensor, cap: float) -> Tensor:
    """min(exp(clamp(sg(chosen - old), -20, 20)), cap), without graph."""
    return (chosen.detach() - old).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp().clamp(max=cap)
