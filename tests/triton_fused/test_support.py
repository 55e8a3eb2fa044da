"""Response log-probs, the teacher's top-k and its selection."""

from __future__ import annotations

import pytest
import torch

from sdpo_implementations import triton_fused
from sdpo_implementations.triton_fused.kernels import expected_row, logsumexp
from sdpo_implementations.triton_fused.kernels.selection import select_largest
from sdpo_implementations.triton_fused.kernels.vocabulary_product import SUBTILE

from .truth import make_batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_response_logprobs(device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch((2, 9), 600, 40, 4, dtype)
    true = batch.logits().log_softmax(-1).gather(-1, batch.response_ids.unsqueeze(-1)).squeeze(-1)
    got = batch.to(device)
    got.student_hidden.requires_grad_()
    whole = triton_fused.compute_response_logprobs(got.student_hidden, got.lm_head_weight, got.response_ids)
    assert not whole.requires_grad
    assert whole.dtype == torch.float32
    assert (whole.cpu().double() - true).abs().max() < 3e-6
    monkeypatch.setattr(logsumexp, "ROW_BLOCK", 5)
    parts = triton_fused.compute_response_logprobs(got.student_hidden, got.lm_head_weight, got.response_ids)
    assert torch.allclose(parts, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 7, 11, 100, 700, 5000])
def test_teacher_topk(device: torch.device, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """k below and above the number of stretches, above V, and rows in several blocks."""
    monkeypatch.setattr(expected_row, "BUFFER_BYTES", 5 * 1024 * 4)
    batch = make_batch((2, 6), 700, 40, 4, torch.bfloat16)
    true = batch.logits().log_softmax(-1)
    got = batch.to(device)
    values, indices = triton_fused.compute_teacher_topk(got.student_hidden, got.lm_head_weight, k)
    expected = true.topk(min(k, 700), dim=-1).values
    assert indices.dtype == torch.int64
    assert (values.cpu().double() - expected).abs().max() < 3e-6
    assert (true.gather(-1, indices.cpu()) - expected).abs().max() < 3e-6
    assert indices.sort(-1).values.diff(dim=-1).gt(0).all()


@pytest.mark.parametrize("k", [1, 3, 16])
def test_selection_is_exact_and_takes_exactly_k_of_equals(device: torch.device, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    logits = torch.randn(37, 16 * SUBTILE, generator=generator)
    logits[3] = 1.5
    logits[4] = torch.randint(0, 3, logits[4].shape, generator=generator).float()
    logits[5] = -logits[5].abs() - 1.0
    logits[6, 40:] = -torch.inf
    logits[7] = torch.where(torch.rand(logits[7].shape, generator=generator) < 0.5, 0.0, -0.0)
    logits = logits.to(device)
    maxima = logits.view(37, 16, SUBTILE).amax(-1)
    values = torch.full((37, k), torch.nan, device=device)
    indices = torch.full((37, k), -1, device=device)
    select_largest(logits, maxima, k, values, indices)
    assert torch.equal(values, logits.topk(k, dim=-1).values)
    assert torch.equal(logits.gather(-1, indices), values)
    assert indices.sort(-1).values.diff(dim=-1).gt(0).all()
