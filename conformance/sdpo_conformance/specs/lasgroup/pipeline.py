"""lasgroup's loss as stages. Unchanged they are right, and finite in the corners where upstream's loss is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.specs.shared import stages
from sdpo_conformance.specs.shared.accepting import Reader
from sdpo_conformance.specs.shared.pipeline import Flow, Pipeline


def refuse(loss_input: Any) -> None:
    """Raise ValueError for options that exclude each other."""
    training = loss_input.training
    if not training.full_logit_distillation and training.alpha != 1:
        raise ValueError("sampled-token distillation is reverse KL: alpha must be 1")
    if training.is_clip is not None and loss_input.old_log_probs is None:
        raise ValueError("old_log_probs is required where is_clip is set")


def finish_of(training: Any) -> str:
    """How categories are made."""
    if training.distillation_topk is None:
        return "whole"
    return "tail" if training.distillation_add_tail else "renormalised"


def accept(loss_input: Any, clean: bool = True, native: bool = False) -> Flow:
    """The input as the stages read it. ``clean`` off leaves what stands at masked positions; ``native``: in the dtypes
    that are given."""
    refuse(loss_input)
    training = loss_input.training
    read = Reader(loss_input.student_logits, loss_input.response_mask, loss_input.self_distillation_mask, clean, native)
    responded = read.response_mask
    return Flow(
        z=read(loss_input.student_logits),
        zt=read(loss_input.teacher_logits.detach()),
        y=loss_input.response_ids.long(),
        mask=read.mask,
        response_mask=responded,
        rows=read.rows,
        old=read(loss_input.old_log_probs, responded),
        weights=read(loss_input.rollout_is_weights, responded),
        rollout=read(loss_input.rollout_log_probs, responded),
        k=training.distillation_topk,
        finish=finish_of(training),
        sampled=not training.full_logit_distillation,
        alpha=training.alpha,
        clip=training.is_clip,
        temperature=training.temperature,
        aggregation=training.loss_agg_mode,
        per=training.rollout_is,
        threshold=training.rollout_is_threshold,
        normalises=training.rollout_is_batch_normalize,
        tokens=training.batch_num_tokens,
        sequences=training.global_batch_size,
    )


def rollout_log_ratio(flow: Flow) -> Tensor | None:
    """old - rollout, by token or summed over the row, clamped; None where no weight is to be computed."""
    if flow.rollout is None:
        return None
    log_ratio = flow.old - flow.rollout
    if flow.per == "sequence":
        log_ratio = (log_ratio * flow.response_mask).sum(-1, keepdim=True).expand_as(log_ratio)
    return log_ratio.clamp(-stages.LOG_CLAMP, stages.LOG_CLAMP)


def rollout_raw(flow: Flow) -> Tensor | None:
    """exp of it, 0 on padding."""
    return None if flow.rollout_log_ratio is None else flow.rollout_log_ratio.exp() * flow.response_mask


def rollout_capped(flow: Flow) -> Tensor | None:
    """Capped from above."""
    return None if flow.rollout_raw is None else flow.rollout_raw.clamp(max=flow.threshold)


def mean_weight(weights: Tensor, mask: Tensor, per: str) -> Tensor:
    """The mean weight over tokens, or over rows of the rows' means."""
    if per == "token":
        return (weights * mask).sum() / (mask.sum() + 1e-8)
    rows, filled = (weights * mask).sum(-1) / (mask.sum(-1) + 1e-8), mask.sum(-1) > 0
    return torch.where(filled, rows, torch.zeros_like(rows)).sum() / filled.sum().clamp(min=1)


def rollout_weight(flow: Flow) -> Tensor:
    """w, (B, T): given, computed, or 1."""
    if flow.weights is not None:
        return flow.weights.detach()
    if flow.rollout_capped is None:
        return torch.ones_like(flow.mask)
    if not flow.normalises:
        return flow.rollout_capped
    mean = mean_weight(flow.rollout_capped, flow.response_mask, flow.per)
    return torch.where(mean > 1e-8, flow.rollout_capped / mean, flow.rollout_capped)


def weighted(flow: Flow) -> Tensor:
    """D r w, (B, T)."""
    return flow.per_token * flow.ratio * flow.rollout_weight


def lengths(flow: Flow) -> Tensor:
    """What a row's mask sums to, (B,)."""
    return flow.mask.sum(-1)


def count(flow: Flow) -> Tensor:
    """The token mean's denominator, 0-dim."""
    if flow.tokens is not None:
        return torch.tensor(flow.tokens, dtype=flow.mask.dtype, device=flow.mask.device)
    return flow.mask.sum().clamp(min=1.0)


def row_count(flow: Flow) -> Tensor:
    """The row means' denominator, 0-dim."""
    if flow.sequences is not None:
        return torch.tensor(flow.sequences, device=flow.mask.device)
    return (flow.lengths > 0).sum().clamp(min=1)


def loss(flow: Flow) -> Tensor:
    """The mean, 0-dim."""
    values = flow.weighted * flow.mask
    if flow.aggregation == "token-mean":
        return values.sum() / flow.count
    rows = values.sum(-1)
    if flow.aggregation == "seq-mean-token-sum-norm":
        return rows.sum() / flow.mask.shape[-1]
    if flow.aggregation == "seq-mean-token-mean":
        rows = rows / (flow.lengths + 1e-8)
    return rows.sum() / flow.row_count


PIPELINE = Pipeline(
    accept,
    {
        "student": stages.student,
        "teacher": stages.teacher,
        "l": stages.student_logprobs,
        "lt": stages.teacher_logprobs,
        "chosen": stages.chosen,
        "teacher_chosen": stages.teacher_chosen,
        "support": stages.student_support,
        "a": stages.student_at_support,
        "b": stages.teacher_at_support,
        "log_q": stages.student_categories,
        "log_p": stages.teacher_categories,
        "log_m": stages.mixture,
        "per_token": stages.per_token,
        "log_ratio": stages.log_ratio,
        "ratio": stages.ratio,
        "rollout_log_ratio": rollout_log_ratio,
        "rollout_raw": rollout_raw,
        "rollout_capped": rollout_capped,
        "rollout_weight": rollout_weight,
        "weighted": weighted,
        "lengths": lengths,
        "count": count,
        "row_count": row_count,
        "loss": loss,
    },
)
