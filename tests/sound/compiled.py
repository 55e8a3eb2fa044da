"""torch.compile around the arithmetic: traced and functionalised, shapes symbolic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .shared import LOG_FLOOR, NOWHERE, batch_of, reduced, surrogate


def _arithmetic(z: Tensor, tau: Tensor, support: Tensor, y: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    l = torch.log_softmax(z, -1)  # noqa: E741
    chosen = l.gather(-1, y[..., None]).squeeze(-1)
    l_k = l.gather(-1, support).clamp(min=NOWHERE)
    log_q = l_k - torch.logsumexp(l_k, -1, keepdim=True).clamp(min=LOG_FLOOR)
    log_p = tau - torch.logsumexp(tau, -1, keepdim=True).clamp(min=LOG_FLOOR)
    log_m = torch.logaddexp(log_p + alpha.log(), log_q + torch.log1p(-alpha))
    teacher = (log_p.exp() * (log_p - log_m)).sum(-1)
    student = (log_q.exp() * (log_q - log_m)).sum(-1)
    return alpha * teacher + (1 - alpha) * student, chosen


_compiled = torch.compile(_arithmetic, backend="aot_eager", dynamic=True)


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    batch = batch_of(loss_input)
    plain = batch.alpha >= 1 or batch.mask.numel() == 0 or not torch.is_grad_enabled()
    function = _arithmetic if plain else _compiled
    alpha = batch.z.new_tensor(0.5 if batch.alpha >= 1 else batch.alpha)
    divergence, chosen = function(batch.z, batch.tau, batch.support, batch.y, alpha)
    return reduced(batch, surrogate(batch, chosen) if batch.alpha >= 1 else divergence, chosen)


compute_fused_sdpo_loss = compute_sdpo_loss
