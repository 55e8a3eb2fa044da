"""A teacher over the whole vocabulary, for peers that want one.

CLaaS hands over the teacher's top-k alone. Losses over the full vocabulary, or over the student's top-k, need
the teacher elsewhere too. The completion used here gives every token outside the top-k an equal share of the
mass that is left, which is what the top-k says and no more; with K = V it is the teacher itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def complete_teacher(teacher_logprobs: Tensor, teacher_indices: Tensor, vocabulary: int) -> Tensor:
    """Log-probs (B, T, V), in the dtype of ``teacher_logprobs`` (B, T, K), from the top-k at
    ``teacher_indices`` (B, T, K); the tokens outside share what ``1 - sum exp(teacher_logprobs)`` leaves."""
    known = teacher_logprobs.double()
    left = (1.0 - known.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(torch.float32).tiny)
    outside = left.log() - math.log(max(vocabulary - known.shape[-1], 1))
    full = outside.expand(*known.shape[:-1], vocabulary).clone()
    full.scatter_(-1, teacher_indices.long(), known)
    return full.to(teacher_logprobs.dtype)
