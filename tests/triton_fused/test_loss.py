"""Both loss entries, values and gradients, over dtypes, objectives and shapes around tile edges."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sdpo_implementations import triton_fused
from sdpo_implementations.triton_fused.kernels import expected_row, head_gradient, logsumexp

from .truth import Batch, error, make_batch, true_loss

GRADIENT_BOUND = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
OBJECTIVES = [(0.5, 0.0), (0.3, 0.1), (1.0, 0.0), (1.0, 0.2), (0.0, 0.0), (0.0, 0.1), (1e-6, 0.0), (1 - 1e-6, 0.0)]


def check_fused(
    batch: Batch, device: torch.device, incoming: float = 1.0, head_gradient: bool = True, slack: float = 1.0
) -> None:
    results, to_hidden, to_head, _ = true_loss(batch)
    got = batch.to(device)
    got.student_hidden.requires_grad_()
    got.lm_head_weight.requires_grad_(head_gradient)
    out = triton_fused.compute_fused_sdpo_loss(got)
    assert list(out) == list(results)
    for name, value in results.items():
        assert error(out[name], value) < 3e-5, name
        assert out[name].dim() == 0
        assert out[name].requires_grad == (name == "loss")
    out["loss"].backward(torch.tensor(incoming, device=device))
    bound = slack * GRADIENT_BOUND[batch.student_hidden.dtype]
    assert got.student_hidden.grad is not None
    assert got.student_hidden.grad.dtype == batch.student_hidden.dtype
    assert error(got.student_hidden.grad, to_hidden * incoming) < bound
    if head_gradient:
        assert got.lm_head_weight.grad is not None
        assert error(got.lm_head_weight.grad, to_head * incoming) < bound
    else:
        assert got.lm_head_weight.grad is None


def check_logits(batch: Batch, device: torch.device, incoming: float = 1.0) -> None:
    """The logits entry gets the same hidden states' logits, rounded to the dtype."""
    dtype = batch.student_hidden.dtype
    z = batch.logits().to(dtype)
    identity = torch.eye(z.shape[-1], dtype=torch.float64)
    results, _, _, to_logits = true_loss(
        Batch(**{**vars(batch), "student_hidden": z.double(), "lm_head_weight": identity})
    )
    fields = vars(batch.to(device)) | {"student_logits": z.to(device).requires_grad_()}
    loss_input = SimpleNamespace(**fields)
    out = triton_fused.compute_sdpo_loss(loss_input)
    for name, value in results.items():
        assert error(out[name], value) < 3e-6, name
    out["loss"].backward(torch.tensor(incoming, device=device))
    assert error(loss_input.student_logits.grad, to_logits * incoming) < GRADIENT_BOUND[dtype]


@pytest.mark.parametrize(("alpha", "kl_reg_weight"), OBJECTIVES)
def test_objectives_in_float32(device: torch.device, alpha: float, kl_reg_weight: float) -> None:
    batch = make_batch((2, 9), 131, 40, 7).with_training(alpha=alpha, kl_reg_weight=kl_reg_weight)
    check_fused(batch, device)
    check_logits(batch, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("alpha", "kl_reg_weight"), [(0.5, 0.0), (0.5, 0.1), (1.0, 0.0)])
def test_half_precision(device: torch.device, dtype: torch.dtype, alpha: float, kl_reg_weight: float) -> None:
    batch = make_batch((2, 9), 131, 40, 7, dtype).with_training(alpha=alpha, kl_reg_weight=kl_reg_weight)
    check_fused(batch, device)
    check_logits(batch, device)


@pytest.mark.parametrize("kl_reg_weight", [0.0, 0.1])
@pytest.mark.parametrize(
    ("shape", "vocabulary", "width", "k"),
    [((1, 1), 1, 1, 1), ((1, 1), 2, 3, 2), ((1, 65), 64, 16, 64), ((3, 5), 513, 17, 33), ((1, 3), 1025, 129, 100)],
)
def test_shapes_around_tile_edges(
    device: torch.device, shape: tuple[int, int], vocabulary: int, width: int, k: int, kl_reg_weight: float
) -> None:
    batch = make_batch(shape, vocabulary, width, k, seed=3).with_training(kl_reg_weight=kl_reg_weight)
    batch.response_mask[0, 0] = 1.0
    check_fused(batch, device)
    check_logits(batch, device)


def test_support_of_1024(device: torch.device) -> None:
    check_fused(make_batch((1, 2), 1100, 16, 1024, seed=1), device)


@pytest.mark.parametrize("kl_reg_weight", [0.0, 0.1])
def test_rows_and_vocabulary_in_several_blocks(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, kl_reg_weight: float
) -> None:
    """Blocks as a long response and a wide head would meet them, at a size a test can afford."""
    for module in (expected_row, head_gradient):
        monkeypatch.setattr(module, "BUFFER_BYTES", 3 * 1024 * 4)
    monkeypatch.setattr(logsumexp, "ROW_BLOCK", 4)
    check_fused(make_batch((2, 5), 700, 24, 9, seed=2).with_training(kl_reg_weight=kl_reg_weight), device)


@pytest.mark.parametrize("kl_reg_weight", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(1, 4), (2, 40)])
def test_student_mass_below_the_floor(device: torch.device, shape: tuple[int, int], kl_reg_weight: float) -> None:
    """Few such tokens share the vocabulary between programs, many do not."""
    batch = make_batch(shape, 200, 48, 5, spread=6.0, least_likely_support=True)
    log_mass = batch.logits().log_softmax(-1).gather(-1, batch.teacher_indices).logsumexp(-1)
    assert (log_mass < -18.5).any()
    assert (log_mass > -18.3).any()
    batch.response_mask.clamp_(min=0.1)
    batch = batch.with_training(kl_reg_weight=kl_reg_weight)
    check_fused(batch, device, head_gradient=kl_reg_weight == 0, slack=20.0)
    check_logits(batch, device)


def test_a_support_far_below_the_floor_keeps_its_gradient(device: torch.device) -> None:
    """Some 1e-24 in float32: slope and softmax at the response are as small, their product is too small."""
    batch = make_batch((1, 3), 40, 16, 3)
    batch.student_hidden[..., 0] = 16.0
    batch.lm_head_weight[:, 0] = 0.0
    batch.lm_head_weight[7, 0] = 3.5
    batch.teacher_indices[:] = torch.tensor([1, 2, 3])
    batch.response_ids[:] = 2
    logprobs = batch.logits().log_softmax(-1)
    assert logprobs[..., 2].max() < -45
    batch.base_logprobs = (logprobs[..., 2] - 30.0).float()
    batch.old_student_logprobs = (logprobs[..., 2] + 25.0).float()
    check_fused(batch.with_training(kl_reg_weight=0.1), device, slack=20.0)


def test_incoming_gradient_and_frozen_head(device: torch.device) -> None:
    batch = make_batch((2, 6), 90, 20, 6)
    check_fused(batch, device, incoming=-3.5, head_gradient=False)
    check_logits(batch, device, incoming=-3.5)


def test_integer_and_bool_fields(device: torch.device) -> None:
    batch = make_batch((2, 6), 90, 20, 6)
    batch.teacher_indices, batch.response_ids = batch.teacher_indices.int(), batch.response_ids.int()
    for mask in (batch.response_mask != 0, (batch.response_mask != 0).long()):
        batch.response_mask = mask
        check_fused(batch, device)


def test_layouts(device: torch.device) -> None:
    """A slice, a transpose and an expansion are read where they lie or copied, never misread."""
    batch = make_batch((2, 6), 90, 20, 6)
    batch.old_student_logprobs = batch.old_student_logprobs[:1].expand(2, 6)
    results, to_hidden, _, _ = true_loss(batch)
    got = batch.to(device)
    wide = torch.zeros(2, 8, 24, device=device)
    wide[:, 1:7, :20] = got.student_hidden
    wide.requires_grad_()
    got.student_hidden = wide[:, 1:7, :20]
    got.lm_head_weight = got.lm_head_weight.T.contiguous().T
    got.teacher_indices = got.teacher_indices.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    loss = triton_fused.compute_fused_sdpo_loss(got)["loss"]
    loss.backward()
    assert error(loss, results["loss"]) < 3e-6
    assert error(wide.grad[:, 1:7, :20], to_hidden) < 2e-6


def test_divergence_with_a_gradient_per_token(device: torch.device) -> None:
    from .truth import divergence

    batch = make_batch((2, 7), 150, 30, 6, spread=5.0, least_likely_support=True)
    incoming = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    hidden = batch.student_hidden.double().requires_grad_()
    head = batch.lm_head_weight.double().requires_grad_()
    true = divergence((hidden @ head.T).log_softmax(-1), batch.teacher_logprobs, batch.teacher_indices, 0.3)
    true.backward(incoming)
    got = batch.to(device)
    got.student_hidden.requires_grad_()
    got.lm_head_weight.requires_grad_()
    out = triton_fused.compute_divergence(
        got.student_hidden, got.lm_head_weight, got.teacher_logprobs, got.teacher_indices, 0.3
    )
    out.backward(incoming.to(device).float())
    assert error(out.unsqueeze(-1), true.unsqueeze(-1)) < 3e-5
    assert error(got.student_hidden.grad, hidden.grad) < 1e-5
    assert error(got.lm_head_weight.grad, head.grad) < 1e-5
