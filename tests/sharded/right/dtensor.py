"""tp with DTensors: logits redistributed to every rank, or made by a matmul of a replicated and a cut DTensor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch.distributed.tensor import Replicate

from sdpo_implementations.reference.loss import compute_sdpo_loss as of_one_process

SDPO_CLAIMS = {"mesh": ["tp"], "dtensor": True}


def compute_sdpo_loss(loss_input: Any) -> Any:
    return _loss(loss_input, loss_input.student_logits)


def compute_fused_sdpo_loss(loss_input: Any) -> Any:
    hidden, head = loss_input.student_hidden, loss_input.lm_head_weight
    return _loss(loss_input, hidden.float() @ head.float().T)


def _loss(loss_input: Any, logits: Any) -> Any:
    """The rest on local tensors: every rank holds all of it, and what comes back to the logits is whole."""
    whole = logits.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])
    names = ("teacher_logprobs", "teacher_indices", "base_logprobs", "response_mask", "old_student_logprobs")
    tokens = {name: getattr(loss_input, name).to_local() for name in (*names, "response_ids")}
    return of_one_process(
        SimpleNamespace(student_logits=whole[..., : loss_input.vocab_size], training=loss_input.training, **tokens)
    )
