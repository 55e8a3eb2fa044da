"""What docs/dialects.md says of each peer, seen by running it: where it agrees with the spec and where not.

Each test runs where its peer is importable. The whole-vocabulary cases (K = V) take the support out of the
comparison: there student's and teacher's top-k are the same set, and nothing is left for a tail bucket.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdpo_conformance.protocol import FusedSDPOLossInput, SDPOLossInput, TrainingConfig
from sdpo_conformance.specs.claas.oracle import sdpo_loss

ROWS, TOKENS, VOCABULARY = 2, 5, 23


def fields(k: int, alpha: float, drift: float, seed: int = 0) -> dict[str, Any]:
    """Random float64 inputs; ``drift``: how far the behaviour log-probs are from the current ones; the first
    row has two tokens that do not count."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    hidden, head = normal(ROWS, TOKENS, 8), normal(VOCABULARY, 8)
    teacher, where = torch.log_softmax(2 * normal(ROWS, TOKENS, VOCABULARY), -1).topk(k, dim=-1)
    ids = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=random)
    chosen = torch.log_softmax(hidden @ head.T, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    mask = torch.ones(ROWS, TOKENS, dtype=torch.float64)
    mask[0, -2:] = 0
    return {
        "student_hidden": hidden,
        "lm_head_weight": head,
        "teacher_logprobs": teacher,
        "teacher_indices": where,
        "base_logprobs": chosen + 0.3 * normal(ROWS, TOKENS),
        "response_mask": mask,
        "old_student_logprobs": chosen + drift * normal(ROWS, TOKENS),
        "response_ids": ids,
        "training": TrainingConfig(alpha=alpha, is_clip=2.0),
    }


def plain(k: int = VOCABULARY, alpha: float = 0.3, drift: float = 0.5, seed: int = 0) -> SDPOLossInput:
    values = fields(k, alpha, drift, seed)
    logits = values.pop("student_hidden") @ values.pop("lm_head_weight").T
    return SDPOLossInput(student_logits=logits.requires_grad_(), **values)


def fused(k: int = VOCABULARY, alpha: float = 0.3, drift: float = 0.5) -> FusedSDPOLossInput:
    values = fields(k, alpha, drift)
    return FusedSDPOLossInput(**{**values, "student_hidden": values["student_hidden"].requires_grad_()})


def one_row(loss_input: SDPOLossInput, row: int) -> SDPOLossInput:
    values = {
        key: value[row : row + 1].detach() if isinstance(value, Tensor) else value
        for key, value in vars(loss_input).items()
    }
    return SDPOLossInput(**values)


def mean_of_rows(loss_input: SDPOLossInput) -> float:
    """The spec's loss, averaged per row first, as TRL averages."""
    return sum(float(sdpo_loss(one_row(loss_input, row)).loss) for row in range(ROWS)) / ROWS


def forward_kl(loss_input: SDPOLossInput) -> float:
    """Sum over V of teacher * (log teacher - log student), times the ratio, token mean; K = V only."""
    student = torch.log_softmax(loss_input.student_logits, -1).gather(-1, loss_input.teacher_indices)
    teacher = loss_input.teacher_logprobs
    per_token = (teacher.exp() * (teacher - student)).sum(-1)
    truth = sdpo_loss(loss_input)
    return (per_token * truth.ratio * truth.weight).sum().item()


def close(got: Tensor, want: float, tolerance: float = 1e-9) -> bool:
    return abs(float(got.detach()) - want) <= tolerance * max(1.0, abs(want))


class TestLasgroup:
    @pytest.fixture
    def loss(self) -> Any:
        pytest.importorskip("verl.trainer.ppo.core_algos")
        from sdpo_implementations.adapters import lasgroup_sdpo

        return lasgroup_sdpo.compute_sdpo_loss

    def test_interior_over_the_whole_vocabulary_is_the_spec(self, loss: Any) -> None:
        loss_input = plain()
        result = loss(loss_input)
        truth = sdpo_loss(loss_input)
        assert close(result["loss"], float(truth.loss), 1e-5)  # the tail bucket holds 1e-7 by its clamp
        (gradient,) = torch.autograd.grad(result["loss"], loss_input.student_logits)
        torch.testing.assert_close(gradient, truth.grad_logits, rtol=0, atol=1e-5)

    def test_a_top_k_is_another_loss(self, loss: Any) -> None:
        loss_input = plain(k=6)
        assert not close(loss(loss_input)["loss"], float(sdpo_loss(loss_input).loss), 0.05)

    def test_alpha_zero_is_the_forward_kl(self, loss: Any) -> None:
        loss_input = plain(alpha=0.0)
        assert float(sdpo_loss(loss_input).loss) == 0
        assert close(loss(loss_input)["loss"], forward_kl(loss_input), 1e-5)

    def test_alpha_one_is_the_full_reverse_kl(self, loss: Any) -> None:
        loss_input = plain(alpha=1.0)
        student = torch.log_softmax(loss_input.student_logits, -1).gather(-1, loss_input.teacher_indices)
        per_token = (student.exp() * (student - loss_input.teacher_logprobs)).sum(-1)
        truth = sdpo_loss(loss_input)
        assert close(loss(loss_input)["loss"], (per_token * truth.ratio * truth.weight).sum().item(), 1e-5)

    def test_trl_with_a_tail_bucket_is_the_same_divergence(self, loss: Any) -> None:
        pytest.importorskip("trl.experimental.sdpo.loss_utils")
        from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

        from sdpo_implementations.adapters.teacher import complete_teacher

        for alpha in (0.0, 0.3, 1.0):
            loss_input = plain(k=6, alpha=alpha, drift=0.0)
            teacher = complete_teacher(loss_input.teacher_logprobs, loss_input.teacher_indices, VOCABULARY)
            per_token = compute_topk_self_distillation_loss(
                loss_input.student_logits,
                teacher,
                distillation_topk=6,
                distillation_alpha=alpha,
                distillation_add_tail=True,
            )
            want = (per_token * sdpo_loss(loss_input).weight).sum().item()
            assert close(loss(loss_input)["loss"], want)

    def test_reports_no_anchor_and_no_ratio(self, loss: Any) -> None:
        assert set(loss(plain())) == {"loss", "distill_loss"}

    def test_verls_k3_is_another_number(self, loss: Any) -> None:
        from verl.trainer.ppo.core_algos import kl_penalty_forward

        policy, base = torch.tensor([0.0, 2.0, -9.0]), torch.zeros(3)
        away = policy - base
        verls = kl_penalty_forward(policy, base, "low_var_kl")
        torch.testing.assert_close(verls, ((-away).exp() - 1 + away).clamp(-10, 10))
        assert not torch.allclose(verls, away.exp() - 1 - away)


class TestTRL:
    @pytest.fixture
    def trl(self) -> Any:
        pytest.importorskip("trl.experimental.sdpo.sdpo_trainer")
        from sdpo_implementations.adapters import trl_sdpo

        return trl_sdpo

    def test_interior_over_the_whole_vocabulary_averages_rows_first(self, trl: Any) -> None:
        loss_input = plain()
        result = trl.compute_sdpo_loss(loss_input)
        assert close(result["loss"], mean_of_rows(loss_input))
        assert not close(result["loss"], float(sdpo_loss(loss_input).loss), 1e-3)

    def test_teacher_server_has_the_specs_support(self, trl: Any) -> None:
        loss_input = plain(k=6)
        assert close(trl.teacher_server.compute_sdpo_loss(loss_input)["loss"], mean_of_rows(loss_input))
        assert not close(trl.compute_sdpo_loss(loss_input)["loss"], mean_of_rows(loss_input), 0.01)

    def test_sampled_token_is_the_reverse_kl_surrogate_on_the_support(self, trl: Any) -> None:
        loss_input = plain(alpha=1.0)
        result = trl.sampled_token.compute_sdpo_loss(loss_input)
        assert close(result["loss"], mean_of_rows(loss_input))
        with pytest.raises(ValueError, match=r"alpha=1\.0"):
            trl.sampled_token.compute_sdpo_loss(plain(alpha=0.5))

    def test_no_ratio_with_the_default_schedule(self, trl: Any) -> None:
        from trl.experimental.sdpo.sdpo_trainer import SDPOTrainer

        def old_logprobs(num_iterations: int) -> Any:
            trainer = SimpleNamespace(
                args=SimpleNamespace(steps_per_generation=4, gradient_accumulation_steps=4),
                num_iterations=num_iterations,
                model=None,
                _forward_logits=lambda *_: torch.zeros(1, 2, 3),
            )
            ids, mask = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2)
            return SDPOTrainer._compute_rollout_logps(trainer, ids, mask, ids, mask)

        assert old_logprobs(num_iterations=1) is None
        assert old_logprobs(num_iterations=2) is not None

    def test_gradient_arrives(self, trl: Any) -> None:
        loss_input = plain(k=6)
        for result in (trl.compute_sdpo_loss(loss_input), trl.teacher_server.compute_sdpo_loss(loss_input)):
            (gradient,) = torch.autograd.grad(result["loss"], loss_input.student_logits)
            assert gradient.isfinite().all()
            assert gradient.any()


class TestLiger:
    @pytest.fixture(params=["liger_chunked_jsd", "liger_triton_jsd"])
    def loss(self, request: pytest.FixtureRequest) -> Any:
        pytest.importorskip("liger_kernel.chunked_loss")
        if request.param == "liger_triton_jsd" and os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("the Triton kernel on the CPU needs TRITON_INTERPRET=1")
        import importlib

        module = importlib.import_module(f"sdpo_implementations.adapters.{request.param}")
        return module.compute_fused_sdpo_loss

    def test_on_policy_over_the_whole_vocabulary_is_the_spec(self, loss: Any) -> None:
        loss_input = fused(drift=0.0)
        result = loss(loss_input)
        truth = sdpo_loss(loss_input)
        assert close(result["loss"], float(truth.loss), 1e-5)
        (gradient,) = torch.autograd.grad(result["loss"], loss_input.student_hidden)
        want = truth.grad_logits @ loss_input.lm_head_weight
        torch.testing.assert_close(gradient, want, rtol=0, atol=1e-5)

    def test_has_no_importance_ratio(self, loss: Any) -> None:
        on_policy, drifted = fused(drift=0.0), fused(drift=0.0)
        drifted.old_student_logprobs = drifted.old_student_logprobs - 0.5
        assert loss(on_policy)["loss"].item() == loss(drifted)["loss"].item()
        assert not close(sdpo_loss(drifted).loss, float(sdpo_loss(on_policy).loss), 0.05)


def test_cut_cross_entropy_returns_the_response_logprobs() -> None:
    pytest.importorskip("cut_cross_entropy")
    from sdpo_implementations.adapters.cut_cross_entropy import compute_response_logprobs

    values = fields(VOCABULARY, 0.5, 0.0)
    hidden, head = values["student_hidden"].float().requires_grad_(), values["lm_head_weight"].float()
    got = compute_response_logprobs(hidden, head, values["response_ids"])
    assert not got.requires_grad
    want = torch.log_softmax(hidden.detach() @ head.T, -1).gather(-1, values["response_ids"].unsqueeze(-1))
    torch.testing.assert_close(got, want.squeeze(-1), rtol=0, atol=1e-5)
