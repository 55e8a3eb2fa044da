"""The mixture held constant where that is exact: while the student is normalised on the support, the terms that
it drops sum to a constant. Below the mass floor autograd goes through the mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from .shared import LOG_FLOOR, NOWHERE, at, batch_of, logarithm, reduced, renormalised, surrogate


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    batch = batch_of(loss_input)
    l = F.log_softmax(batch.z, -1)  # noqa: E741
    chosen = at(l, batch.y)
    if batch.alpha >= 1:
        return reduced(batch, surrogate(batch, chosen), chosen)
    l_k = l.gather(-1, batch.support).clamp(min=NOWHERE)
    log_p, log_q = renormalised(batch.tau), renormalised(l_k)
    log_m = torch.logaddexp(log_p + logarithm(batch.alpha), log_q + logarithm(1 - batch.alpha))
    floored = torch.logsumexp(l_k, -1, keepdim=True) < LOG_FLOOR
    log_m = torch.where(floored, log_m, log_m.detach())
    teacher = (log_p.exp() * (log_p - log_m)).sum(-1)
    student = (log_q.exp() * (log_q - log_m)).sum(-1)
    return reduced(batch, batch.alpha * teacher + (1 - batch.alpha) * student, chosen)


compute_fused_sdpo_loss = compute_sdpo_loss
