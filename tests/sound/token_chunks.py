"""Three tokens at a time, each chunk recomputed in the backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .shared import (
    NOWHERE,
    Batch,
    anchor,
    at,
    batch_of,
    importance_ratio,
    jensen_shannon,
    renormalised,
    surrogate,
    working,
)

CHUNK = 3


def chunk_terms(batch: Batch, z: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """D r, k3 and r of some tokens, flattened over B and T."""
    part = Batch(
        z,
        *(getattr(batch, name).flatten(0, 1)[rows] for name in ("tau", "support", "base", "old", "mask", "y")),
        batch.alpha,
        batch.is_clip,
        batch.kl_reg_weight,
    )
    l = torch.log_softmax(part.z, -1)  # noqa: E741
    chosen = at(l, part.y)
    if part.alpha >= 1:
        divergence = surrogate(part, chosen)
    else:
        log_q = renormalised(l.gather(-1, part.support).clamp(min=NOWHERE))
        divergence = jensen_shannon(renormalised(part.tau), log_q, part.alpha)
    ratio = importance_ratio(part, chosen)
    return divergence * ratio, anchor(part, chosen), ratio


def total(batch: Batch, project: Any) -> Mapping[str, Any]:
    """``project`` gives the logits of a slice of tokens."""
    weight = (batch.mask / batch.mask.sum().clamp(min=1)).flatten()
    sums = [batch.mask.new_zeros(()) for _ in range(4)]
    sums[0] = sums[0] + 0 * project(slice(0, 0)).sum()
    for start in range(0, weight.numel(), CHUNK):
        rows = slice(start, start + CHUNK)

        def terms(rows: slice = rows) -> tuple[Tensor, Tensor, Tensor]:
            return chunk_terms(batch, project(rows), rows)

        weighted, k3, ratio = checkpoint(terms, use_reentrant=False, preserve_rng_state=False)
        sums[0] = sums[0] + (weighted * weight[rows]).sum()
        sums[1] = sums[1] + (k3 * weight[rows]).sum()
        sums[2] = sums[2] + (ratio * weight[rows]).sum()
        sums[3] = sums[3] + ((ratio >= batch.is_clip) * weight[rows]).sum()
    return {
        "loss": sums[0] + batch.kl_reg_weight * sums[1],
        "distill_loss": sums[0].item(),
        "kl_reg": sums[1].item(),
        "mean_is_ratio": sums[2].item(),
        "clip_fraction": sums[3].item(),
    }


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    batch = batch_of(loss_input)
    return total(batch, lambda rows: batch.z.flatten(0, 1)[rows])


def compute_fused_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    hidden, head = loss_input.student_hidden, loss_input.lm_head_weight
    inside = working(hidden.dtype)
    batch = batch_of(loss_input)
    counted = torch.where((batch.mask != 0)[..., None], hidden.to(inside), 0.0).flatten(0, 1)
    return total(batch, lambda rows: counted[rows] @ head.to(inside).T)
