"""lasgroup's loss in Triton: ``--spec lasgroup``. By default a tail and with it a dense gradient; without the tail,
renormalised, a sparse one.

Source of every rule: lasgroup/SDPO at 0e6d510, verl/trainer/ppo/core_algos.py 1025-1188 and
verl/trainer/ppo/rollout_corr_helper.py 481-598.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo_implementations.ema_teacher import update_teacher
from sdpo_implementations.triton_fused.inputs import check_features, flat, require
from sdpo_implementations.triton_fused.row_loss import (
    CLAIMS,
    LOG_RATIO_CLAMP,
    Rows,
    category_loss,
    check_ids,
    check_values,
    combined_mask,
    importance_ratio,
    read_student,
    require_temperature,
    sampled_terms,
    support_loss,
    vocabulary_loss,
    without_tokens,
)

__all__ = ["SDPO_CLAIMS", "compute_sdpo_loss", "update_teacher"]

SDPO_CLAIMS = CLAIMS

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
ROW_FLOOR = 1e-8


def check_options(loss_input: Any) -> None:
    """Raise ValueError for options that exclude each other."""
    training = loss_input.training
    require(0 <= training.alpha <= 1, f"alpha must lie in [0, 1], got {training.alpha}")
    require(
        training.full_logit_distillation or training.alpha == 1,
        f"sampled-token distillation needs alpha = 1, got {training.alpha}",
    )
    k = training.distillation_topk
    require(k is None or k >= 1, f"distillation_topk must be at least 1, or None, got {k}")
    require(
        training.is_clip is None or loss_input.old_log_probs is not None,
        "old_log_probs is required where is_clip is set",
    )
    require(
        training.loss_agg_mode in AGGREGATIONS,
        f"loss_agg_mode must be one of {AGGREGATIONS}, got {training.loss_agg_mode!r}",
    )


def rollout_weights(old: Tensor, rollout: Tensor, mask: Tensor, training: Any) -> Tensor:
    """(B, T) float64 of log-probs and the response mask (B, T): min(exp(old - rollout) mask, threshold), the log-ratio
    summed over a row for ``sequence``; divided by its mean over the mask where asked for."""
    log_ratio = torch.where(mask != 0, old.double() - rollout.double(), 0.0)
    if training.rollout_is == "sequence":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True)
    capped = (log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp() * mask).clamp(max=training.rollout_is_threshold)
    if not training.rollout_is_batch_normalize:
        return capped
    weighted, lengths = (capped * mask).sum(-1), mask.sum(-1)
    if training.rollout_is == "token":
        mean = weighted.sum() / (lengths.sum() + ROW_FLOOR)
    else:
        mean = (weighted / (lengths + ROW_FLOOR)).sum() / (lengths > 0).sum().clamp(min=1)
    return torch.where(mean > ROW_FLOOR, capped / mean, capped)


def aggregate(per_token: Tensor, mask: Tensor, training: Any) -> Tensor:
    """(B, T) -> 0-dim, by the whole batch's counts where they are given."""
    mode, tokens, sequences = training.loss_agg_mode, training.batch_num_tokens, training.global_batch_size
    each, lengths = (per_token * mask).sum(-1), mask.sum(-1)
    if mode == "token-mean":
        return each.sum() / (lengths.sum().clamp(min=1.0) if tokens is None else tokens)
    if mode == "seq-mean-token-sum-norm":
        return each.sum() / mask.shape[-1]
    if mode == "seq-mean-token-mean":
        each = each / (lengths + ROW_FLOOR)
    return each.sum() / ((lengths > 0).sum().clamp(min=1) if sequences is None else sequences)


def compute_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
    """``loss``, 0-dim float32, differentiable with respect to student_logits; ``pg_loss``, the same number without
    graph. ``student_logits`` and ``teacher_logits``
    (B, T, V) float32, bfloat16 or float16. Where the mask is 0 nothing is read. Raises ValueError."""
    student = read_student(loss_input, "lasgroup")
    check_options(loss_input)
    training = loss_input.training
    alpha, temperature = float(training.alpha), require_temperature(training.temperature)
    b, t, vocabulary = student.shape
    device = student.device
    mask = combined_mask("response_mask", loss_input.response_mask, loss_input.self_distillation_mask, (b, t), device)
    if mask.numel() == 0:
        return reported(without_tokens(student))
    counted = (mask != 0).reshape(-1).float()
    y = check_ids("response_ids", loss_input.response_ids, (b, t), vocabulary, counted)
    check_features("teacher_logits", loss_input.teacher_logits)
    teacher = flat(check_values("teacher_logits", loss_input.teacher_logits, (b, t, vocabulary), device))
    logits = flat(student)

    if not training.full_logit_distillation:
        rows = Rows.read(logits, counted, temperature)
        teacher_chosen = Rows.read(teacher, counted, temperature).logprobs(y)
        per_token = support_loss(logits, rows, sampled_terms(rows.logprobs(y), teacher_chosen, y, temperature))
    elif training.distillation_topk is None:
        every = torch.arange(b * t, device=device)
        per_token, sides = vocabulary_loss(logits, teacher, every, counted, alpha, temperature)
        rows = Rows(logits.detach(), counted, temperature, sides.of_student)
    else:
        tail = bool(training.distillation_add_tail)
        rows = Rows.read(logits, counted, temperature, sums=tail or training.is_clip is not None, maxima=True)
        at_student, support = rows.topk(min(training.distillation_topk, vocabulary))
        beside = Rows.read(teacher, counted, temperature, sums=tail)
        per_token = category_loss(
            logits, rows, at_student, beside.at(support), beside if tail else None, temperature, support, alpha, tail
        )

    def given(name: str) -> Tensor:
        return check_values(name, getattr(loss_input, name), (b, t), device)

    if training.is_clip is not None:
        old = flat(given("old_log_probs"))
        per_token = per_token * importance_ratio(rows.logprobs(y), old, counted, training.is_clip)
    per_token = per_token.view(b, t)
    weights = None
    if loss_input.rollout_is_weights is not None:
        weights = given("rollout_is_weights").double()
    elif loss_input.rollout_log_probs is not None:
        response_mask = loss_input.response_mask.detach().double()
        weights = rollout_weights(given("old_log_probs"), given("rollout_log_probs"), response_mask, training)
    if weights is not None:
        per_token = per_token * torch.where(mask != 0, weights, 0.0)
    return reported(aggregate(per_token, mask, training))


def reported(loss: Tensor) -> dict[str, Tensor]:
    """What is logged is what is trained."""
    return {"loss": loss.float(), "pg_loss": loss.detach().float()}
