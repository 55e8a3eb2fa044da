"""verl's ``forward_kl_topk`` as stages. Unchanged they are right, and finite wherever the limit is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sdpo_conformance.specs.shared import stages
from sdpo_conformance.specs.shared.accepting import Reader
from sdpo_conformance.specs.shared.pipeline import LOG_ZERO, Flow, Pipeline, Result


def accept(loss_input: Any, clean: bool = True, native: bool = False) -> Flow:
    """The input as the stages read it; the flags as in lasgroup's."""
    training = loss_input.training
    read = Reader(loss_input.student_logits, loss_input.response_mask, None, clean, native)
    return Flow(
        z=read(loss_input.student_logits),
        teacher=read(loss_input.teacher_logprobs.detach()),
        support=loss_input.teacher_ids.long(),
        mask=read.mask,
        temperature=max(training.temperature, 1e-8),
        lowest=training.log_prob_min_clamp,
        highest=training.loss_max_clamp,
        aggregation=training.loss_agg_mode,
        ranks=training.dp_size,
        tokens=training.batch_num_tokens,
        sequences=training.global_batch_size,
        scale=training.loss_scale_factor,
    )


def held_up(logprobs: Tensor, lowest: float | None) -> Tensor:
    """At least ``lowest``."""
    return logprobs.clamp(min=LOG_ZERO if lowest is None else lowest)


def student_clamped(flow: Flow) -> Tensor:
    """a', (B, T, K)."""
    return held_up(flow.a, flow.lowest)


def teacher_at_support(flow: Flow) -> Tensor:
    """b, (B, T, K)."""
    found: Tensor = flow.teacher
    return found


def teacher_clamped(flow: Flow) -> Tensor:
    """b', (B, T, K)."""
    return held_up(flow.b, flow.lowest)


def raw(flow: Flow) -> Tensor:
    """sum exp(b') (b' - a'), (B, T)."""
    found: Tensor = (flow.teacher_clamped.exp() * (flow.teacher_clamped - flow.student_clamped)).sum(-1)
    return found


def floored(flow: Flow) -> Tensor:
    """At least 0."""
    found: Tensor = flow.raw.clamp(min=0.0)
    return found


def per_token(flow: Flow) -> Tensor:
    """D, (B, T): at most the cap."""
    found: Tensor = flow.floored if flow.highest is None else flow.floored.clamp(max=flow.highest)
    return found


def lengths(flow: Flow) -> Tensor:
    """What a row's mask sums to, (B,)."""
    found: Tensor = flow.mask.sum(-1)
    return found


def loss(flow: Flow) -> Tensor:
    """The mean by the whole batch's counts, 0-dim."""
    rows: Tensor = (flow.per_token * flow.mask).sum(-1)
    if flow.aggregation == "token-mean":
        return rows.sum() / flow.tokens * flow.ranks
    if flow.aggregation == "token-sum":
        return rows.sum() * flow.ranks
    if flow.aggregation == "seq-mean-token-mean":
        rows = rows / (flow.lengths + 1e-8)
    found = rows.sum() / flow.sequences * flow.ranks
    if flow.aggregation == "seq-mean-token-sum-norm":
        found = found / (flow.mask.shape[-1] if flow.scale is None else flow.scale)
    return found


def over(values: Tensor, mask: Tensor, how: str) -> Tensor:
    """mean, min or max over the positions that count; 0 where there is none."""
    chosen = values.detach()[mask != 0]
    found: Tensor = getattr(chosen, how)() if chosen.numel() else chosen.sum()
    return found


def result(flow: Flow) -> Result:
    """The loss and what is measured before the cap and before the clamp."""
    return {
        "loss": flow.loss,
        "loss_min": over(flow.floored, flow.mask, "min"),
        "loss_max": over(flow.floored, flow.mask, "max"),
        "student_mass": over(flow.a.exp().sum(-1), flow.mask, "mean"),
        "teacher_mass": over(flow.b.exp().sum(-1), flow.mask, "mean"),
    }


PIPELINE = Pipeline(
    accept,
    {
        "student": stages.student,
        "l": stages.student_logprobs,
        "a": stages.student_at_support,
        "b": teacher_at_support,
        "student_clamped": student_clamped,
        "teacher_clamped": teacher_clamped,
        "raw": raw,
        "floored": floored,
        "per_token": per_token,
        "lengths": lengths,
        "loss": loss,
    },
    result,
)
