"""Nothing is computed that the configuration does not ask for: no divergence at alpha = 0, an anchor without graph
where its weight is 0, no logits at all where every token is masked; metrics stay on the device."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .shared import NOWHERE, anchor, at, batch_of, importance_ratio, jensen_shannon, renormalised, surrogate


def nothing(loss_input: Any) -> Mapping[str, Any]:
    """Zeros, and a graph through which zeros flow."""
    leading = [
        tensor
        for name in ("student_logits", "student_hidden", "lm_head_weight")
        if (tensor := getattr(loss_input, name, None)) is not None
    ]
    zero = torch.zeros((), dtype=torch.float32, device=leading[0].device)
    loss = zero + sum(torch.where(torch.zeros_like(one, dtype=torch.bool), one, 0.0).sum() for one in leading)
    return {"loss": loss, **dict.fromkeys(("distill_loss", "kl_reg", "mean_is_ratio", "clip_fraction"), zero)}


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    if not (loss_input.response_mask != 0).any():
        return nothing(loss_input)
    batch = batch_of(loss_input)
    l = torch.log_softmax(batch.z, -1)  # noqa: E741
    chosen = at(l, batch.y)
    ratio = importance_ratio(batch, chosen)
    weight = batch.mask / batch.mask.sum().clamp(min=1)
    distill_loss: Tensor
    if batch.alpha == 0:
        distill_loss = (chosen * 0.0).nan_to_num().sum()
    else:
        if batch.alpha >= 1:
            divergence = surrogate(batch, chosen)
        else:
            log_q = renormalised(l.gather(-1, batch.support).clamp(min=NOWHERE))
            divergence = jensen_shannon(renormalised(batch.tau), log_q, batch.alpha)
        distill_loss = (divergence * ratio * weight).sum()
    anchored = batch.kl_reg_weight != 0
    with nullcontext() if anchored else torch.no_grad():
        kl_reg = (anchor(batch, chosen) * weight).sum()
    return {
        "loss": distill_loss + batch.kl_reg_weight * kl_reg if anchored else distill_loss,
        "distill_loss": distill_loss.detach(),
        "kl_reg": kl_reg.detach(),
        "mean_is_ratio": (ratio * weight).sum(),
        "clip_fraction": ((ratio >= batch.is_clip) * weight).sum(),
    }


compute_fused_sdpo_loss = compute_sdpo_loss
