"""F.kl_div for both divergences, its target in log space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from .shared import NOWHERE, at, batch_of, logarithm, reduced, renormalised, surrogate


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    batch = batch_of(loss_input)
    l = F.log_softmax(batch.z, -1)  # noqa: E741
    chosen = at(l, batch.y)
    if batch.alpha >= 1:
        return reduced(batch, surrogate(batch, chosen), chosen)
    log_p = renormalised(batch.tau)
    log_q = renormalised(l.gather(-1, batch.support).clamp(min=NOWHERE))
    mixture = torch.logsumexp(torch.stack([log_q + logarithm(1 - batch.alpha), log_p + logarithm(batch.alpha)]), dim=0)
    teacher = F.kl_div(mixture, log_p, reduction="none", log_target=True).sum(-1)
    student = F.kl_div(mixture, log_q, reduction="none", log_target=True).sum(-1)
    divergence = batch.alpha * teacher + (1 - batch.alpha) * student
    return reduced(batch, divergence, chosen)


compute_fused_sdpo_loss = compute_sdpo_loss
