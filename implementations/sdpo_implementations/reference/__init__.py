"""The reference: every capability in plain PyTorch, right before fast."""

from sdpo_implementations.reference.entries import (
    compute_divergence,
    compute_fused_sdpo_loss,
    compute_response_logprobs,
    compute_sdpo_loss,
    compute_teacher_topk,
)
from sdpo_implementations.reference.trainer import distill

SDPO_CLAIMS = {
    "dtypes": ["float32", "bfloat16", "float16", "float64"],
    "devices": ["cpu", "cuda"],
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
