"""verl's fused linear cross-entropy, in Triton, as the refresh's log-probs. It returns the entropy too."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.adapters.availability import require

_linear_cross_entropy = require("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy", "pip install verl")


def compute_response_logprobs(student_hidden: Tensor, lm_head_weight: Tensor, response_ids: Tensor) -> Tensor:
    """Log-probs (B, T) of ``response_ids`` (B, T) from ``student_hidden`` (B, T, H) and ``lm_head_weight``
    (V, H), float32, without graph. H a multiple of 128, as verl asks."""
    with torch.no_grad():
        logprobs: Tensor
        logprobs, _ = _linear_cross_entropy(
            student_hidden.flatten(0, 1).contiguous(), lm_head_weight.contiguous(), response_ids.flatten(), 1.0, "none"
        )
    return logprobs.view(response_ids.shape)
