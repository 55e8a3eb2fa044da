"""dp by a reduction whose backward reduces as well (torch.distributed.nn): the factor of the ranks comes from there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from sdpo_conformance.specs.claas.sharded.defects.sharded_parts import OnRank, ShardedParts, carried, over_batch


def _assemble(parts: ShardedParts, w: OnRank, own: Tensor) -> Tensor:
    return carried(own, lambda t: over_batch(w, t), lambda g: over_batch(w, g))


_PARTS = replace(ShardedParts(), assemble=_assemble)


def compute_sdpo_loss(loss_input: Any) -> Any:
    return _PARTS.compute_sdpo_loss(loss_input)


def compute_fused_sdpo_loss(loss_input: Any) -> Any:
    return _PARTS.compute_fused_sdpo_loss(loss_input)
