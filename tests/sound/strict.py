"""Takes what CLaaS's trainer hands over and refuses the rest by name: numbers that are no floats, an infinite cap,
dtypes that do not belong together, a vocabulary of one token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from . import log_space

MASKS = (torch.float32, torch.bool, torch.int64, torch.int32, torch.uint8)


def refuse(loss_input: Any) -> None:
    """Raise ValueError or TypeError for what is not supported."""
    training = loss_input.training
    for name in ("alpha", "is_clip", "kl_reg_weight"):
        if not isinstance(getattr(training, name), float):
            raise TypeError(f"{name} has to be a float")
    if not math.isfinite(training.is_clip) or training.is_clip <= 0 or not 0 <= training.alpha <= 1:
        raise ValueError("is_clip is a positive number, alpha lies in [0, 1]")
    fused = hasattr(loss_input, "student_hidden")
    leading = loss_input.student_hidden if fused else loss_input.student_logits
    vocabulary = loss_input.lm_head_weight.shape[0] if fused else leading.shape[-1]
    if vocabulary < 2:
        raise ValueError("one token is no vocabulary")
    if loss_input.response_mask.dtype not in (*MASKS, leading.dtype):
        raise TypeError(f"a mask of {loss_input.response_mask.dtype} is not supported")
    if loss_input.response_ids.dtype != loss_input.teacher_indices.dtype:
        raise TypeError("both id tensors have to be of one dtype")
    for name in ("teacher_logprobs", "base_logprobs", "old_student_logprobs"):
        if getattr(loss_input, name).dtype not in (torch.float32, leading.dtype):
            raise TypeError(f"{name} has to be float32 or of the logits' dtype")


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    refuse(loss_input)
    return log_space.compute_sdpo_loss(loss_input)


compute_fused_sdpo_loss = compute_sdpo_loss
