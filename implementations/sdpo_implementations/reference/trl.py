"""TRL's loss in plain PyTorch, with a local and with a served teacher. Source of every rule: trl 1.16.0,
trl/experimental/sdpo/sdpo_trainer.py 1186-1357 and loss_utils.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo_implementations.ema_teacher import update_adapter_teacher as update_teacher
from sdpo_implementations.reference.categories import (
    divergence,
    importance_ratio,
    renormalised,
    with_tail,
    working_dtype,
)

__all__ = ["SDPO_CLAIMS", "compute_sdpo_loss", "update_teacher"]

SDPO_CLAIMS = {"dtypes": ["float32", "bfloat16", "float16", "float64"], "devices": ["cpu", "cuda"]}


def per_token_divergence(training: Any, logprobs: Tensor, teacher: Tensor | None, served: Any) -> Tensor:
    """(B, T) over the student's top-k, the teacher's served top-k, or the whole vocabulary."""
    if served is not None:
        support, log_p = served
        log_q = logprobs.gather(-1, support)
    elif training.distillation_mode == "full_logits":
        assert teacher is not None
        return divergence(logprobs, teacher, training.distillation_alpha)
    else:
        assert teacher is not None
        support = logprobs.detach().topk(training.distillation_topk, dim=-1).indices
        log_q, log_p = logprobs.gather(-1, support), teacher.gather(-1, support)
    finish = with_tail if training.distillation_add_tail else renormalised
    return divergence(finish(log_q), finish(log_p), training.distillation_alpha)


def compute_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
    """``loss``, 0-dim, differentiable with respect to student_logits; ``logged_distillation_loss``, the same number
    without graph: what is logged is what is trained. Raises ValueError for options that exclude each other."""
    training, served = loss_input.training, loss_input.training.use_teacher_server
    vocabulary = loss_input.student_logits.shape[-1]
    if not served and training.distillation_mode == "sampled_token" and training.distillation_alpha != 1:
        raise ValueError(f"sampled_token needs distillation_alpha = 1, got {training.distillation_alpha}")
    if (
        not served
        and training.distillation_mode == "topk_logits"
        and not (training.distillation_topk and training.distillation_topk <= vocabulary)
    ):
        raise ValueError(f"distillation_topk must lie in [1, {vocabulary}], got {training.distillation_topk}")
    dtype = working_dtype(loss_input.student_logits)
    mask = loss_input.completion_mask.to(dtype)
    if loss_input.self_distillation_mask is not None:
        mask = mask * loss_input.self_distillation_mask.to(dtype).unsqueeze(-1)
    ignored = mask == 0

    def cleaned(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).masked_fill(ignored if tensor.dim() == 2 else ignored.unsqueeze(-1), 0.0)

    logprobs = (cleaned(loss_input.student_logits) / training.temperature).log_softmax(-1)
    y = loss_input.completion_ids.long().unsqueeze(-1)
    chosen = logprobs.gather(-1, y).squeeze(-1)
    teacher, topk = None, None
    if served:
        teacher_chosen = cleaned(loss_input.teacher_actual_logprobs.detach())
        if not bool(torch.isfinite(teacher_chosen).all()):
            raise ValueError("the teacher server gave no log-prob for a token that counts")
        if training.distillation_mode != "sampled_token":
            topk = loss_input.teacher_topk_ids.long(), cleaned(loss_input.teacher_topk_logprobs.detach())
    else:
        teacher = (cleaned(loss_input.teacher_logits.detach()) / training.temperature).log_softmax(-1)
        teacher_chosen = teacher.gather(-1, y).squeeze(-1)

    if training.distillation_mode == "sampled_token":
        per_token = (chosen - teacher_chosen).detach() * chosen
    else:
        per_token = per_token_divergence(training, logprobs, teacher, topk)
    if training.distillation_is_clip is not None and loss_input.old_per_token_logps is not None:
        old = cleaned(loss_input.old_per_token_logps.detach())
        per_token = per_token * importance_ratio(chosen, old, training.distillation_is_clip)
    rows = (per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
    loss = rows.sum() / max(rows.shape[0], 1)
    return {"loss": loss, "logged_distillation_loss": loss.detach()}
