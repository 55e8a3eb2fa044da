"""The vocabulary in two halves that know of each other by three sums alone, as ranks of a mesh do: each finds the ids
that are its own by their offset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .shared import NOWHERE, batch_of, jensen_shannon, reduced, renormalised, surrogate


def own_logits(part: Tensor, start: int, ids: Tensor) -> Tensor:
    """Logits at ids (B, T, N) of those that lie in this part, else 0."""
    local = ids - start
    mine = (local >= 0) & (local < part.shape[-1])
    found = part.gather(-1, local.clamp(0, max(part.shape[-1] - 1, 0)))
    return torch.where(mine, found, torch.zeros((), dtype=part.dtype, device=part.device))


def over_parts(parts: Sequence[Tensor], starts: Sequence[int], ids: Tensor) -> Tensor:
    """Logits at ids: every id lies in one part."""
    return torch.stack([own_logits(part, start, ids) for part, start in zip(parts, starts, strict=True)]).sum(0)


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    batch = batch_of(loss_input)
    half = (batch.z.shape[-1] + 1) // 2
    parts, starts = list(batch.z.split(half, -1)), [0, half]
    starts = starts[: len(parts)]
    top = torch.stack([part.detach().amax(-1) for part in parts]).amax(0)
    total = torch.stack([(part - top[..., None]).exp().sum(-1) for part in parts]).sum(0)
    log_z = top + total.log()
    chosen = over_parts(parts, starts, batch.y[..., None]).squeeze(-1) - log_z
    if batch.alpha >= 1:
        return reduced(batch, surrogate(batch, chosen), chosen)
    l_k = (over_parts(parts, starts, batch.support) - log_z[..., None]).clamp(min=NOWHERE)
    return reduced(batch, jensen_shannon(renormalised(batch.tau), renormalised(l_k), batch.alpha), chosen)


compute_fused_sdpo_loss = compute_sdpo_loss
