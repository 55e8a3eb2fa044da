"""An online logsumexp over chunks of eleven columns, or more where there would be hundreds of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .shared import NOWHERE, at, batch_of, jensen_shannon, reduced, renormalised, surrogate

CHUNK = 11
CHUNKS = 256


def online_logsumexp(z: Tensor) -> Tensor:
    """(B, T, 1), chunk by chunk."""
    running = torch.full_like(z[..., :1], -1e30)
    for columns in z.split(max(CHUNK, z.shape[-1] // CHUNKS), dim=-1):
        running = torch.logaddexp(running, columns.clamp(min=-1e30).logsumexp(-1, keepdim=True))
    return running


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    batch = batch_of(loss_input)
    log_z = online_logsumexp(batch.z)
    chosen = at(batch.z, batch.y) - log_z.squeeze(-1)
    if batch.alpha >= 1:
        return reduced(batch, surrogate(batch, chosen), chosen)
    log_q = renormalised((batch.z.gather(-1, batch.support) - log_z).clamp(min=NOWHERE))
    return reduced(batch, jensen_shannon(renormalised(batch.tau), log_q, batch.alpha), chosen)


compute_fused_sdpo_loss = compute_sdpo_loss
