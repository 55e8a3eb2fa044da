"""Everything in log space, gradients by autograd."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F

from .shared import NOWHERE, at, batch_of, jensen_shannon, reduced, renormalised, surrogate


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    batch = batch_of(loss_input)
    l = F.log_softmax(batch.z, -1)  # noqa: E741
    chosen = at(l, batch.y)
    if batch.alpha >= 1:
        return reduced(batch, surrogate(batch, chosen), chosen)
    log_q = renormalised(l.gather(-1, batch.support).clamp(min=NOWHERE))
    return reduced(batch, jensen_shannon(renormalised(batch.tau), log_q, batch.alpha), chosen)


compute_fused_sdpo_loss = compute_sdpo_loss
