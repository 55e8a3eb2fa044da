"""How far a right implementation of lasgroup's loss may be from the oracle, per unit. See specs/shared/rounding.py."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_conformance.specs.lasgroup.loss_input import LasgroupLossInput
from sdpo_conformance.specs.lasgroup.oracle import ROW_FLOOR
from sdpo_conformance.specs.lasgroup.pipeline import finish_of
from sdpo_conformance.specs.shared.loss_errors import mean_error, of_sampled_token, over_categories
from sdpo_conformance.specs.shared.oracle.truth import SpecTruth, upcast
from sdpo_conformance.specs.shared.rounding import logprob_errors, ratio_errors
from sdpo_conformance.specs.shared.yardstick import Errors, epsilon


def weight_errors(loss_input: LasgroupLossInput, mask: Tensor, eps: float) -> Tensor:
    """(B, T) relative errors of the rollout weight."""
    training = loss_input.training
    if loss_input.rollout_log_probs is None or loss_input.old_log_probs is None:
        return torch.full_like(mask, eps)
    responded = upcast(loss_input.response_mask) != 0
    zero = torch.zeros_like(mask)
    old, rollout = (
        torch.where(responded, torch.nan_to_num(upcast(one), posinf=0.0, neginf=0.0), zero)
        for one in (loss_input.old_log_probs, loss_input.rollout_log_probs)
    )
    each = eps * (old.abs() + rollout.abs() + (old - rollout).abs())
    if training.rollout_is == "sequence":
        each = each.sum(-1, keepdim=True).expand_as(each)
    each = each + 3 * eps
    if training.rollout_is_batch_normalize:
        each = each + (each.max() if each.numel() else 0.0) + mean_error(mask, loss_input.response_mask.dtype, eps)
        tokens = upcast(loss_input.response_mask).sum(-1)
        # No rule asks for the published guard against an empty row beside a row's sum.
        each = each + 2 * ROW_FLOOR / (tokens[tokens > 0].min() if bool((tokens > 0).any()) else 1.0)
    return each


def lasgroup_errors(loss_input: LasgroupLossInput, truth: SpecTruth, logits_error: Tensor | None = None) -> Errors:
    """Errors of the loss, and (B, T, V) of its gradient by the logits; ``logits_error``: what logits that are made of
    hidden states come with."""
    training, aside = loss_input.training, truth.aside
    l, lt, mask, support = aside["l"], aside["lt"], aside["mask"], aside["support"]  # noqa: E741
    counted = (mask != 0).unsqueeze(-1)
    tau, tempered = training.temperature, training.temperature != 1
    eps_z, eps_t = epsilon(loss_input.student_logits), epsilon(loss_input.teacher_logits)
    eps = max(eps_z, eps_t)
    z, zt = (
        torch.where(counted, upcast(one), 0.0) / tau for one in (loss_input.student_logits, loss_input.teacher_logits)
    )
    given = None if logits_error is None else logits_error / tau
    l_error, lt_error = logprob_errors(z, l, eps_z, tempered, given), logprob_errors(zt, lt, eps_t, tempered)
    y = loss_input.response_ids.long().unsqueeze(-1)
    chosen, chosen_error = l.gather(-1, y).squeeze(-1), l_error.gather(-1, y).squeeze(-1)

    if training.full_logit_distillation:
        finish, log_q, log_p = finish_of(training), aside["log_q"], aside["log_p"]
        at_support = aside["at_support"]
        tokens = over_categories(
            l,
            l_error,
            lt.gather(-1, support),
            lt_error.gather(-1, support),
            support,
            log_q,
            log_p,
            finish,
            training.alpha,
            at_support,
            eps,
        )
    else:
        difference = chosen - lt.gather(-1, y).squeeze(-1)
        tokens = of_sampled_token(l, l_error, y, difference, lt_error.gather(-1, y).squeeze(-1), eps)

    relative = torch.full_like(chosen, 3 * eps) + mean_error(mask, loss_input.response_mask.dtype, eps_z)
    if training.is_clip is not None and loss_input.old_log_probs is not None:
        old = torch.where(mask != 0, upcast(loss_input.old_log_probs), 0.0)
        eps_old = max(eps_z, epsilon(loss_input.old_log_probs))
        relative = relative + ratio_errors(chosen, chosen_error, old, training.is_clip, eps_old)
    if loss_input.rollout_is_weights is not None or loss_input.rollout_log_probs is not None:
        sources = (loss_input.old_log_probs, loss_input.rollout_log_probs, loss_input.rollout_is_weights)
        eps_w = max([eps_z, *(epsilon(one) for one in sources if one is not None)])
        relative = relative + weight_errors(loss_input, mask, eps_w)
    factor = truth.factor.abs()
    loss = (factor * (tokens.value + truth.per_token.abs() * relative)).sum()
    gradient = factor.unsqueeze(-1) * tokens.gradient / tau + truth.grad_logits.abs() * (relative + eps).unsqueeze(-1)
    fragile = tokens.fragile is not None and bool((tokens.fragile & (mask != 0)).any())
    return Errors({"loss": loss}, gradient, fragile)
