"""Inputs that no corner draws: shapes of their own, values between and beyond the corners', and what a caller may hand
over where an implementation may refuse it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.inputs.numbers import Numbers
from sdpo_conformance.judging.call import is_fused_entry
from sdpo_conformance.protocol import Capability, FusedSDPOLossInput, SDPOLossInput, TrainingConfig
from sdpo_conformance.specs.claas.inputs.losses import Shape
from sdpo_conformance.specs.claas.loss_case import LossCase

ORDINARY = Shape(b=2, t=3, v=19, k=5, h=8)

SHAPES = (
    Shape(b=5, t=4, v=9, k=8, h=9),
    Shape(b=8, t=2, v=1000, k=100, h=3),
    Shape(b=7, t=1, v=64, k=32, h=1),
    Shape(b=4, t=8, v=100, k=20, h=128),
    Shape(b=2, t=3, v=2, k=2, h=2),
    Shape(b=1, t=1, v=151_937, k=20, h=2),
)
"""Five, seven and eight rows, all but one token as support, the default top-k, hidden states as wide as the vocabulary
or of a number or two, a vocabulary of two tokens, and one past 2^17."""

ALPHAS = (0.25, 0.75, 1 / 3, 0.2, 0.45, 0.55, 0.6, 0.8, 0.95, 0.05)
"""Between those that the corners draw."""

CLIPS = (0.005, 0.1, 1.1, 2.0, 4.0, 8.0)
WEIGHTS = (1e-5, 0.05, 0.5, 10.0)
"""Caps and weights of the anchor, between and beyond those of the corners."""

MASK_DTYPES = (torch.float64, torch.bfloat16, torch.float16, torch.int16, torch.int8)
"""Masks may be bool, integer or float; the corners have the others."""


def special_case(
    entry: Capability, dtype: torch.dtype, seed: int, shape: Shape = ORDINARY, anchor: float = 0.1
) -> LossCase:
    """A batch off-policy and off its base; the last token is masked where there is another, and a mask at all."""
    numbers, (b, t, v) = Numbers(seed), (shape.b, shape.t, shape.v)
    leading: dict[str, Tensor]
    if is_fused_entry(entry):
        hidden, head = numbers.normal(b, t, shape.h), numbers.normal(v, shape.h) * 1.5 / math.sqrt(shape.h)
        leading = {"student_hidden": hidden.to(dtype), "lm_head_weight": head.to(dtype)}
        z = leading["student_hidden"].double() @ leading["lm_head_weight"].double().T
    else:
        leading = {"student_logits": (1.5 * numbers.normal(b, t, v)).to(dtype)}
        z = leading["student_logits"].double()
    teacher = (z + numbers.normal(b, t, v)).log_softmax(-1)
    tau, support = torch.topk(teacher, shape.k, dim=-1)
    y = torch.where(numbers.uniform(0, 1, b, t) < 0.5, support[..., -1], numbers.below(v, b, t))
    chosen = z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    mask = torch.ones(b, t, dtype=dtype)
    if b * t > 1 and entry is not Capability.DIVERGENCE:
        mask[-1, -1] = 0.0
    fields = {
        "teacher_logprobs": tau.to(dtype),
        "teacher_indices": support,
        "base_logprobs": (chosen - numbers.normal(b, t)).to(dtype),
        "response_mask": mask,
        "old_student_logprobs": (chosen - numbers.uniform(0.4, 2.5, b, t)).to(dtype),
        "response_ids": y,
    }
    kind: Any = FusedSDPOLossInput if is_fused_entry(entry) else SDPOLossInput
    return LossCase(kind(training=TrainingConfig(kl_reg_weight=anchor), **leading, **fields))


def special_shapes(entry: Capability, dtype: torch.dtype, seed: int) -> Iterator[LossCase]:
    """Each of ``SHAPES``."""
    for number, shape in enumerate(SHAPES):
        yield special_case(entry, dtype, seed + number, shape)


def special_heads(entry: Capability, dtype: torch.dtype, seed: int) -> Iterator[LossCase]:
    """A head of which two rows are alike and one is 0, as padded vocabularies have; hidden states of 0."""
    case = special_case(entry, dtype, seed)
    hidden, head = (case.tensors()[key].clone() for key in ("student_hidden", "lm_head_weight"))
    head[-1], head[1] = head[-2], 0.0
    yield replace(case.with_fields(lm_head_weight=head), trainable_head=True)
    hidden[:, 0] = 0.0
    yield replace(case.with_fields(student_hidden=hidden), trainable_head=True)


def with_values(case: LossCase, name: str, values: tuple[float, ...]) -> Iterator[LossCase]:
    """The case with each value of a hyperparameter."""
    for value in values:
        yield case.with_training(**{name: value})


def with_masks(entry: Capability, dtype: torch.dtype, seed: int) -> Iterator[LossCase]:
    """The ordinary case with its mask in each of ``MASK_DTYPES``."""
    case = special_case(entry, dtype, seed)
    for mask_dtype in MASK_DTYPES:
        yield case.with_fields(response_mask=case.loss_input.response_mask.to(mask_dtype))


def otherwise_typed(entry: Capability, dtype: torch.dtype, seed: int) -> Iterator[LossCase]:
    """Only one of the id tensors int32, log-probs in float64, and a vocabulary of one token."""
    case = special_case(entry, dtype, seed)
    changes: tuple[Mapping[str, torch.dtype], ...] = (
        {"response_ids": torch.int32},
        {"teacher_indices": torch.int32},
        {"old_student_logprobs": torch.float64},
        {"base_logprobs": torch.float64},
        {"teacher_logprobs": torch.float64},
    )
    tensors = case.tensors()
    for change in changes:
        yield case.with_fields(**{key: tensors[key].to(kind) for key, kind in change.items()})
    yield special_case(entry, dtype, seed, Shape(b=2, t=2, v=1, k=1, h=3))


def negative_zeros(case: LossCase) -> LossCase:
    """The case with recorded log-probs of -0.0, those of the behaviour and of the base policy."""
    zeros = torch.full_like(case.loss_input.old_student_logprobs, -0.0)
    return case.with_fields(old_student_logprobs=zeros, base_logprobs=zeros.to(case.loss_input.base_logprobs.dtype))


def base_outside_its_support(case: LossCase) -> LossCase:
    """The case with base log-probs of -inf at every second token."""
    base = case.loss_input.base_logprobs.clone()
    base.view(-1)[::2] = -torch.inf
    return case.with_fields(base_logprobs=base)
