"""Losses that misbehave on one rank: it raises, never joins a collective, or ends. Log-probs that keep a graph."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from sdpo_implementations import reference


def _raises(loss_input: Any) -> Any:
    if dist.get_rank() == 1:
        raise RuntimeError("this rank has had enough")
    return reference.compute_sdpo_loss(loss_input)


def _leaves_early(loss_input: Any) -> Any:
    if dist.get_rank() == 1:
        return {"loss": loss_input.student_logits.sum() * 0.0, "distill_loss": 0.0, "kl_reg": 0.0}
    return reference.compute_sdpo_loss(loss_input)


def _dies(loss_input: Any) -> Any:
    if dist.get_rank() == 1:
        os._exit(3)
    return reference.compute_sdpo_loss(loss_input)


def _sleeps(loss_input: Any) -> Any:
    if dist.get_rank() == 1:
        time.sleep(3600)
    return reference.compute_sdpo_loss(loss_input)


def _with_graph(hidden: Any, head: Any, ids: Any, *, mesh: Any, vocab_start: int, vocab_size: int) -> Any:
    found = reference.compute_response_logprobs(
        hidden, head, ids, mesh=mesh, vocab_start=vocab_start, vocab_size=vocab_size
    )
    return found + 0 * hidden.sum()


raises = SimpleNamespace(compute_sdpo_loss=_raises)
leaves_early = SimpleNamespace(compute_sdpo_loss=_leaves_early)
dies = SimpleNamespace(compute_sdpo_loss=_dies)
sleeps = SimpleNamespace(compute_sdpo_loss=_sleeps)
keeps_a_graph = SimpleNamespace(compute_response_logprobs=_with_graph)
