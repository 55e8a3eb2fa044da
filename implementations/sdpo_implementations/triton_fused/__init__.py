"""CLaaS SDPO in Triton, from hidden states: the ratio, the anchor and the refresh's log-probs included.

On a machine without a GPU the kernels run in Triton's interpreter: slowly, and on the CPU.
"""

from __future__ import annotations

from typing import Any

from sdpo_implementations.triton_fused.runtime import INTERPRETED  # isort: skip
from sdpo_implementations.triton_fused.entries import (
    compute_divergence,
    compute_fused_sdpo_loss,
    compute_response_logprobs,
    compute_sdpo_loss,
    compute_teacher_topk,
)
from sdpo_implementations.triton_fused.trainer import distill

SDPO_CLAIMS: dict[str, Any] = {
    "dtypes": ["float32", "bfloat16", "float16"],
    "devices": ["cpu", "cuda"] if INTERPRETED else ["cuda"],
    "mesh": ["dp", "cp", "tp"],
}

__all__ = [
    "SDPO_CLAIMS",
    "compute_divergence",
    "compute_fused_sdpo_loss",
    "compute_response_logprobs",
    "compute_sdpo_loss",
    "compute_teacher_topk",
    "distill",
]
