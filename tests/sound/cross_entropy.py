"""Log-probs of responses and of the support by F.cross_entropy, padding by its ignore_index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .shared import NOWHERE, Batch, batch_of, jensen_shannon, reduced, renormalised, surrogate

IGNORED = -100


def scored(z: Tensor, ids: Tensor) -> Tensor:
    """l at ids (N), 0 where they are ignored."""
    return -F.cross_entropy(z, ids, ignore_index=IGNORED, reduction="none")


def flat(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, V), response ids (N) and support (N, K), ignored where the mask is 0."""
    n = batch.mask.numel()
    ignored = batch.mask == 0
    y = batch.y.masked_fill(ignored, IGNORED).reshape(n)
    support = batch.support.masked_fill(ignored[..., None], IGNORED)
    return batch.z.reshape(n, batch.z.shape[-1]), y, support.reshape(n, support.shape[-1])


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    batch = batch_of(loss_input)
    z, y, support = flat(batch)
    chosen = scored(z, y).view_as(batch.mask)
    if batch.alpha >= 1:
        return reduced(batch, surrogate(batch, chosen), chosen)
    k = support.shape[-1]
    wide = z[:, None].expand(-1, k, -1) if z.shape[0] * k * z.shape[1] < 2**20 else None
    if wide is not None and z.shape[0]:
        l_k = scored(wide.reshape(-1, z.shape[1]), support.reshape(-1)).view(*batch.mask.shape, k)
    else:
        l_k = torch.log_softmax(batch.z, -1).gather(-1, batch.support)
    log_q = renormalised(l_k.clamp(min=NOWHERE))
    return reduced(batch, jensen_shannon(renormalised(batch.tau), log_q, batch.alpha), chosen)


compute_fused_sdpo_loss = compute_sdpo_loss
