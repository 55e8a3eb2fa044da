"""The reference trainer: the shared step loop on the model's own logits, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdpo_conformance.protocol import DistillResult
from sdpo_implementations.reference.loss import compute_sdpo_loss
from sdpo_implementations.step_loop import Kernels
from sdpo_implementations.step_loop import distill as step_loop


def distill(
    model: Any, samples: Sequence[Any], training: Any, optimizer_cls: Any, *, mesh: Any = None
) -> DistillResult:
    """``sdpo_implementations.step_loop.distill`` from logits: any causal language model. With a 1-D ``mesh``, the
    samples, the same on every rank, are cut over its ranks (``sharded_step_loop``)."""
    if mesh is not None:
        from sdpo_implementations.sharded_step_loop import distill_on_ranks  # a second to import

        kernels = Kernels.from_logits(compute_sdpo_loss)
        return distill_on_ranks(model, samples, training, optimizer_cls, kernels, mesh)
    return step_loop(model, samples, training, optimizer_cls, Kernels.from_logits(compute_sdpo_loss))
