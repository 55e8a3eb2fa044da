"""A workspace for each shape, kept between calls and used within one forward alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .analytic import results_and_gradient
from .shared import Computed, batch_of, replaced, working

_KEPT: dict[tuple[Any, ...], Tensor] = {}


def workspace(like: Tensor) -> Tensor:
    """An ordinary tensor, whatever mode it is asked for in."""
    key = (tuple(like.shape), working(like.dtype), like.device)
    if key not in _KEPT:
        with torch.inference_mode(False):
            _KEPT[key] = torch.empty(like.shape, dtype=working(like.dtype), device=like.device)
    return _KEPT[key]


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    logits = loss_input.student_logits
    with torch.no_grad():
        buffer = workspace(logits)
        buffer.copy_(logits)
        results, gradient = results_and_gradient(batch_of(replaced(loss_input, student_logits=buffer)))
    return {**results, "loss": Computed.apply(results["loss"], (gradient,), logits)}
