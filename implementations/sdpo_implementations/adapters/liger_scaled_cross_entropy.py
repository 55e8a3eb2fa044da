"""Liger's linear scaled cross-entropy as the refresh's log-probs: per-token NLL without logits in memory.

On a Hopper GPU its CuTe DSL kernel (``liger-kernel[cutedsl]``), elsewhere its chunked PyTorch path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.adapters.availability import require

_ScaledCrossEntropy = require(
    "liger_kernel.ops.fused_linear_scaled_cross_entropy",
    "LigerFusedLinearScaledCrossEntropyFunction",
    "pip install 'liger-kernel[cutedsl]'",
)


def compute_response_logprobs(student_hidden: Tensor, lm_head_weight: Tensor, response_ids: Tensor) -> Tensor:
    """Log-probs (B, T) of ``response_ids`` (B, T) from ``student_hidden`` (B, T, H) and ``lm_head_weight``
    (V, H), float32, without graph."""
    with torch.no_grad():
        loss: Tensor = _ScaledCrossEntropy.apply(
            student_hidden.flatten(0, 1).contiguous(), lm_head_weight, response_ids.flatten().long()
        )
    return -loss.view(response_ids.shape)
