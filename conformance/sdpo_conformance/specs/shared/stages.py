"""Stages that several specs share. Every one names what it reads of the flow by its attribute."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdpo_conformance.specs.shared.pipeline import LOG_ZERO, Flow

LOG_CLAMP = 20.0
TAIL_CLAMP = -1e-7


def student(flow: Flow) -> Tensor:
    """z', (B, T, V): the student's tempered logits."""
    return flow.z / flow.temperature


def teacher(flow: Flow) -> Tensor:
    """zt', (B, T, V): the teacher's tempered logits."""
    return flow.zt / flow.temperature


def student_logprobs(flow: Flow) -> Tensor:
    """l, (B, T, V)."""
    return flow.student.log_softmax(-1)


def teacher_logprobs(flow: Flow) -> Tensor:
    """lt, (B, T, V)."""
    return flow.teacher.log_softmax(-1)


def chosen(flow: Flow) -> Tensor:
    """l[y], (B, T)."""
    return flow.l.gather(-1, flow.y.unsqueeze(-1)).squeeze(-1)


def teacher_chosen(flow: Flow) -> Tensor:
    """lt[y], (B, T)."""
    return flow.lt.gather(-1, flow.y.unsqueeze(-1)).squeeze(-1)


def student_support(flow: Flow) -> Tensor:
    """The student's top-k, (B, T, K); all ids where ``flow.k`` is None."""
    if flow.k is None:
        return torch.arange(flow.student.shape[-1], device=flow.student.device).expand(flow.student.shape)
    return flow.student.detach().topk(min(flow.k, flow.student.shape[-1]), dim=-1).indices


def student_at_support(flow: Flow) -> Tensor:
    """l[S], (B, T, K)."""
    return flow.l.gather(-1, flow.support)


def teacher_at_support(flow: Flow) -> Tensor:
    """lt[S], (B, T, K)."""
    return flow.lt.gather(-1, flow.support)


def with_tail(logprobs: Tensor, clamp: float = TAIL_CLAMP) -> Tensor:
    """The support and the category that holds the rest."""
    mass = logprobs.logsumexp(-1, keepdim=True).clamp(max=clamp)
    return torch.cat((logprobs, torch.log(-torch.expm1(mass))), dim=-1)


def renormalised(logprobs: Tensor) -> Tensor:
    """x_k / sum_j x_j."""
    return logprobs - logprobs.logsumexp(-1, keepdim=True)


def as_they_are(logprobs: Tensor) -> Tensor:
    """Neither tail nor renormalisation."""
    return logprobs


FINISHES = {"tail": with_tail, "renormalised": renormalised, "whole": as_they_are}
"""``flow.finish`` -> what makes categories of log-probs at the support."""


def student_categories(flow: Flow) -> Tensor:
    """log q, (B, T, C)."""
    return FINISHES[flow.finish](flow.a)


def teacher_categories(flow: Flow) -> Tensor:
    """log p, (B, T, C)."""
    return FINISHES[flow.finish](flow.b)


def mix(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """log(alpha p + (1 - alpha) q)."""
    if alpha in (0, 1):
        return log_p if alpha else log_q
    return torch.logaddexp(log_p + math.log(alpha), log_q + math.log1p(-alpha))


def mixture(flow: Flow) -> Tensor:
    """log m, (B, T, C)."""
    return mix(flow.log_p, flow.log_q, flow.alpha)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum_c a_c (log a_c - log b_c), (B, T)."""
    log_a, log_b = log_a.clamp(min=LOG_ZERO), log_b.clamp(min=LOG_ZERO)
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def jensen_shannon(flow: Flow) -> Tensor:
    """alpha KL(p || m) + (1 - alpha) KL(q || m), (B, T)."""
    return flow.alpha * kl(flow.log_p, flow.log_m) + (1 - flow.alpha) * kl(flow.log_q, flow.log_m)


def divergence(flow: Flow) -> Tensor:
    """D over the categories, (B, T): KLs at both ends, between them the generalised Jensen-Shannon divergence."""
    if flow.alpha == 0:
        return kl(flow.log_p, flow.log_q)
    return kl(flow.log_q, flow.log_p) if flow.alpha == 1 else jensen_shannon(flow)


def surrogate(flow: Flow) -> Tensor:
    """sg(l[y] - lt[y]) l[y], (B, T)."""
    return (flow.chosen - flow.teacher_chosen).detach() * flow.chosen


def per_token(flow: Flow) -> Tensor:
    """D, (B, T), of whichever mode."""
    return surrogate(flow) if flow.sampled else divergence(flow)


def log_ratio(flow: Flow) -> Tensor | None:
    """clamp(sg(l[y] - old), -20, 20), (B, T), or None where there is no ratio."""
    return None if flow.clip is None else (flow.chosen.detach() - flow.old).clamp(-LOG_CLAMP, LOG_CLAMP)


def ratio(flow: Flow) -> Tensor:
    """r, (B, T)."""
    return torch.ones_like(flow.chosen) if flow.log_ratio is None else flow.log_ratio.exp().clamp(max=flow.clip)


def keep(flow: Flow, tensor: Tensor) -> Tensor:
    """The tensor with 0 where nothing counts."""
    return torch.where(flow.mask != 0, tensor, torch.zeros_like(tensor))
