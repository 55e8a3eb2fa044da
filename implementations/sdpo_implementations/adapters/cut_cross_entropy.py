"""apple/ml-cross-entropy as the refresh's log-probs: its per-token loss is the negative of what is wanted.

On CUDA its Triton kernels, elsewhere its PyTorch path without torch.compile, which changes the speed alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.adapters.availability import require

_linear_cross_entropy = require("cut_cross_entropy", "linear_cross_entropy", "pip install cut-cross-entropy")


def compute_response_logprobs(student_hidden: Tensor, lm_head_weight: Tensor, response_ids: Tensor) -> Tensor:
    """Log-probs (B, T) of ``response_ids`` (B, T) from ``student_hidden`` (B, T, H) and ``lm_head_weight``
    (V, H), float32, without graph."""
    impl = "cce" if student_hidden.is_cuda else "torch_compile"
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        loss: Tensor = _linear_cross_entropy(
            student_hidden, lm_head_weight, response_ids.long(), reduction="none", impl=impl
        )
    return -loss
