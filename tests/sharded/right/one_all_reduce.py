"""tp by a local online softmax: each rank's logsumexp, combined from one all_reduce that holds a place for each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.specs.claas.sharded.defects.sharded_parts import NOWHERE, OnRank, ShardedParts, over_tp


def _no_peak(w: OnRank) -> Tensor:
    return torch.zeros_like(w.z[..., 0].detach())


def _at(parts: ShardedParts, w: OnRank, ids: Tensor) -> Tensor:
    owned, local = parts.mine(w, ids)
    picked = torch.where(owned, w.z.gather(-1, local), 0.0)
    nothing = w.z.new_full((*w.z.shape[:-1], 1), NOWHERE)
    own = torch.cat([w.z[..., : w.held], nothing], -1).logsumexp(-1, keepdim=True)
    places = [own if rank == w.place("tp") else torch.zeros_like(own) for rank in range(w.ranks("tp"))]
    packed = over_tp(w, torch.cat([picked, *places], -1))
    return packed[..., : ids.shape[-1]] - packed[..., ids.shape[-1] :].logsumexp(-1, keepdim=True)


_PARTS = replace(ShardedParts(), peak=_no_peak, mass=lambda parts, w: torch.ones_like(w.peak), at=_at)


def compute_sdpo_loss(loss_input: Any) -> Any:
    return _PARTS.compute_sdpo_loss(loss_input)


def compute_fused_sdpo_loss(loss_input: Any) -> Any:
    return _PARTS.compute_fused_sdpo_loss(loss_input)
