"""How far a right implementation of verl's ``forward_kl_topk`` may be from the oracle, per unit.

Beside rounding (specs/shared/rounding.py) there are three switches: a student log-prob within rounding of the clamp may
lose its gradient or not, a sum within rounding of 0 or of the cap may too. The published code computes the divergence
in float32 whatever comes in, so that is what float64 is held to here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_conformance.specs.shared.loss_errors import FLOAT32_EPS, mean_error
from sdpo_conformance.specs.shared.oracle.truth import SpecTruth, upcast
from sdpo_conformance.specs.shared.rounding import factor_of, logits_gradient_errors, logprob_errors
from sdpo_conformance.specs.shared.yardstick import Errors, epsilon
from sdpo_conformance.specs.verl_topk.loss_input import VerlTopKLossInput
from sdpo_conformance.specs.verl_topk.oracle import LEAST_TEMPERATURE

UNITS = 4.0
"""Units of rounding within which a switch may fall either way."""


def verl_topk_errors(loss_input: VerlTopKLossInput, truth: SpecTruth, logits_error: Tensor | None = None) -> Errors:
    """Errors of the loss, of the metrics, and of the gradient by the logits."""
    training, aside = loss_input.training, truth.aside
    l, support, a, b, raw, mask = (aside[key] for key in ("l", "support", "a", "b", "raw", "mask"))  # noqa: E741
    counted, tau = mask != 0, max(training.temperature, LEAST_TEMPERATURE)
    eps_z = max(epsilon(loss_input.student_logits), FLOAT32_EPS)
    eps = max(eps_z, epsilon(loss_input.teacher_logprobs))
    z = torch.where(counted.unsqueeze(-1), upcast(loss_input.student_logits), 0.0) / tau
    l_error = logprob_errors(z, l, eps_z, tau != 1, None if logits_error is None else logits_error / tau)
    lowest = -torch.inf if training.log_prob_min_clamp is None else training.log_prob_min_clamp
    highest = torch.inf if training.loss_max_clamp is None else training.loss_max_clamp

    teacher, student = b.clamp(min=lowest), a.clamp(min=lowest)
    finite = torch.where(teacher.isinf(), 0.0, teacher)
    p, a_error = teacher.exp(), l_error.gather(-1, support)
    moving = a >= lowest
    near = (a - lowest).abs() <= UNITS * a_error
    a_error = torch.where(moving | near, a_error, eps * (student.abs() + 1))
    b_error = eps * (finite.abs() + 1)
    difference = torch.where(p > 0, finite - student, 0.0)
    terms = p * (finite.abs() + torch.where(student.isinf(), 0.0, student.abs()) + 1)
    raw_error = (p * a_error + p * (difference.abs() + 1) * b_error + 2 * eps * terms).sum(-1)
    value_error = torch.where((raw < -UNITS * raw_error) | (raw > highest + UNITS * raw_error), 0.0, raw_error)

    at_support_error = p * (b_error + 2 * eps) + torch.where(near, p / factor_of(eps), 0.0)
    moves = (raw >= 0) & (raw.clamp(min=0.0) <= highest)
    switching = (raw.abs() <= UNITS * raw_error) | ((raw - highest).abs() <= UNITS * raw_error)
    at_support = torch.where(moving & moves.unsqueeze(-1), -p, 0.0)
    pushed = torch.where(moving | near, p, 0.0)
    at_support_error = torch.where(
        switching.unsqueeze(-1),
        pushed / factor_of(eps) + at_support_error,
        torch.where(moves.unsqueeze(-1), at_support_error, 0.0),
    )
    gradient = logits_gradient_errors(at_support, at_support_error, support, l, l_error, eps)

    relative = 3 * eps + mean_error(mask, loss_input.response_mask.dtype, eps_z)
    factor = torch.nan_to_num(truth.factor.abs(), posinf=0.0)
    loss = (factor * (value_error + truth.per_token.abs() * relative)).sum()
    to_logits = factor.unsqueeze(-1) * gradient / tau + truth.grad_logits.abs() * (relative + eps)

    def mean_of(error: Tensor) -> Tensor:
        chosen = error[counted]
        return chosen.mean() if chosen.numel() else chosen.sum()

    def most(error: Tensor) -> Tensor:
        chosen = error[counted]
        return chosen.max() if chosen.numel() else chosen.sum()

    masses = [mean_of((one.exp() * error).sum(-1)) for one, error in ((a, l_error.gather(-1, support)), (b, b_error))]
    results = {
        "loss": loss,
        "loss_min": most(raw_error),
        "loss_max": most(raw_error),
        "student_mass": masses[0] + 2 * eps,
        "teacher_mass": masses[1] + 2 * eps,
    }
    return Errors(results, to_logits)
