"""TRL's loss in Triton, with a local and with a served teacher: ``--spec trl``.

Renormalised top-k: K logits a token decide value and gradient, which is 0 off the support. With the tail, with the
sampled token and over the whole vocabulary the gradient is dense. Source of every rule: trl 1.16.0,
trl/experimental/sdpo/sdpo_trainer.py 1186-1357 and loss_utils.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo_implementations.ema_teacher import update_adapter_teacher as update_teacher
from sdpo_implementations.triton_fused.inputs import check_features, flat, require
from sdpo_implementations.triton_fused.row_loss import (
    CLAIMS,
    Rows,
    category_loss,
    check_ids,
    check_values,
    combined_mask,
    importance_ratio,
    read_student,
    require_entries,
    require_temperature,
    sampled_terms,
    support_loss,
    vocabulary_loss,
    without_tokens,
)

__all__ = ["SDPO_CLAIMS", "compute_sdpo_loss", "update_teacher"]

SDPO_CLAIMS = CLAIMS

MODES = ("sampled_token", "topk_logits", "full_logits")


def check_options(training: Any, vocabulary: int) -> None:
    """Raise ValueError for options that exclude each other."""
    mode, k = training.distillation_mode, training.distillation_topk
    require(mode in MODES, f"distillation_mode must be one of {MODES}, got {mode!r}")
    require(
        0 <= training.distillation_alpha <= 1,
        f"distillation_alpha must lie in [0, 1], got {training.distillation_alpha}",
    )
    if training.use_teacher_server:
        return
    require(
        mode != "sampled_token" or training.distillation_alpha == 1,
        f"sampled_token needs distillation_alpha = 1, got {training.distillation_alpha}",
    )
    require(
        mode != "topk_logits" or (k is not None and 1 <= k <= vocabulary),
        f"distillation_topk must lie in [1, {vocabulary}], got {k}",
    )


def served_chosen(loss_input: Any, shape: tuple[int, int], counted: Tensor) -> Tensor:
    """(N,) float64: the served teacher's log-prob of each token. Raises ValueError where one that counts has none."""
    given = flat(check_values("teacher_actual_logprobs", loss_input.teacher_actual_logprobs, shape, counted.device))
    actual = torch.where(counted != 0, given.double(), 0.0)
    require(bool(actual.isfinite().all()), "the teacher server gave no log-prob for a token that counts")
    return actual


def compute_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
    """``loss``, 0-dim float32, differentiable with respect to student_logits; ``logged_distillation_loss``, the same
    number without graph. ``student_logits`` (B, T, V) float32, bfloat16 or float16. Raises ValueError."""
    student = read_student(loss_input, "TRL")
    training = loss_input.training
    check_options(training, student.shape[-1])
    served, mode, alpha = training.use_teacher_server, training.distillation_mode, float(training.distillation_alpha)
    tail, temperature = bool(training.distillation_add_tail), require_temperature(training.temperature)
    b, t, vocabulary = student.shape
    mask = combined_mask(
        "completion_mask", loss_input.completion_mask, loss_input.self_distillation_mask, (b, t), student.device
    )
    if mask.numel() == 0:
        loss = without_tokens(student).float()
        return {"loss": loss, "logged_distillation_loss": loss.detach()}
    counted = (mask != 0).reshape(-1).float()
    y = check_ids("completion_ids", loss_input.completion_ids, (b, t), vocabulary, counted)
    logits = flat(student)
    cap, old = training.distillation_is_clip, loss_input.old_per_token_logps
    has_ratio = cap is not None and old is not None

    if not served:
        check_features("teacher_logits", loss_input.teacher_logits)
        teacher = flat(check_values("teacher_logits", loss_input.teacher_logits, (b, t, vocabulary), student.device))
    if mode == "full_logits" and not served:
        every = torch.arange(b * t, device=student.device)
        per_token, sides = vocabulary_loss(logits, teacher, every, counted, alpha, temperature)
        rows = Rows(logits.detach(), counted, temperature, sides.of_student)
    elif mode == "sampled_token":
        rows = Rows.read(logits, counted, temperature)
        reference = (
            served_chosen(loss_input, (b, t), counted)
            if served
            else Rows.read(teacher, counted, temperature).logprobs(y)
        )
        per_token = support_loss(logits, rows, sampled_terms(rows.logprobs(y), reference, y, temperature))
    else:
        rows = Rows.read(logits, counted, temperature, sums=tail or has_ratio, maxima=not served)
        if served:
            served_chosen(loss_input, (b, t), counted)
            k = loss_input.teacher_topk_ids.shape[-1]
            require_entries(k)
            support = check_ids("teacher_topk_ids", loss_input.teacher_topk_ids, (b, t, k), vocabulary, counted)
            given = check_values("teacher_topk_logprobs", loss_input.teacher_topk_logprobs, (b, t, k), student.device)
            at_student, at_teacher, teacher_rows = rows.at(support), flat(given).contiguous(), None
        else:
            at_student, support = rows.topk(training.distillation_topk)
            beside = Rows.read(teacher, counted, temperature, sums=tail)
            at_teacher, teacher_rows = beside.at(support), beside if tail else None
        per_token = category_loss(
            logits, rows, at_student, at_teacher, teacher_rows, 1.0 if served else temperature, support, alpha, tail
        )

    if has_ratio:
        before = flat(check_values("old_per_token_logps", old, (b, t), student.device))
        per_token = per_token * importance_ratio(rows.logprobs(y), before, counted, cap)
    each = (per_token.view(b, t) * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
    loss = each.mean().float()
    return {"loss": loss, "logged_distillation_loss": loss.detach()}
