"""What may stand where nothing counts: anything."""

from __future__ import annotations

from typing import Any

import torch

from sdpo_conformance.specs.shared.drawing import lengths_of

WILD = {
    "student_logits": 30.0,
    "teacher_logits": 30.0,
    "old_log_probs": 90.0,
    "old_per_token_logps": 90.0,
    "rollout_log_probs": 90.0,
    "rollout_is_weights": 9.0,
    "teacher_logprobs": 8.0,
    "teacher_topk_logprobs": 8.0,
    "teacher_actual_logprobs": 30.0,
}
"""Fields of token values -> how far garbage may be from 0."""


def ignored(case: Any) -> torch.Tensor:
    """(B, T) bool: where nothing counts."""
    mask = getattr(case.loss_input, case.kind.mask).double()
    rows = getattr(case.loss_input, case.kind.rows) if case.kind.rows else None
    found: torch.Tensor = (mask if rows is None else mask * rows.double().unsqueeze(-1)) == 0
    return found


def with_garbage(case: Any) -> Any:
    """The case with wild, finite values at every position that does not count."""
    where = ignored(case)
    generator = torch.Generator().manual_seed(int(where.sum()))
    changes = {}
    for key, tensor in case.tensors().items():
        if key not in WILD:
            continue
        padding = getattr(case.loss_input, case.kind.mask).double() == 0
        here = padding if key in ("rollout_log_probs", "old_log_probs") else where
        size = WILD[key] * (0.1 if tensor.dtype == torch.float16 else 1.0)
        noise = size * (2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 1)
        if key.endswith("logprobs") and tensor.dim() == 3:
            noise = -noise.abs()
        changes[key] = torch.where(here.reshape(*here.shape, *[1] * (tensor.dim() - 2)), noise.to(tensor.dtype), tensor)
    return case.with_fields(**changes)


def padded(case: Any) -> Any:
    """The case with a last column in which no row counts; the lengths, where the input has them, end before it."""
    width = case.loss_input.student_logits.shape[1]
    wide = case.columns([*range(width), width - 1])
    mask = getattr(wide.loss_input, case.kind.mask).clone()
    mask[:, -1] = 0
    lengths = {"response_lengths": lengths_of(mask)} if hasattr(case.loss_input, "response_lengths") else {}
    return wide.with_fields(**{case.kind.mask: mask}, **lengths)


def filled(case: Any, value: float) -> Any:
    """The case with ``value`` at every position that does not count, in the student's and the teacher's fields."""
    where = ignored(case)
    changes = {}
    for key, tensor in case.tensors().items():
        if key in WILD and key not in ("rollout_log_probs", "old_log_probs"):
            here = where.reshape(*where.shape, *[1] * (tensor.dim() - 2))
            changes[key] = torch.where(here, torch.full_like(tensor, value), tensor)
    return case.with_fields(**changes)
