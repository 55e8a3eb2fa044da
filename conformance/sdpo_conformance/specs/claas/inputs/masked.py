"""What may stand at masked positions: anything."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdpo_conformance.specs.claas.loss_case import LossCase


def with_garbage(case: LossCase, filling: float | None = None) -> LossCase:
    """The case with wild values, finite unless ``filling`` says otherwise, at every masked position."""
    masked = case.loss_input.response_mask.double() == 0
    generator = torch.Generator().manual_seed(int(masked.sum()))
    wild = {
        "student_logits": 30.0,
        "student_hidden": 1.0,
        "teacher_logprobs": 8.0,
        "base_logprobs": 90.0,
        "old_student_logprobs": 90.0,
    }
    changes: dict[str, Tensor] = {}
    for key, tensor in case.tensors().items():
        if key not in wild:
            continue
        if filling is None:
            size = wild[key] * (0.06 if tensor.dtype == torch.float16 else 1.0)
            if key == "student_hidden":
                head = case.tensors()["lm_head_weight"].double()
                size = wild["student_logits"] * size / wild[key] / float(head.abs().sum(-1).max())
            noise = size * (2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 1)
        else:
            noise = torch.full(tensor.shape, filling, dtype=torch.float64)
        where = masked.reshape(*masked.shape, *[1] * (tensor.dim() - 2))
        changes[key] = torch.where(where, noise.to(tensor.dtype), tensor)
    return case.with_fields(**changes)


def padded(case: LossCase) -> LossCase:
    """The case with three masked columns of garbage after the last token."""
    extra = 3
    changes: dict[str, Tensor] = {}
    for key, tensor in case.tensors().items():
        if key == "lm_head_weight":
            continue
        tail = tensor[:, -1:].expand(-1, extra, *tensor.shape[2:])
        if key == "response_mask":
            tail = torch.zeros_like(tail)
        changes[key] = torch.cat([tensor, tail], dim=1).contiguous()
    return with_garbage(case.with_fields(**changes))


def nan_or_inf_where_masked(case: LossCase) -> list[LossCase]:
    """The case with NaN, and with both infinities, at every masked position."""
    return [with_garbage(case, filling) for filling in (math.nan, math.inf, -math.inf)]
