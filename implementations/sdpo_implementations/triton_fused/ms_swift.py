"""ms-swift's GKD and OPSD loss in Triton: ``--spec ms-swift``. Over the teacher's renormalised top-k the student's rows
are never read whole, forward or backward.

Source of every rule: ms-swift 4.6.0, swift/rlhf_trainers/gkd_loss.py and gkd_trainer.py 104-114.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.inputs import check_features, check_range, check_tensor, flat, require
from sdpo_implementations.triton_fused.row_loss import (
    CLAIMS,
    Rows,
    category_loss,
    check_ids,
    check_values,
    read_student,
    require_entries,
    require_temperature,
    vocabulary_loss,
    without_tokens,
)

SDPO_CLAIMS = CLAIMS

INACTIVE = -100


def paired_rows(here: Tensor, there: Tensor) -> Tensor:
    """(N,) int64: for each of the student's positions the teacher's, the active ones of both, (N,) and (M,) bool, being
    paired in order; some position where the student's is not active."""
    in_order = (~there).to(torch.int8).argsort(stable=True)
    return in_order[(here.cumsum(0) - 1).clamp(min=0)]


def compute_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
    """``loss``, 0-dim float32, differentiable with respect to student_logits; ``total`` and ``num_valid`` without
    graph. Logits float32, bfloat16 or float16. Raises ValueError, also where student and teacher differ in the number
    of active labels."""
    student = read_student(loss_input, "ms-swift")
    training = loss_input.training
    beta, temperature = float(training.beta), require_temperature(training.temperature)
    require(0 <= beta <= 1, f"beta must lie in [0, 1], got {beta}")
    b, s, vocabulary = student.shape
    device = student.device
    check_tensor("labels", loss_input.labels, (b, s), device, integers=True)
    check_tensor("teacher_labels", loss_input.teacher_labels, 2, device, integers=True)
    here, there = (
        (labels.roll(-1, 1) != INACTIVE).reshape(-1) for labels in (loss_input.labels, loss_input.teacher_labels)
    )
    active, teacher_active = torch.stack((here.sum(), there.sum())).tolist()
    require(active == teacher_active, f"{active} active labels of the student, {teacher_active} of the teacher")
    if active == 0:
        nothing = without_tokens(student[:0]).float()
        return {"loss": nothing, "total": nothing.detach(), "num_valid": torch.zeros((), device=device)}
    paired = paired_rows(here, there)
    logits, counted = flat(student), here.float()
    teacher_shape = tuple(loss_input.teacher_labels.shape)

    topk = training.gkd_logits_topk
    if loss_input.teacher_topk_logprobs is not None:
        k = loss_input.teacher_topk_logprobs.shape[-1]
        shape = (*teacher_shape, k)
        values = flat(check_values("teacher_topk_logprobs", loss_input.teacher_topk_logprobs, shape, device))[paired]
        ids = check_ids("teacher_topk_indices", loss_input.teacher_topk_indices, shape, vocabulary, there.float())
        support = ids[paired]
    else:
        require(loss_input.teacher_logits is not None, "neither teacher_logits nor teacher_topk_logprobs is given")
        check_features("teacher_logits", loss_input.teacher_logits)
        width = loss_input.teacher_logits.shape[-1]
        teacher = flat(check_values("teacher_logits", loss_input.teacher_logits, (*teacher_shape, width), device))
        if topk is None:
            per_token, _ = vocabulary_loss(logits, teacher, paired, counted, beta, temperature)
            return mean(per_token, counted, training.num_items_in_batch)
        require(1 <= topk <= width, f"gkd_logits_topk must lie in [1, {width}], got {topk}")
        values, ids = Rows.read(teacher, there.float(), temperature, sums=False, maxima=True).topk(topk)
        check_range("the teacher's top-k", ids, vocabulary, there)
        values, support = values[paired], ids[paired]
    require_entries(support.shape[1])
    counted = (here & ~values.isinf().all(-1)).float()
    rows = Rows.read(logits, counted, temperature, sums=False)
    per_token = category_loss(logits, rows, rows.at(support), values, None, temperature, support, beta, tail=False)
    return mean(per_token, counted, training.num_items_in_batch)


def mean(per_token: Tensor, counted: Tensor, items: int | None) -> dict[str, Tensor]:
    """Over the positions that count, (N,) each; ``items``: those of the whole batch, where they are given."""
    count, total = counted.sum(), (per_token * counted).sum()
    return {
        "loss": (total / (count.clamp(min=1.0) if items is None else items)).float(),
        "total": total.detach().float(),
        "num_valid": count,
    }
