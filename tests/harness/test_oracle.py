"""The oracle against three independent judges: upstream's recordings, mpmath, and finite differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from mpmath import mp, mpf

from sdpo_conformance.protocol import RESULT_KEYS, Capability
from sdpo_conformance.specs.claas.corners import EVERYTHING
from sdpo_conformance.specs.claas.inputs.losses import loss_cases
from sdpo_conformance.specs.claas.loss_case import LossCase, recorded_cases
from sdpo_conformance.specs.claas.oracle import sdpo_loss

RECORDED = list(recorded_cases())
SMALL = EVERYTHING.but(size="small", support=("few", "one", "whole"), layout="contiguous", incoming=1.0)
DOUBLE = [torch.float64]


@pytest.mark.parametrize(("case", "recorded"), RECORDED, ids=[case.name for case, _ in RECORDED])
def test_agrees_with_every_upstream_recording(case: LossCase, recorded: dict) -> None:
    truth = sdpo_loss(case.loss_input)
    for key in RESULT_KEYS:
        expected = recorded["expected"][key]
        assert abs(float(getattr(truth, key)) - expected) <= 1e-10 * abs(expected) + 1e-15, key
    gradient = recorded["gradient"]
    assert float((truth.grad_logits - gradient).abs().max()) <= 1e-10 * float(gradient.abs().max()) + 1e-15


def high_precision_loss(case: LossCase) -> dict[str, mpf]:
    """The formulas once more, token by token, in 60 digits, sharing no code with the oracle."""
    mp.dps = 60
    training, fields = case.training, case.loss_input
    alpha, total = mpf(training.alpha), {key: mpf(0) for key in RESULT_KEYS}
    mask = [[mpf(float(value)) for value in row] for row in fields.response_mask.double()]
    n = max(mp.fsum(mp.fsum(row) for row in mask), mpf(1))
    for b, row in enumerate(mask):
        for t, weight in enumerate(row):
            z = [mpf(float(value)) for value in fields.student_logits[b, t].double()]
            partition = mp.fsum(mp.exp(value) for value in z)
            support = fields.teacher_indices[b, t].tolist()
            tau = [mpf(float(value)) for value in fields.teacher_logprobs[b, t].double()]
            y = int(fields.response_ids[b, t])
            chosen = z[y] - mp.log(partition)
            if training.alpha < 1:
                p = [mp.exp(value) for value in tau]
                q = [mp.exp(z[index]) / partition for index in support]
                p = [value / max(mp.fsum(p), mpf("1e-8")) for value in p]
                q = [value / max(mp.fsum(q), mpf("1e-8")) for value in q]
                m = [alpha * a + (1 - alpha) * c for a, c in zip(p, q, strict=True)]
                d = alpha * mp.fsum(a * mp.log(a / k) for a, k in zip(p, m, strict=True)) if alpha > 0 else mpf(0)
                d += (1 - alpha) * mp.fsum(c * mp.log(c / k) for c, k in zip(q, m, strict=True))
            else:
                d = (chosen - (tau[support.index(y)] if y in support else mpf(-20))) * chosen
            log_ratio = chosen - mpf(float(fields.old_student_logprobs[b, t]))
            ratio = min(mp.exp(max(min(log_ratio, mpf(20)), mpf(-20))), mpf(training.is_clip))
            drift = max(min(chosen - mpf(float(fields.base_logprobs[b, t])), mpf(20)), mpf(-20))
            total["distill_loss"] += d * ratio * weight / n
            total["kl_reg"] += (mp.exp(drift) - 1 - drift) * weight / n
            total["mean_is_ratio"] += ratio * weight / n
            total["clip_fraction"] += (weight if ratio >= mpf(training.is_clip) else mpf(0)) / n
    total["loss"] = total["distill_loss"] + mpf(training.kl_reg_weight) * total["kl_reg"]
    return total


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(loss_cases(SMALL, Capability.LOSS, DOUBLE))
def test_agrees_with_a_high_precision_evaluation(case: LossCase) -> None:
    truth, exact = sdpo_loss(case.loss_input), high_precision_loss(case)
    slope = 1 if case.training.alpha < 1 else 40  # a reverse KL multiplies a log-prob's rounding by nats
    size = slope * float((truth.ratio * truth.weight).sum()) * 1e-14 + 1e-16
    for key in ("distill_loss", "kl_reg", "mean_is_ratio", "loss"):
        expected = float(exact[key])
        assert abs(float(getattr(truth, key)) - expected) <= 1e-11 * abs(expected) + size, key
    margin = (truth.chosen - case.loss_input.old_student_logprobs).clamp(-20, 20).exp() - case.training.is_clip
    if float(margin.abs().min()) > 1e-9:
        assert float(truth.clip_fraction) == pytest.approx(float(exact["clip_fraction"]), abs=1e-12)


@settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(loss_cases(SMALL.but(alpha=("half", "inside", "near_zero", "near_one")), Capability.LOSS, DOUBLE))
def test_gradient_agrees_with_central_differences(case: LossCase) -> None:
    """The ratio is held: the derivative is that of D and of the anchor, not of the ratio."""
    truth = sdpo_loss(case.loss_input)

    def held(logits: torch.Tensor) -> torch.Tensor:
        moved = sdpo_loss(replace(case.loss_input, student_logits=logits))
        anchor = case.training.kl_reg_weight * moved.k3
        return ((moved.per_token * truth.ratio + anchor) * truth.weight).sum()

    logits = case.loss_input.student_logits
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        direction = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        step = 1e-5
        numeric = float(held(logits + step * direction) - held(logits - step * direction)) / (2 * step)
        analytic = float((truth.grad_logits * direction).sum())
        scale = float((truth.grad_logits * direction).abs().sum())
        noise = 1e-16 * float(truth.loss.abs() + 1 + (truth.ratio * truth.weight).sum()) / step  # each D's own rounding
        assert abs(numeric - analytic) <= 1e-5 * scale + 1e3 * noise


@settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(loss_cases(SMALL, Capability.LOSS, DOUBLE))
def test_gradient_sums_to_zero_over_the_vocabulary(case: LossCase) -> None:
    truth = sdpo_loss(case.loss_input)
    gradient = truth.grad_logits
    slopes = 1 + truth.ratio + case.training.kl_reg_weight * truth.k3.abs()  # each times the rounding of a softmax
    noise = 1e-14 * float((1 + case.loss_input.student_logits.abs().max()) * (slopes * truth.weight).max())
    assert float(gradient.sum(-1).abs().max()) <= noise + 1e-12 * float(gradient.abs().sum(-1).max())


def test_masked_positions_may_hold_anything() -> None:
    case = RECORDED[0][0]
    mask = torch.ones_like(case.loss_input.response_mask)
    mask[0, 1] = 0
    plain = case.with_fields(response_mask=mask)
    logits = plain.loss_input.student_logits.clone()
    logits[0, 1] = torch.nan
    filled = plain.with_fields(student_logits=logits)
    assert float(sdpo_loss(filled.loss_input).loss) == float(sdpo_loss(plain.loss_input).loss)


def test_alpha_is_not_symmetric() -> None:
    """A guard for the checks above: they would see swapped weights."""
    case = next(case for case, _ in RECORDED if case.name == "on_policy_alpha_0.3")
    swapped = case.with_training(alpha=0.7)
    assert float(sdpo_loss(case.loss_input).loss) != pytest.approx(float(sdpo_loss(swapped.loss_input).loss), rel=1e-3)
