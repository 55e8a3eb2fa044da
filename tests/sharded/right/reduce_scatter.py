"""tp by reduce_scatter: each rank finishes the log-probs of its share of the tokens, and all are gathered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sdpo_conformance.specs.claas.sharded.defects.sharded_parts import (
    OnRank,
    ShardedParts,
    carried,
    exponentials,
    pick,
    same,
)


def _at(parts: ShardedParts, w: OnRank, ids: Tensor) -> Tensor:
    local = torch.cat([pick(parts, w, ids), exponentials(parts, w).unsqueeze(-1)], -1)
    summed = carried(local, lambda t: _scattered_and_gathered(w, t), same)
    return summed[..., :-1] - summed[..., -1:].log()


def _scattered_and_gathered(w: OnRank, tensor: Tensor) -> Tensor:
    group, ranks = w.group("tp"), w.ranks("tp")
    if group is None:
        return tensor.clone()
    rows = tensor.reshape(-1, tensor.shape[-1])
    share = -(-rows.shape[0] // ranks)
    padded = torch.cat([rows, rows.new_zeros(share * ranks - rows.shape[0], rows.shape[1])])
    mine = padded.new_empty(share, rows.shape[1])
    dist.reduce_scatter_tensor(mine, padded, group=group)
    dist.all_gather_into_tensor(padded, mine, group=group)
    return padded[: rows.shape[0]].view_as(tensor)


_PARTS = replace(ShardedParts(), at=_at, mass=lambda parts, w: torch.ones_like(w.peak))


def compute_sdpo_loss(loss_input: Any) -> Any:
    return _PARTS.compute_sdpo_loss(loss_input)


def compute_fused_sdpo_loss(loss_input: Any) -> Any:
    return _PARTS.compute_fused_sdpo_loss(loss_input)
