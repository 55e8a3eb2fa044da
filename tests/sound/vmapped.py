"""One token's loss, mapped over the batch with torch.func.vmap."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from .shared import NOWHERE, batch_of, jensen_shannon, reduced, renormalised, surrogate


def of_one_token(z: Tensor, tau: Tensor, support: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """D and l[y] of one token: z (V), tau and support (K), y 0-dim."""
    l = torch.log_softmax(z, -1)  # noqa: E741
    log_q = renormalised(torch.take_along_dim(l, support, -1).clamp(min=NOWHERE))
    chosen = torch.take_along_dim(l, y.unsqueeze(-1), -1).squeeze(-1)
    return jensen_shannon(renormalised(tau), log_q, alpha), chosen


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    batch = batch_of(loss_input)
    if batch.mask.numel() == 0:  # vmap has no empty batches
        nothing = batch.z.sum(-1)
        return reduced(batch, nothing, nothing)
    function = partial(of_one_token, alpha=0.5 if batch.alpha >= 1 else batch.alpha)
    divergence, chosen = vmap(vmap(function))(batch.z, batch.tau, batch.support, batch.y)
    if batch.alpha >= 1:
        divergence = surrogate(batch, chosen)
    return reduced(batch, divergence, chosen)


compute_fused_sdpo_loss = compute_sdpo_loss
