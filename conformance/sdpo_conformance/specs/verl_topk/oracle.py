"""verl's ``forward_kl_topk`` in float64, value and gradient.

    l = log_softmax(z / max(tau, 1e-8)), a_k = l[S_k], b_k the teacher's log-prob at its own S, at temperature 1
    a' = max(a, c), b' = max(b, c);  raw = sum_k exp(b'_k) (b'_k - a'_k);  D = min(max(raw, 0), C)
    dD/da_k = -exp(b'_k) where a_k >= c, raw >= 0 and max(raw, 0) <= C, else 0
    L = aggregate(D, mask), by counts of the whole batch that are given

Source: verl 0.9.1, verl/trainer/distillation/fsdp/losses.py 64-150, losses.py 230-365, verl/trainer/ppo/core_algos.py
agg_loss, verl/workers/engine/fsdp/transformer_impl.py 98-103.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_conformance.specs.shared.oracle.categories import to_logits
from sdpo_conformance.specs.shared.oracle.truth import SpecTruth, upcast
from sdpo_conformance.specs.verl_topk.loss_input import AGGREGATIONS, VerlTopKLossInput, VerlTopKTraining

LEAST_TEMPERATURE = 1e-8
ROW_FLOOR = 1e-8


def token_weights(mask: Tensor, training: VerlTopKTraining, floored: Tensor | None = None) -> Tensor:
    """(B, T): what each position's loss is multiplied with. ``floored``: (B, 1), what a row is divided by, where it is
    not the mask's sum + ROW_FLOOR in float64."""
    mode, ranks = training.loss_agg_mode, training.dp_size
    if mode not in AGGREGATIONS:
        raise ValueError(f"loss_agg_mode must be one of {AGGREGATIONS}, got {mode!r}")
    if mode == "token-mean":
        return mask / training.batch_num_tokens * ranks if training.batch_num_tokens else mask * torch.inf
    if mode == "token-sum":
        return mask * ranks
    if mode == "seq-mean-token-sum-norm":
        scale = mask.shape[-1] if training.loss_scale_factor is None else training.loss_scale_factor
        return mask / scale / training.global_batch_size * ranks
    lengths = mask.sum(-1, keepdim=True)
    divisor = lengths + ROW_FLOOR if floored is None else floored
    rows = mask / divisor if mode == "seq-mean-token-mean" else mask
    return rows * (lengths > 0) / training.global_batch_size * ranks


def verl_topk_loss(loss_input: VerlTopKLossInput, published: bool = False) -> SpecTruth:
    """The truth on this input; limits, ``published`` and refusals as in ``lasgroup_loss``. A mask without any token
    raises ValueError as ``published``; the limit is 0."""
    training = loss_input.training
    mask = upcast(loss_input.response_mask)
    counted = mask != 0
    if published and not bool(counted.any()):
        raise ValueError("no position counts: upstream takes the minimum of nothing")

    def read(tensor: Tensor) -> Tensor:
        value = upcast(tensor)
        return value if published else torch.where(counted.unsqueeze(-1), value, torch.zeros_like(value))

    l = (read(loss_input.student_logits) / max(training.temperature, LEAST_TEMPERATURE)).log_softmax(-1)  # noqa: E741
    support = loss_input.teacher_ids.long()
    a, b = l.gather(-1, support), read(loss_input.teacher_logprobs)
    lowest = -torch.inf if training.log_prob_min_clamp is None else training.log_prob_min_clamp
    student, teacher = a.clamp(min=lowest), b.clamp(min=lowest)
    terms = teacher.exp() * (teacher - student)
    if not published:
        terms = torch.where(teacher.exp() == 0, torch.zeros_like(terms), terms)
    raw = terms.sum(-1)
    floored = raw.clamp(min=0.0)
    highest = torch.inf if training.loss_max_clamp is None else training.loss_max_clamp
    moves = (raw >= 0) & (floored <= highest)
    at_support = torch.where((a >= lowest) & moves.unsqueeze(-1), -teacher.exp(), torch.zeros_like(a))
    if published:
        at_support = torch.where(raw.isnan().unsqueeze(-1) & b.isnan().any(-1, keepdim=True), torch.nan, at_support)

    # upstream adds the floor in the dtype of the mask's sum: an integer's or a float32's swallows it
    native = upcast(loss_input.response_mask.sum(-1, keepdim=True) + ROW_FLOOR) if published else None
    weight = token_weights(mask, training, native)
    per_token = floored.clamp(max=highest)
    values = torch.where(counted, per_token, torch.zeros_like(per_token))
    factor = torch.where(counted, weight, torch.zeros_like(weight))
    moved = at_support * (weight if published else factor).unsqueeze(-1)
    whole = counted & torch.ones_like(counted)
    chosen = {"raw": floored[whole]}
    overlap = _overlap(l, a, b, support, teacher, student, counted)
    nothing = torch.zeros((), dtype=torch.float64)
    mass_q, mass_p = a.exp().sum(-1)[whole], b.exp().sum(-1)[whole]
    present = bool(counted.any())
    return SpecTruth(
        loss=(values * factor).sum(),
        metrics={
            "loss_min": chosen["raw"].min() if present else nothing,
            "loss_max": chosen["raw"].max() if present else nothing,
            "student_mass": mass_q.mean() if present else nothing,
            "teacher_mass": mass_p.mean() if present else nothing,
            **overlap,
        },
        per_token=per_token,
        factor=factor,
        grad_logits=to_logits(moved, support, l) / max(training.temperature, LEAST_TEMPERATURE),
        aside={"l": l, "support": support, "a": a, "b": b, "raw": raw, "mask": mask},
    )


def _overlap(
    logprobs: Tensor, a: Tensor, b: Tensor, support: Tensor, teacher: Tensor, student: Tensor, counted: Tensor
) -> dict[str, Tensor]:
    """The share of the teacher's support among the student's own top K, and what an overlapping token adds, negated
    and averaged over the overlap, then over the positions that have one."""
    k = support.shape[-1]
    own = torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, logprobs.topk(k, dim=-1).indices, True)
    shared = own.gather(-1, support)
    count = shared.sum(-1)
    each = (-teacher.exp() * (teacher - student) * shared).sum(-1) / count.clamp(min=1)
    zero = torch.zeros((), dtype=torch.float64)
    with_one = counted & (count > 0)
    return {
        "overlap_ratio": count[counted].double().mean() / k if bool(counted.any()) else zero,
        "overlap_token_advantage": each[with_one].mean() if bool(with_one.any()) else zero,
    }
