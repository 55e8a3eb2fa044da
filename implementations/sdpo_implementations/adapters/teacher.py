"""What peers want of a teacher: one over the whole vocabulary, and a state dict as a module that they average.

CLaaS hands over the teacher's top-k alone. Losses over the full vocabulary, or over the student's top-k, need
the teacher elsewhere too. The completion used here gives every token outside the top-k an equal share of the
mass that is left, which is what the top-k says and no more; with K = V it is the teacher itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

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


def as_module(weights: Mapping[str, Tensor]) -> torch.nn.ParameterList:
    """A module that holds these parameters in their order, in place; a tensor under two names is one parameter."""
    each = {id(value): torch.nn.Parameter(value.detach()) for value in weights.values()}
    return torch.nn.ParameterList([each[id(value)] for value in weights.values()])
