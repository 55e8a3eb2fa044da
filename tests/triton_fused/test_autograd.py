"""What a training loop may do with the loss besides calling backward once."""

from __future__ import annotations

import pytest
import torch

from sdpo_implementations import triton_fused
from sdpo_implementations.triton_fused import autograd

from .truth import Batch, make_batch


def gradients(batch: Batch) -> torch.Tensor:
    batch.student_hidden = batch.student_hidden.detach().requires_grad_()
    triton_fused.compute_fused_sdpo_loss(batch)["loss"].backward()
    assert batch.student_hidden.grad is not None
    return batch.student_hidden.grad


@pytest.mark.parametrize("kl_reg_weight", [0.0, 0.1])
def test_two_live_graphs_and_a_retained_one(device: torch.device, kl_reg_weight: float) -> None:
    first, second = (make_batch((1, 5), 90, 20, 6, seed=s).to(device) for s in (1, 2))
    first, second = (batch.with_training(kl_reg_weight=kl_reg_weight) for batch in (first, second))
    alone = [gradients(first), gradients(second)]
    for batch in (first, second):
        batch.student_hidden = batch.student_hidden.detach().requires_grad_()
    losses = [triton_fused.compute_fused_sdpo_loss(batch)["loss"] for batch in (first, second)]
    losses[0].backward(retain_graph=True)
    losses[1].backward()
    assert torch.equal(first.student_hidden.grad, alone[0])
    assert torch.equal(second.student_hidden.grad, alone[1])
    losses[0].backward()
    assert torch.allclose(first.student_hidden.grad, 2 * alone[0])


@pytest.mark.parametrize(("alpha", "kl_reg_weight", "spread"), [(0.5, 0.0, 1.0), (0.5, 0.1, 1.0), (0.5, 0.0, 6.0)])
def test_bitwise_repeatable(device: torch.device, alpha: float, kl_reg_weight: float, spread: float) -> None:
    batch = make_batch((2, 20), 90, 20, 6, spread=spread, least_likely_support=spread > 1).to(device)
    batch = batch.with_training(alpha=alpha, kl_reg_weight=kl_reg_weight)
    assert torch.equal(gradients(batch), gradients(batch))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kl_reg_weight", [0.0, 0.1])
def test_a_captured_graph_replays_loss_and_gradient(device: torch.device, kl_reg_weight: float) -> None:
    batch, other = (make_batch((2, 20), 300, 32, 6, seed=s).to(device) for s in (1, 2))
    batch, other = (of.with_training(kl_reg_weight=kl_reg_weight) for of in (batch, other))
    expected = gradients(other)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        gradients(batch)
        batch.student_hidden = batch.student_hidden.detach().requires_grad_()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=side):
            triton_fused.compute_fused_sdpo_loss(batch)["loss"].backward()
    with torch.no_grad():
        for name in ("student_hidden", "lm_head_weight", "teacher_logprobs", "teacher_indices", "base_logprobs",
                     "old_student_logprobs", "response_mask", "response_ids"):  # fmt: skip
            getattr(batch, name).copy_(getattr(other, name))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(batch.student_hidden.grad, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_dense_term_is_not_made(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, mode: type
) -> None:
    batch = make_batch((1, 5), 90, 20, 6).with_training(kl_reg_weight=0.1).to(device)
    batch.student_hidden.requires_grad_()
    expected = triton_fused.compute_fused_sdpo_loss(batch)["loss"].detach()
    monkeypatch.setattr(autograd, "expected_rows", None)
    with mode():
        loss = triton_fused.compute_fused_sdpo_loss(batch)["loss"]
    assert not loss.requires_grad
    assert torch.allclose(loss, expected)


def test_a_frozen_head_gets_no_product(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autograd, "head_gradient", None)
    gradients(make_batch((1, 5), 90, 20, 6).with_training(kl_reg_weight=0.1).to(device))


def test_the_gradient_beyond_the_support_comes_from_the_dense_term_alone(device: torch.device) -> None:
    """Above the floor the partition function cancels: rows of the head off the support do not matter."""
    batch = make_batch((1, 1), 90, 20, 6).to(device)
    batch.response_mask.fill_(1.0)
    batch.training.is_clip = 1e-3
    plain = gradients(batch)
    off = torch.ones(90, dtype=torch.bool, device=device)
    off[batch.teacher_indices.flatten()] = False
    off[batch.response_ids.flatten()] = False
    batch.lm_head_weight = torch.where(off.unsqueeze(-1), 0.0, batch.lm_head_weight)
    assert torch.allclose(gradients(batch), plain, rtol=1e-5, atol=0)
