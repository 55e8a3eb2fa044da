"""QuACK's product with the epilogue of a linear cross-entropy as the refresh's log-probs.

``lse_target_epi`` keeps each row's logsumexp and its response token's logit, both in float32, and writes no logits.
Hopper and later GPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.adapters.availability import require

_product = require("quack.epilogue.library", "lse_target_epi", "pip install 'quack-kernels[cu13]'")


def compute_response_logprobs(student_hidden: Tensor, lm_head_weight: Tensor, response_ids: Tensor) -> Tensor:
    """Log-probs (B, T) of ``response_ids`` (B, T) from ``student_hidden`` (B, T, H) and ``lm_head_weight``
    (V, H), float32, without graph."""
    with torch.no_grad():
        found = _product(
            student_hidden.flatten(0, 1).contiguous(), lm_head_weight.mT,
            store_d=False, target=response_ids.flatten(), tuned=False,
        )  # fmt: skip
    logprobs: Tensor = found["target_logit"] - found["lse"]
    return logprobs.view(response_ids.shape)
