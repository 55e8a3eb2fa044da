"""How far a right implementation of ms-swift's loss may be from the oracle, per unit. See specs/shared/rounding.py."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_conformance.specs.ms_swift.loss_input import MsSwiftLossInput
from sdpo_conformance.specs.ms_swift.oracle import paired, teacher_slope
from sdpo_conformance.specs.shared.loss_errors import FLOAT32_EPS, TOKENS_PER_ROUNDING
from sdpo_conformance.specs.shared.oracle.categories import slope
from sdpo_conformance.specs.shared.oracle.truth import SpecTruth
from sdpo_conformance.specs.shared.rounding import (
    SideErrors,
    divergence_errors,
    logprob_errors,
    renormalised_errors,
)
from sdpo_conformance.specs.shared.yardstick import Errors, epsilon


def ms_swift_errors(loss_input: MsSwiftLossInput, truth: SpecTruth, logits_error: Tensor | None = None) -> Errors:
    """Errors of the loss, of total and num_valid, and of the gradient by the logits. ``logits_error`` (B, S, V)."""
    pairs, training, beta = paired(loss_input), loss_input.training, loss_input.training.beta
    log_q, log_p, tau = truth.aside["log_q"], truth.aside["log_p"], training.temperature
    eps_q = epsilon(loss_input.student_logits)
    given = loss_input.teacher_topk_logprobs if loss_input.teacher_logits is None else loss_input.teacher_logits
    assert given is not None
    eps_p = epsilon(given)
    eps = max(eps_q, eps_p)
    extra = None
    if logits_error is not None:
        rows = logits_error[pairs.where[:, 0], pairs.where[:, 1]]
        width = max(0, pairs.support.shape[-1] - rows.shape[-1])
        extra = torch.nn.functional.pad(rows, (0, width)).gather(-1, pairs.support) / tau
    hq = logprob_errors(pairs.student / tau, log_q, eps_q, tau != 1, extra)
    hp = logprob_errors(pairs.teacher / tau, log_p, eps_p, tau != 1)
    if pairs.borrowed < pairs.support.shape[-1] or pairs.support.shape[-1] > loss_input.student_logits.shape[-1]:
        hq = hp = torch.maximum(hq, hp)
    errors = divergence_errors(log_q, log_p, SideErrors(hq), SideErrors(hp), beta, eps)
    q, p = log_q.exp(), log_p.exp()
    moved_error = renormalised_errors(errors, slope(log_q, log_p, beta), q, hq, eps)
    summing = 2 + pairs.support.shape[-1] ** 0.5  # the rounding of a sum over the vocabulary grows as its root
    moved_error = moved_error + summing * eps * q * slope(log_q, log_p, beta).abs().sum(-1, keepdim=True)
    if pairs.borrowed < pairs.support.shape[-1]:
        through = teacher_slope(log_q, log_p, beta, False).abs()
        logs = torch.where(p > 0, log_p.abs(), 0.0) + torch.where(q > 0, log_q.abs(), 0.0) + 2
        each = through * (hp + eps) + (p + q) * (hq + hp + eps * logs)
        through_error = each + p * (each.sum(-1, keepdim=True) + through.sum(-1, keepdim=True) * (hp + eps))
        # Both paths meet in one logit, and what they add cancels.
        moved_error[:, pairs.borrowed :] = 2 * (moved_error + through_error)[:, pairs.borrowed :]

    count = errors.value.numel()
    b, s, v = loss_input.student_logits.shape
    rows = torch.zeros(count, max(v, pairs.support.shape[-1]), dtype=torch.float64)
    rows = rows.scatter_add(-1, pairs.support, moved_error)[:, :v]
    gradient = torch.zeros(b, s, v, dtype=torch.float64)
    gradient[pairs.where[:, 0], pairs.where[:, 1]] = rows / max(count, 1) / tau
    eps_sum = FLOAT32_EPS if eps > 1e-12 else eps
    relative = 4 * eps + eps_sum * (2 + count / TOKENS_PER_ROUNDING)
    values = truth.per_token[pairs.where[:, 0], pairs.where[:, 1]].abs()
    total = (errors.value + values * relative).sum()
    results = {
        "loss": total / max(count, 1),
        "total": total,
        "num_valid": torch.tensor(1e-6, dtype=torch.float64),
    }
    return Errors(results, gradient + truth.grad_logits.abs() * relative)
