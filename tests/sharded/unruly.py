"""Losses that misbehave on one rank: one raises, one never joins a collective, one ends its process."""

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


raises = SimpleNamespace(compute_sdpo_loss=_raises)
leaves_early = SimpleNamespace(compute_sdpo_loss=_leaves_early)
dies = SimpleNamespace(compute_sdpo_loss=_dies)
sleeps = SimpleNamespace(compute_sdpo_loss=_sleeps)
