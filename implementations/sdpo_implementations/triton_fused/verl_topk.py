"""verl's ``forward_kl_topk`` in Triton: ``--spec verl-topk``. Clamped log-probs do not renormalise, so the gradient is
dense; positions on the floor or beyond the cap have none, and are not read in the backward.

Source of every rule: verl 0.9.1, verl/trainer/distillation/losses.py, fsdp/losses.py,
verl/trainer/ppo/core_algos.py agg_loss.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.inputs import flat, require
from sdpo_implementations.triton_fused.kernels.clamped_loss import clamped_terms
from sdpo_implementations.triton_fused.row_loss import (
    CLAIMS,
    Rows,
    check_ids,
    check_values,
    combined_mask,
    read_student,
    require_entries,
    support_loss,
    without_tokens,
)
from sdpo_implementations.triton_fused.runtime import on_device

SDPO_CLAIMS = CLAIMS

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
LEAST_TEMPERATURE = 1e-8
ROW_FLOOR = 1e-8


def aggregate(per_token: Tensor, mask: Tensor, training: Any) -> Tensor:
    """(B, T) -> 0-dim, by the counts of the whole batch."""
    mode, ranks = training.loss_agg_mode, training.dp_size
    each, lengths = (per_token * mask).sum(-1), mask.sum(-1)
    if mode == "token-mean":
        return each.sum() / training.batch_num_tokens * ranks
    if mode == "token-sum":
        return each.sum() * ranks
    if mode == "seq-mean-token-mean":
        each = each / (lengths + ROW_FLOOR)
    loss = each.sum() / training.global_batch_size * ranks
    if mode == "seq-mean-token-sum-norm":
        factor = training.loss_scale_factor
        loss = loss / (mask.shape[-1] if factor is None else factor)
    return loss


def over_counted(values: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest, largest and mean of values (N,) where ``counted`` (N,); zeros where nothing counts."""
    inside, count = counted != 0, counted.sum()
    smallest = torch.where(inside, values, math.inf).amin()
    largest = torch.where(inside, values, -math.inf).amax()
    mean = torch.where(inside, values, 0.0).sum() / count.clamp(min=1.0)
    none = count == 0
    return tuple(torch.where(none, 0.0, one).float() for one in (smallest, largest, mean))  # type: ignore[return-value]


def compute_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
    """``loss``, 0-dim float32, differentiable with respect to student_logits, and without graph
    ``distillation_loss``, the same number; ``loss_min``, ``loss_max``, ``student_mass``, ``teacher_mass`` over the
    positions that count. ``student_logits`` (B, T, V)
    float32, bfloat16 or float16. Raises ValueError."""
    student = read_student(loss_input, "verl-topk")
    training = loss_input.training
    mode = training.loss_agg_mode
    require(mode in AGGREGATIONS, f"loss_agg_mode must be one of {AGGREGATIONS}, got {mode!r}")
    b, t, vocabulary = student.shape
    device = student.device
    mask = combined_mask("response_mask", loss_input.response_mask, None, (b, t), device)
    counted = (mask != 0).reshape(-1).float()
    k = loss_input.teacher_ids.shape[-1]
    require_entries(k)
    if mask.numel() == 0:
        zero = torch.zeros((), device=device)
        names = ("distillation_loss", "loss_min", "loss_max", "student_mass", "teacher_mass")
        metrics = dict.fromkeys(names, zero)
        return {"loss": without_tokens(student).float(), **metrics}
    support = check_ids("teacher_ids", loss_input.teacher_ids, (b, t, k), vocabulary, counted)
    teacher = flat(check_values("teacher_logprobs", loss_input.teacher_logprobs, (b, t, k), device)).contiguous()
    temperature = float(max(training.temperature, LEAST_TEMPERATURE))
    logits = flat(student)
    rows = Rows.read(logits, counted, temperature)
    with on_device(logits):
        found = clamped_terms(
            rows.at(support), rows.statistics, temperature, teacher, support, counted, training.log_prob_min_clamp
        )
    floored = support_loss(logits, rows, found.terms).clamp(min=0.0)
    cap = training.loss_max_clamp
    capped = floored if cap is None else floored.clamp(max=cap)
    smallest, largest, _ = over_counted(floored.detach(), counted)
    loss = aggregate(capped.view(b, t), mask, training).float()
    return {
        "loss": loss,
        "distillation_loss": loss.detach(),
        "loss_min": smallest,
        "loss_max": largest,
        "student_mass": over_counted(found.student_mass, counted)[2],
        "teacher_mass": over_counted(found.teacher_mass, counted)[2],
    }
