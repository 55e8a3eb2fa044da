"""No gather: supports and responses are picked with one-hot products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from .shared import NOWHERE, batch_of, jensen_shannon, reduced, renormalised, surrogate


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    batch = batch_of(loss_input)
    vocabulary = batch.z.shape[-1]
    # -inf times a zero of the one-hot would be NaN
    l = F.log_softmax(batch.z, -1).clamp(min=-1e30)  # noqa: E741
    chosen = (l * F.one_hot(batch.y, vocabulary)).sum(-1)
    if batch.alpha >= 1:
        return reduced(batch, surrogate(batch, chosen), chosen)
    columns = torch.stack([(l * F.one_hot(ids, vocabulary)).sum(-1) for ids in batch.support.unbind(-1)], dim=-1)
    log_q = renormalised(columns.clamp(min=NOWHERE))
    return reduced(batch, jensen_shannon(renormalised(batch.tau), log_q, batch.alpha), chosen)


compute_fused_sdpo_loss = compute_sdpo_loss
