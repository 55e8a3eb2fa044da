"""lasgroup's loss in plain PyTorch. Source of every rule: lasgroup/SDPO at 0e6d510, verl/trainer/ppo/core_algos.py
1025-1188 and verl/trainer/ppo/rollout_corr_helper.py 481-598."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo_implementations.ema_teacher import update_teacher
from sdpo_implementations.reference.categories import (
    LOG_RATIO_CLAMP,
    divergence,
    importance_ratio,
    renormalised,
    with_tail,
    working_dtype,
)

__all__ = ["SDPO_CLAIMS", "compute_sdpo_loss", "update_teacher"]

SDPO_CLAIMS = {"dtypes": ["float32", "bfloat16", "float16", "float64"], "devices": ["cpu", "cuda"]}


def rollout_weights(old: Tensor, rollout: Tensor, mask: Tensor, training: Any) -> Tensor:
    """Capped exp(old - rollout), (B, T), by token or by row; 0 on padding; on request divided by its mean."""
    log_ratio = (old - rollout).masked_fill(mask == 0, 0.0)
    if training.rollout_is == "sequence":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True).expand_as(log_ratio)
    weights = (log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp() * mask).clamp(max=training.rollout_is_threshold)
    if training.rollout_is_batch_normalize:
        if training.rollout_is == "token":
            mean = (weights * mask).sum() / (mask.sum() + 1e-8)
        else:
            rows = (weights * mask).sum(-1) / (mask.sum(-1) + 1e-8)
            mean = rows[mask.sum(-1) > 0].sum() / (mask.sum(-1) > 0).sum().clamp(min=1)
        weights = torch.where(mean > 1e-8, weights / mean, weights)
    return weights


def aggregate(values: Tensor, mask: Tensor, training: Any) -> Tensor:
    """(B, T) -> 0-dim, by the whole batch's counts where they are given; ``values`` are 0 where the mask is."""
    mode, tokens, sequences = training.loss_agg_mode, training.batch_num_tokens, training.global_batch_size
    rows, lengths = (values * mask).sum(-1), mask.sum(-1)
    if mode == "token-mean":
        return rows.sum() / (lengths.sum().clamp(min=1.0) if tokens is None else tokens)
    if mode == "seq-mean-token-sum-norm":
        return rows.sum() / mask.shape[-1]
    if mode == "seq-mean-token-mean":
        rows = rows / (lengths + 1e-8)
    return rows.sum() / ((lengths > 0).sum().clamp(min=1) if sequences is None else sequences)


def compute_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
    """``loss``, 0-dim, differentiable with respect to student_logits, and ``pg_loss``, the same number without graph.
    Raises ValueError for options that exclude each other. Where the mask is 0 nothing is read."""
    training = loss_input.training
    if not training.full_logit_distillation and training.alpha != 1:
        raise ValueError(f"sampled-token distillation needs alpha = 1, got {training.alpha}")
    if training.is_clip is not None and loss_input.old_log_probs is None:
        raise ValueError("old_log_probs is required where is_clip is set")
    dtype = working_dtype(loss_input.student_logits)
    response_mask = loss_input.response_mask.to(dtype)
    mask = response_mask
    if loss_input.self_distillation_mask is not None:
        mask = mask * loss_input.self_distillation_mask.to(dtype).unsqueeze(-1)
    ignored = mask == 0

    logits = loss_input.student_logits.to(dtype).masked_fill(ignored.unsqueeze(-1), 0.0) / training.temperature
    teacher = loss_input.teacher_logits.detach().to(dtype).masked_fill(ignored.unsqueeze(-1), 0.0)
    logprobs, teacher_logprobs = logits.log_softmax(-1), (teacher / training.temperature).log_softmax(-1)
    y = loss_input.response_ids.long().unsqueeze(-1)
    chosen = logprobs.gather(-1, y).squeeze(-1)
    if not training.full_logit_distillation:
        per_token = (chosen - teacher_logprobs.gather(-1, y).squeeze(-1)).detach() * chosen
    elif training.distillation_topk is None:
        per_token = divergence(logprobs, teacher_logprobs, training.alpha)
    else:
        support = logits.detach().topk(min(training.distillation_topk, logits.shape[-1]), dim=-1).indices
        finish = with_tail if training.distillation_add_tail else renormalised
        log_q, log_p = (finish(one.gather(-1, support)) for one in (logprobs, teacher_logprobs))
        per_token = divergence(log_q, log_p, training.alpha)

    if training.is_clip is not None:
        old = loss_input.old_log_probs.detach().to(dtype).masked_fill(ignored, 0.0)
        per_token = per_token * importance_ratio(chosen, old, training.is_clip)
    if loss_input.rollout_is_weights is not None:
        per_token = per_token * loss_input.rollout_is_weights.detach().to(dtype).masked_fill(ignored, 0.0)
    elif loss_input.rollout_log_probs is not None:
        old, rollout = loss_input.old_log_probs.detach().to(dtype), loss_input.rollout_log_probs.detach().to(dtype)
        per_token = per_token * rollout_weights(old, rollout, response_mask, training)
    loss = aggregate(per_token.masked_fill(ignored, 0.0), mask, training)
    return {"loss": loss, "pg_loss": loss.detach()}
