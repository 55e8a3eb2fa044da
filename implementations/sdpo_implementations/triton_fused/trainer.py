"""Training with the fused loss: the shared step loop on hidden states, ratio and refresh included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdpo_implementations.step_loop import Kernels
from sdpo_implementations.step_loop import distill as step_loop
from sdpo_implementations.triton_fused.entries import (
    compute_fused_sdpo_loss,
    compute_response_logprobs,
    compute_teacher_topk,
)


def distill(
    model: Any,
    samples: Sequence[Any],
    training: Any,
    optimizer_cls: Any,
    *,
    mesh: Any = None,
    token_budget: int | None = None,
) -> Mapping[str, Any]:
    """``sdpo_implementations.step_loop.distill`` from hidden states, samples sharing forwards.

    ``token_budget``: the most tokens of one forward; None: what fits the free memory, 16384 at most
    (``sdpo_implementations.micro_batches``). A longer sample goes alone.

    For a ``PeftModel`` whose logits are its last hidden states times one weight matrix and a constant; a head
    with a bias, a final softcap or an adapter of its own is refused with a ValueError. With a 1-D ``mesh``, the
    samples, the same on every rank, are cut over its ranks (``sharded_step_loop``), each alone in its forward: a
    ``token_budget`` beside it is refused with a ValueError.
    """
    kernels = Kernels.from_hidden_states(compute_fused_sdpo_loss, compute_response_logprobs, compute_teacher_topk)
    if mesh is not None:
        from sdpo_implementations.sharded_step_loop import distill_on_ranks  # a second to import

        if token_budget is not None:
            raise ValueError("token_budget has no meaning with a mesh: its ranks take one sample at a time")
        return distill_on_ranks(model, samples, training, optimizer_cls, kernels, mesh)
    return step_loop(model, samples, training, optimizer_cls, kernels, token_budget)
