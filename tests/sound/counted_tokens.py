"""Only tokens with a non-zero mask are computed; the others never enter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from .shared import NOWHERE, Batch, at, batch_of, jensen_shannon, reduced, renormalised, surrogate, working


def computed(batch: Batch) -> Mapping[str, Any]:
    """The results of a flat batch of tokens (N, ...)."""
    l = torch.log_softmax(batch.z, -1)  # noqa: E741
    chosen = at(l, batch.y)
    if batch.alpha >= 1:
        return reduced(batch, surrogate(batch, chosen), chosen)
    log_q = renormalised(l.gather(-1, batch.support).clamp(min=NOWHERE))
    return reduced(batch, jensen_shannon(renormalised(batch.tau), log_q, batch.alpha), chosen)


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    keep = loss_input.response_mask != 0
    fused = hasattr(loss_input, "student_hidden")
    batch = batch_of(loss_input)
    if fused:
        hidden = loss_input.student_hidden[keep].to(working(loss_input.student_hidden.dtype))
        z = hidden @ loss_input.lm_head_weight.to(hidden.dtype).T
    else:
        z = loss_input.student_logits[keep].to(working(loss_input.student_logits.dtype))
    kept = {name: getattr(batch, name)[keep] for name in ("tau", "support", "base", "old", "mask", "y")}
    return computed(replace(batch, z=z, **kept))


compute_fused_sdpo_loss = compute_sdpo_loss
