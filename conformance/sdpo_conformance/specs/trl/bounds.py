"""How far a right implementation of TRL's loss may be from the oracle, per unit. See specs/shared/rounding.py."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_conformance.specs.shared.loss_errors import mean_error, of_sampled_token, over_categories
from sdpo_conformance.specs.shared.oracle.truth import SpecTruth, upcast
from sdpo_conformance.specs.shared.rounding import logprob_errors, ratio_errors
from sdpo_conformance.specs.shared.yardstick import Errors, epsilon
from sdpo_conformance.specs.trl.loss_input import TRLLossInput
from sdpo_conformance.specs.trl.pipeline import finish_of


def trl_errors(loss_input: TRLLossInput, truth: SpecTruth, logits_error: Tensor | None = None) -> Errors:
    """Errors of the loss, and of its gradient by the logits."""
    training, aside = loss_input.training, truth.aside
    l, mask, support = aside["l"], aside["mask"], aside["support"]  # noqa: E741  (the symbol of the spec)
    counted, tau = mask != 0, training.temperature
    eps_z = epsilon(loss_input.student_logits)
    z = torch.where(counted.unsqueeze(-1), upcast(loss_input.student_logits), 0.0) / tau
    l_error = logprob_errors(z, l, eps_z, tau != 1, None if logits_error is None else logits_error / tau)
    y = loss_input.completion_ids.long().unsqueeze(-1)
    chosen, chosen_error = l.gather(-1, y).squeeze(-1), l_error.gather(-1, y).squeeze(-1)
    sampled = training.distillation_mode == "sampled_token"

    if training.use_teacher_server:
        assert loss_input.teacher_actual_logprobs is not None
        actual = torch.where(counted, upcast(loss_input.teacher_actual_logprobs), 0.0)
        eps_t = epsilon(loss_input.teacher_actual_logprobs)
        teacher_chosen, teacher_chosen_error = actual, eps_t * (actual.abs() + 1)
        if not sampled:
            assert loss_input.teacher_topk_logprobs is not None
            b = torch.where(counted.unsqueeze(-1), upcast(loss_input.teacher_topk_logprobs), 0.0)
            b_error = eps_t * (torch.where(b.isinf(), 0.0, b.abs()) + 1)
    else:
        assert loss_input.teacher_logits is not None
        eps_t, lt = epsilon(loss_input.teacher_logits), aside["lt"]
        zt = torch.where(counted.unsqueeze(-1), upcast(loss_input.teacher_logits), 0.0) / tau
        lt_error = logprob_errors(zt, lt, eps_t, tau != 1)
        teacher_chosen, teacher_chosen_error = (one.gather(-1, y).squeeze(-1) for one in (lt, lt_error))
        b, b_error = lt.gather(-1, support), lt_error.gather(-1, support)
    eps = max(eps_z, eps_t)

    if sampled:
        tokens = of_sampled_token(l, l_error, y, chosen - teacher_chosen, teacher_chosen_error, eps)
    else:
        tokens = over_categories(
            l,
            l_error,
            b,
            b_error,
            support,
            aside["log_q"],
            aside["log_p"],
            finish_of(training),
            training.distillation_alpha,
            aside["at_support"],
            eps,
        )
    relative = torch.full_like(chosen, 3 * eps) + mean_error(mask, loss_input.completion_mask.dtype, eps_z)
    if training.distillation_is_clip is not None and loss_input.old_per_token_logps is not None:
        old = torch.where(counted, upcast(loss_input.old_per_token_logps), 0.0)
        eps_old = max(eps_z, epsilon(loss_input.old_per_token_logps))
        relative = relative + ratio_errors(chosen, chosen_error, old, training.distillation_is_clip, eps_old)
    factor = truth.factor.abs()
    loss = (factor * (tokens.value + truth.per_token.abs() * relative)).sum()
    gradient = factor.unsqueeze(-1) * tokens.gradient / tau + truth.grad_logits.abs() * (relative + eps).unsqueeze(-1)
    fragile = tokens.fragile is not None and bool((tokens.fragile & counted).any())
    return Errors({"loss": loss}, gradient, fragile)
