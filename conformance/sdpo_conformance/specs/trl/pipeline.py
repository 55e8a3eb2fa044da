"""TRL's loss as stages. Unchanged they are right, and finite in the corners where TRL's loss is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.specs.shared import stages
from sdpo_conformance.specs.shared.accepting import Reader
from sdpo_conformance.specs.shared.pipeline import Flow, Pipeline, Result


def refuse(loss_input: Any) -> None:
    """Raise ValueError for options that exclude each other, and for a teacher that did not answer."""
    training, local = loss_input.training, not loss_input.training.use_teacher_server
    k, vocabulary = training.distillation_topk, loss_input.student_logits.shape[-1]
    if local and training.distillation_mode == "sampled_token" and training.distillation_alpha != 1:
        raise ValueError("sampled_token is reverse KL: distillation_alpha must be 1")
    if local and training.distillation_mode == "topk_logits" and not (k and k <= vocabulary):
        raise ValueError(f"distillation_topk must lie in [1, {vocabulary}], got {k}")


def finish_of(training: Any) -> str:
    """How categories are made."""
    if training.distillation_mode == "full_logits" and not training.use_teacher_server:
        return "whole"
    return "tail" if training.distillation_add_tail else "renormalised"


def accept(loss_input: Any, clean: bool = True, native: bool = False) -> Flow:
    """The input as the stages read it; the flags as in lasgroup's."""
    refuse(loss_input)
    training = loss_input.training
    read = Reader(
        loss_input.student_logits, loss_input.completion_mask, loss_input.self_distillation_mask, clean, native
    )
    served = training.use_teacher_server
    actual = read(loss_input.teacher_actual_logprobs, read.mask)
    if served and not bool(torch.isfinite(torch.where(read.mask != 0, actual, torch.zeros_like(actual))).all()):
        raise ValueError("the teacher server gave no log-prob for a token that counts")
    return Flow(
        z=read(loss_input.student_logits),
        zt=None if served else read(loss_input.teacher_logits.detach()),
        served=served,
        served_logprobs=read(loss_input.teacher_topk_logprobs),
        served_ids=None if loss_input.teacher_topk_ids is None else loss_input.teacher_topk_ids.long(),
        served_actual=actual,
        y=loss_input.completion_ids.long(),
        mask=read.mask,
        response_mask=read.response_mask,
        rows=read.rows,
        old=read(loss_input.old_per_token_logps),
        k=training.distillation_topk if training.distillation_mode == "topk_logits" else None,
        finish=finish_of(training),
        sampled=training.distillation_mode == "sampled_token",
        alpha=training.distillation_alpha,
        clip=None if loss_input.old_per_token_logps is None else training.distillation_is_clip,
        temperature=training.temperature,
    )


def teacher(flow: Flow) -> Tensor | None:
    """zt', (B, T, V); None where the teacher is served."""
    return None if flow.served else stages.teacher(flow)


def teacher_logprobs(flow: Flow) -> Tensor | None:
    """lt, (B, T, V); None where the teacher is served."""
    return None if flow.served else stages.teacher_logprobs(flow)


def teacher_chosen(flow: Flow) -> Tensor:
    """The teacher's log-prob of the token, (B, T)."""
    found: Tensor = flow.served_actual if flow.served else stages.teacher_chosen(flow)
    return found


def support(flow: Flow) -> Tensor:
    """The student's top-k, or the served teacher's."""
    found: Tensor = flow.served_ids if flow.served and not flow.sampled else stages.student_support(flow)
    return found


def teacher_at_support(flow: Flow) -> Tensor:
    """The teacher's log-probs there."""
    if flow.served:
        found: Tensor = stages.student_at_support(flow).detach() if flow.sampled else flow.served_logprobs
        return found
    return stages.teacher_at_support(flow)


def weighted(flow: Flow) -> Tensor:
    """D r, (B, T)."""
    found: Tensor = flow.per_token * flow.ratio
    return found


def lengths(flow: Flow) -> Tensor:
    """A row's denominator, (B,)."""
    found: Tensor = flow.mask.sum(-1).clamp(min=1.0)
    return found


def row_count(flow: Flow) -> Tensor:
    """B: every row counts, empty ones too."""
    return torch.tensor(float(max(flow.mask.shape[0], 1)), dtype=flow.mask.dtype, device=flow.mask.device)


def loss(flow: Flow) -> Tensor:
    """The mean of row means, 0-dim."""
    rows: Tensor = (flow.weighted * flow.mask).sum(-1) / flow.lengths
    return rows.sum() / flow.row_count


def result(flow: Flow) -> Result:
    """What is logged is what is trained."""
    return {"loss": flow.loss, "logged_distillation_loss": flow.loss.detach()}


PIPELINE = Pipeline(
    accept,
    {
        "student": stages.student,
        "teacher": teacher,
        "l": stages.student_logprobs,
        "lt": teacher_logprobs,
        "chosen": stages.chosen,
        "teacher_chosen": teacher_chosen,
        "support": support,
        "a": stages.student_at_support,
        "b": teacher_at_support,
        "log_q": stages.student_categories,
        "log_p": stages.teacher_categories,
        "log_m": stages.mixture,
        "per_token": stages.per_token,
        "log_ratio": stages.log_ratio,
        "ratio": stages.ratio,
        "weighted": weighted,
        "lengths": lengths,
        "row_count": row_count,
        "loss": loss,
    },
    result,
)
