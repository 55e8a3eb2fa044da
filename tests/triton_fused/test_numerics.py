"""Where the plain formulas overflow, underflow, cancel or divide 0 by 0."""

from __future__ import annotations

import math

import pytest
import torch

from sdpo_implementations import triton_fused

from .test_loss import check_fused, check_logits
from .truth import make_batch


def test_ratio_at_its_lower_clamp_is_relatively_right(device: torch.device) -> None:
    batch = make_batch((1, 6), 90, 20, 6)
    batch.old_student_logprobs += 40.0
    check_fused(batch, device)
    check_logits(batch, device)


@pytest.mark.parametrize("old", [math.inf, -math.inf])
def test_infinite_behaviour_logprobs(device: torch.device, old: float) -> None:
    batch = make_batch((1, 6), 90, 20, 6)
    batch.old_student_logprobs.fill_(old)
    check_fused(batch, device)
    check_logits(batch.with_training(is_clip=math.inf), device)


def test_logits_of_ten_thousand(device: torch.device) -> None:
    """One unit apart at 1e4: log-probs keep their low bits only if the maximum is subtracted first."""
    batch = make_batch((1, 6), 90, 20, 6)
    z = (batch.logits() * 8).round() / 8
    batch.student_hidden, batch.lm_head_weight = (z + 10000).float(), torch.eye(90)
    check_logits(batch, device)
    check_logits(batch.with_training(kl_reg_weight=0.1), device)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_masked_positions_may_hold_anything(device: torch.device, alpha: float) -> None:
    batch = make_batch((2, 6), 90, 20, 6).with_training(alpha=alpha, kl_reg_weight=0.1)
    masked = batch.response_mask == 0
    assert masked.any()
    batch.student_hidden[masked] = math.nan
    batch.teacher_logprobs[masked] = math.inf
    batch.old_student_logprobs[masked] = math.nan
    batch.base_logprobs[masked] = -math.inf
    batch.response_ids[masked] = -100
    batch.teacher_indices[masked] = -1
    check_fused(batch, device)


def test_no_token_counts(device: torch.device) -> None:
    batch = make_batch((2, 6), 90, 20, 6).with_training(kl_reg_weight=0.1)
    batch.response_mask.zero_()
    check_fused(batch, device)
    check_logits(batch, device)


def test_no_token_at_all(device: torch.device) -> None:
    batch = make_batch((2, 6), 90, 20, 6)
    empty = {name: value[:, :0] for name, value in vars(batch).items() if name not in ("lm_head_weight", "training")}
    for name, value in empty.items():
        setattr(batch, name, value)
    got = batch.to(device)
    got.student_hidden.requires_grad_()
    out = triton_fused.compute_fused_sdpo_loss(got)
    out["loss"].backward()
    assert out["loss"] == 0
    assert got.student_hidden.grad is not None
    head = got.lm_head_weight
    assert triton_fused.compute_response_logprobs(got.student_hidden, head, got.response_ids).shape == (2, 0)
    assert triton_fused.compute_teacher_topk(got.student_hidden, head, 3)[1].shape == (2, 0, 3)


def test_infinite_logits_in_and_off_the_support(device: torch.device) -> None:
    batch = make_batch((1, 6), 90, 20, 6)
    z = batch.logits().float()
    z[0, 1, batch.teacher_indices[0, 1, 2]] = -math.inf
    z[0, 2, 5] = -math.inf
    z[0, 3, batch.teacher_indices[0, 3]] = -math.inf
    z[0, 3, 0] = 1.0
    batch.response_ids[0, 1:4] = z[0, 1:4].argmax(-1)
    batch.response_mask.fill_(1.0)
    loss_input = batch.to(device)
    loss_input.student_logits = z.to(device).requires_grad_()
    out = triton_fused.compute_sdpo_loss(loss_input)
    out["loss"].backward()
    gradient = loss_input.student_logits.grad
    assert all(bool(value.isfinite()) for value in out.values())
    assert bool(gradient.isfinite().all())
    assert bool((gradient[0, 1, batch.teacher_indices[0, 1, 2]] == 0).all())


def test_equal_distributions_have_no_divergence(device: torch.device) -> None:
    batch = make_batch((1, 6), 90, 20, 6)
    batch.teacher_logprobs = batch.logits().log_softmax(-1).gather(-1, batch.teacher_indices).float() + 0.7
    got = batch.to(device)
    out = triton_fused.compute_divergence(
        got.student_hidden, got.lm_head_weight, got.teacher_logprobs, got.teacher_indices, 0.4
    )
    assert out.abs().max() < 1e-12


def test_alpha_zero_is_exactly_nothing(device: torch.device) -> None:
    got = make_batch((2, 6), 90, 20, 6).with_training(alpha=0.0).to(device)
    got.student_hidden.requires_grad_()
    out = triton_fused.compute_fused_sdpo_loss(got)
    out["loss"].backward()
    assert out["loss"] == 0
    assert bool((got.student_hidden.grad == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_response_tokens_of_vanishing_probability(device: torch.device, dtype: torch.dtype, alpha: float) -> None:
    """The dense direction is stored relative to the response's logit, which here lies far below the others."""
    batch = make_batch((1, 8), 300, 40, 6, dtype, spread=14.0).with_training(alpha=alpha, kl_reg_weight=0.1)
    batch.response_mask.fill_(1.0)
    z = batch.logits()
    batch.response_ids[0, :6] = z.argmin(-1)[0, :6]
    chosen = z.log_softmax(-1).gather(-1, batch.response_ids.unsqueeze(-1)).squeeze(-1)
    assert chosen.min() < -65
    batch.old_student_logprobs = batch.base_logprobs = (chosen + 0.3).float()
    check_fused(batch, device, slack=30.0)
