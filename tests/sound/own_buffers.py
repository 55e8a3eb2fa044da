"""In place throughout, on buffers of its own: the gradient is built where the logits were copied to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .shared import (
    LOG_FLOOR,
    NOWHERE,
    Computed,
    anchor,
    at,
    batch_of,
    importance_ratio,
    jensen_shannon,
    logarithm,
    renormalised,
    teacher_at_response,
)


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    logits = loss_input.student_logits
    with torch.no_grad():
        batch = batch_of(loss_input)
        buffer = batch.z.clone()
        log_z = torch.logsumexp(buffer, -1, keepdim=True)
        buffer.sub_(log_z)
        chosen = at(buffer, batch.y)
        l_k = buffer.gather(-1, batch.support).clamp_(min=NOWHERE)
        ratio = importance_ratio(batch, chosen)
        weight = batch.mask / batch.mask.sum().clamp(min=1)
        drift = chosen - batch.base
        onto_chosen = torch.expm1(drift.clamp(-20, 20)).mul_(weight).mul_(batch.kl_reg_weight)
        onto_chosen.masked_fill_(drift.abs() > 20, 0.0)
        buffer.exp_()
        everywhere = onto_chosen.clone()
        at_support: Tensor | None = None
        if batch.alpha >= 1:
            slope = chosen - teacher_at_response(batch)
            divergence = slope * chosen
            onto_chosen.addcmul_(slope * ratio, weight)
            everywhere.copy_(onto_chosen)
        else:
            log_p, log_q = renormalised(batch.tau), renormalised(l_k)
            divergence = jensen_shannon(log_p, log_q, batch.alpha)
            log_m = torch.logaddexp(log_p + logarithm(batch.alpha), log_q + logarithm(1 - batch.alpha))
            at_support = log_q.exp().mul_(log_q - log_m).mul_((1 - batch.alpha) * (ratio * weight)[..., None])
            total = at_support.sum(-1)
            floored = torch.logsumexp(l_k, -1) < LOG_FLOOR
            at_support.sub_(log_q.exp() * total.masked_fill(floored, 0.0)[..., None])
            everywhere.add_(total.masked_fill(~floored, 0.0))
        buffer.mul_(everywhere.neg_()[..., None])
        buffer.scatter_add_(-1, batch.y[..., None], onto_chosen[..., None])
        if at_support is not None:
            buffer.scatter_add_(-1, batch.support, at_support)
        distill_loss = (divergence * ratio * weight).sum()
        kl_reg = (anchor(batch, chosen) * weight).sum()
        loss = distill_loss + batch.kl_reg_weight * kl_reg
    return {
        "loss": Computed.apply(loss, (buffer,), logits),
        "distill_loss": distill_loss,
        "kl_reg": kl_reg,
        "mean_is_ratio": (ratio * weight).sum(),
        "clip_fraction": ((ratio >= batch.is_clip) * weight).sum(),
    }
