"""PyTorch's own fused linear cross-entropy as the refresh's log-probs, in chunks, so that no logits are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.adapters.availability import require

_linear_cross_entropy = require("torch.nn.functional", "linear_cross_entropy", "pip install 'torch>=2.13'")
_Options = require("torch.nn", "LinearCrossEntropyOptions", "pip install 'torch>=2.13'")


def compute_response_logprobs(student_hidden: Tensor, lm_head_weight: Tensor, response_ids: Tensor) -> Tensor:
    """Log-probs (B, T) of ``response_ids`` (B, T) from ``student_hidden`` (B, T, H) and ``lm_head_weight``
    (V, H), without graph."""
    with torch.no_grad():
        loss: Tensor = _linear_cross_entropy(
            student_hidden.flatten(0, 1), lm_head_weight, response_ids.flatten().long(),
            reduction="none", options=_Options(),
        )  # fmt: skip
    return -loss.view(response_ids.shape)
