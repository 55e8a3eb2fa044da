"""The divergence as the mixture's entropy less the weighted entropies of its parts, in float64 where they cancel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .shared import at, batch_of, reduced, surrogate


def distribution(logprobs: Tensor) -> Tensor:
    """Probabilities on the support, their sum floored at 1e-8."""
    probabilities = logprobs.double().exp()
    return probabilities / probabilities.sum(-1, keepdim=True).clamp(min=1e-8)


class Entropy(torch.autograd.Function):
    """-x log x, whose slope at 0 is taken as 0: nothing moves there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.special.entr(x)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, -(x.log() + 1) * incoming, torch.zeros_like(x))


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    batch = batch_of(loss_input)
    l = torch.log_softmax(batch.z, -1)  # noqa: E741
    chosen = at(l, batch.y)
    if batch.alpha >= 1:
        return reduced(batch, surrogate(batch, chosen), chosen)
    p, q = distribution(batch.tau), distribution(l.gather(-1, batch.support))
    mixture = batch.alpha * p + (1 - batch.alpha) * q
    terms = Entropy.apply(mixture) - batch.alpha * Entropy.apply(p) - (1 - batch.alpha) * Entropy.apply(q)
    return reduced(batch, terms.sum(-1).to(chosen.dtype), chosen)


compute_fused_sdpo_loss = compute_sdpo_loss
