"""verl's ``forward_kl_topk`` in plain PyTorch. Source of every rule: verl 0.9.1, verl/trainer/distillation/losses.py,
fsdp/losses.py, verl/trainer/ppo/core_algos.py agg_loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sdpo_implementations.reference.categories import LOWEST_LOGPROB, working_dtype

SDPO_CLAIMS = {"dtypes": ["float32", "bfloat16", "float16", "float64"], "devices": ["cpu", "cuda"]}


def aggregate(values: Tensor, mask: Tensor, training: Any) -> Tensor:
    """(B, T) -> 0-dim by the counts of the whole batch; ``values`` are 0 where the mask is."""
    mode, ranks = training.loss_agg_mode, training.dp_size
    rows, lengths = (values * mask).sum(-1), mask.sum(-1)
    if mode == "token-mean":
        return rows.sum() / training.batch_num_tokens * ranks
    if mode == "token-sum":
        return rows.sum() * ranks
    if mode == "seq-mean-token-mean":
        rows = rows / (lengths + 1e-8)
    loss = rows.sum() / training.global_batch_size * ranks
    if mode == "seq-mean-token-sum-norm":
        loss = loss / (mask.shape[-1] if training.loss_scale_factor is None else training.loss_scale_factor)
    return loss


def compute_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
    """``loss``, 0-dim, differentiable with respect to student_logits, and without graph ``distillation_loss``, the same
    number, and ``loss_min``, ``loss_max``, ``student_mass``, ``teacher_mass`` over the positions that count."""
    training = loss_input.training
    dtype = working_dtype(loss_input.student_logits)
    mask = loss_input.response_mask.to(dtype)
    ignored = mask == 0
    logits = loss_input.student_logits.to(dtype).masked_fill(ignored.unsqueeze(-1), 0.0)
    logprobs = (logits / max(training.temperature, 1e-8)).log_softmax(-1)
    student = logprobs.gather(-1, loss_input.teacher_ids.long())
    teacher = loss_input.teacher_logprobs.detach().to(dtype).masked_fill(ignored.unsqueeze(-1), 0.0)
    masses = [one.detach().exp().sum(-1)[~ignored] for one in (student, teacher)]
    lowest = LOWEST_LOGPROB if training.log_prob_min_clamp is None else training.log_prob_min_clamp
    student, teacher = student.clamp(min=lowest), teacher.clamp(min=lowest)
    floored = (teacher.exp() * (teacher - student)).sum(-1).clamp(min=0.0)
    capped = floored if training.loss_max_clamp is None else floored.clamp(max=training.loss_max_clamp)
    counted = floored.detach()[~ignored]
    counted, masses = (counted, masses) if counted.numel() else (counted.new_zeros(1), [counted.new_zeros(1)] * 2)
    loss = aggregate(capped.masked_fill(ignored, 0.0), mask, training)
    return {
        "loss": loss,
        "distillation_loss": loss.detach(),
        "loss_min": counted.min(),
        "loss_max": counted.max(),
        "student_mass": masses[0].mean(),
        "teacher_mass": masses[1].mean(),
    }
