"""A softmax over the K logits of the support: the full vocabulary enters through its logsumexp alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from .shared import LOG_FLOOR, NOWHERE, at, batch_of, jensen_shannon, reduced, renormalised, surrogate


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    batch = batch_of(loss_input)
    log_z = torch.logsumexp(batch.z, -1)
    chosen = at(batch.z, batch.y) - log_z
    if batch.alpha >= 1:
        return reduced(batch, surrogate(batch, chosen), chosen)
    inside = batch.z.gather(-1, batch.support).clamp(min=-1e30)
    log_mass = torch.logsumexp(inside, -1) - log_z
    softmax = F.log_softmax(inside, -1).clamp(min=NOWHERE)
    floored = (inside - log_z[..., None] - LOG_FLOOR).clamp(min=NOWHERE)
    log_q = torch.where((log_mass < LOG_FLOOR)[..., None], floored, softmax)
    return reduced(batch, jensen_shannon(renormalised(batch.tau), log_q, batch.alpha), chosen)


compute_fused_sdpo_loss = compute_sdpo_loss
