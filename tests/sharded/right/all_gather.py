"""tp by gathering every rank's logits and doing what one process does; the gradient is this rank's columns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sdpo_conformance.specs.claas.sharded.defects.sharded_parts import OnRank, ShardedParts, carried


def _gathered(w: OnRank) -> Tensor:
    """(B, T, V) on every rank, differentiable with respect to the own columns."""
    group = w.group("tp")
    own = w.z[..., : w.held]
    if group is None:
        return own
    held = torch.tensor([w.held, w.start])
    sizes = [torch.zeros_like(held) for _ in range(w.ranks("tp"))]
    dist.all_gather(sizes, held, group=group)
    widest = max(1, *(int(size[0]) for size in sizes))
    order = sorted(range(len(sizes)), key=lambda rank: int(sizes[rank][1]))

    def forward(tensor: Tensor) -> Tensor:
        padded = tensor.new_zeros(*tensor.shape[:-1], widest)
        padded[..., : w.held] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([parts[rank][..., : int(sizes[rank][0])] for rank in order], -1)

    start = min(w.start, w.size)
    return carried(own, forward, lambda g: g[..., start : start + w.held])


def _at(parts: ShardedParts, w: OnRank, ids: Tensor) -> Tensor:
    return _gathered(w).log_softmax(-1).gather(-1, ids)


_PARTS = replace(ShardedParts(), at=_at, mass=lambda parts, w: torch.ones_like(w.peak))


def compute_sdpo_loss(loss_input: Any) -> Any:
    return _PARTS.compute_sdpo_loss(loss_input)


def compute_fused_sdpo_loss(loss_input: Any) -> Any:
    return _PARTS.compute_fused_sdpo_loss(loss_input)
