"""A forward that keeps the logsumexp and nothing of size B x T x V; the backward recomputes from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .analytic import results_and_gradient
from .shared import batch_of, replaced


class FromLogsumexp(torch.autograd.Function):
    """Holds the input and recomputes the gradient when it is asked for."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, loss_input: Any, logits: Tensor) -> Tensor:
        ctx.loss_input = loss_input
        ctx.save_for_backward(logits, torch.logsumexp(logits.float(), -1))
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Any:
        logits, log_z = ctx.saved_tensors
        shifted = replaced(ctx.loss_input, student_logits=logits.to(log_z.dtype) - log_z[..., None])
        if logits.dtype == torch.float64:
            shifted = replaced(ctx.loss_input, student_logits=logits)
        _, gradient = results_and_gradient(batch_of(shifted))
        return None, None, (gradient * incoming).to(logits.dtype)


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    constants = replaced(loss_input, student_logits=loss_input.student_logits.detach())
    with torch.no_grad():
        results, _ = results_and_gradient(batch_of(constants))
    loss = FromLogsumexp.apply(results["loss"], constants, loss_input.student_logits)
    return {**results, "loss": loss}
