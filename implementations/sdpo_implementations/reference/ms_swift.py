"""ms-swift's GKD and OPSD loss in plain PyTorch. Source of every rule: ms-swift 4.6.0,
swift/rlhf_trainers/gkd_loss.py and gkd_trainer.py 104-114."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo_implementations.reference.categories import divergence, renormalised, working_dtype

SDPO_CLAIMS = {"dtypes": ["float32", "bfloat16", "float16", "float64"], "devices": ["cpu", "cuda"]}

INACTIVE = -100


def on_one_vocabulary(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The shorter side, (N, V) or (N, V_t), continued with the other's logits; the student's keep their graph."""
    v, v_t = student.shape[-1], teacher.shape[-1]
    return torch.cat((student, teacher[:, v:]), dim=-1), torch.cat((teacher, student[:, v_t:]), dim=-1)


def compute_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
    """``loss``, 0-dim, differentiable with respect to student_logits; ``total`` and ``num_valid`` without graph.
    Raises ValueError where student and teacher differ in the number of active labels."""
    training = loss_input.training
    dtype = working_dtype(loss_input.student_logits)
    here, there = (labels.roll(-1, 1) != INACTIVE for labels in (loss_input.labels, loss_input.teacher_labels))
    if int(here.sum()) != int(there.sum()):
        raise ValueError(f"{int(here.sum())} active labels, the teacher has {int(there.sum())}")
    student = loss_input.student_logits[here].to(dtype)
    if loss_input.teacher_topk_logprobs is not None:
        teacher = loss_input.teacher_topk_logprobs.detach()[there].to(dtype)
        support = loss_input.teacher_topk_indices.long()[there]
    elif training.gkd_logits_topk is not None:
        teacher, support = loss_input.teacher_logits.detach()[there].topk(training.gkd_logits_topk, dim=-1)
        teacher = teacher.to(dtype)
    else:
        student, teacher = on_one_vocabulary(student, loss_input.teacher_logits.detach()[there].to(dtype))
        support = None
    if support is not None:
        covered = ~teacher.isinf().all(-1)
        student, teacher = student[covered].gather(-1, support[covered]), teacher[covered]
    log_q, log_p = (renormalised(one / training.temperature) for one in (student, teacher))
    count = log_q.shape[0]
    total = divergence(log_q, log_p, training.beta).sum()
    whole = count if training.num_items_in_batch is None else training.num_items_in_batch
    loss = total / whole if count else total + loss_input.student_logits[:0].sum()
    return {"loss": loss, "total": total.detach(), "num_valid": torch.tensor(float(count), device=total.device)}
