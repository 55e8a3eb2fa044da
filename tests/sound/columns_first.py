"""Tokens as columns: everything lies (V, N) or (K, N), and what is picked is picked by a flat index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .shared import LOG_FLOOR, NOWHERE, batch_of, logarithm, reduced, surrogate


def columns(tensor: Tensor) -> Tensor:
    """(B, T, N) as (N, B T), token by token."""
    return tensor.reshape(-1, tensor.shape[-1]).T


def taken(l: Tensor, ids: Tensor) -> Tensor:  # noqa: E741
    """l (V, N) at ids (K, N)."""
    return torch.take(l, ids * l.shape[1] + torch.arange(l.shape[1], device=l.device))


def floored(logprobs: Tensor) -> Tensor:
    """Renormalised down each column."""
    return logprobs - torch.logsumexp(logprobs, 0, keepdim=True).clamp(min=LOG_FLOOR)


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    batch = batch_of(loss_input)
    z = columns(batch.z)
    l = z - torch.logsumexp(z, 0, keepdim=True)  # noqa: E741
    one = replace(
        batch,
        tau=batch.tau.flatten(0, 1)[None],
        support=batch.support.flatten(0, 1)[None],
        **{name: getattr(batch, name).reshape(1, -1) for name in ("base", "old", "mask", "y")},
    )
    chosen = taken(l, one.y)
    if batch.alpha >= 1:
        return reduced(one, surrogate(one, chosen), chosen)
    log_p = floored(columns(batch.tau))
    log_q = floored(taken(l, columns(batch.support)).clamp(min=NOWHERE))
    log_m = torch.logaddexp(log_p + logarithm(batch.alpha), log_q + logarithm(1 - batch.alpha))
    teacher, student = (log.exp() * (log - log_m) for log in (log_p, log_q))
    divergence = (batch.alpha * teacher + (1 - batch.alpha) * student).sum(0)
    return reduced(one, divergence[None], chosen)


compute_fused_sdpo_loss = compute_sdpo_loss
