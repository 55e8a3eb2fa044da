"""Factors, clips, roundings and lost gradients that act on a whole part of the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.defects.defect import DIVERGENCES, Defect, around, replacing
from sdpo_conformance.specs.claas.defects.loss_parts import RATIO_LOG_CLAMP, Work, logits, renormalise
from sdpo_conformance.specs.claas.defects.sources import cite
from sdpo_conformance.specs.claas.defects.wrong_divergence import valued


def rounded_logits(dtype: torch.dtype) -> Callable[[Work], Tensor]:
    """Logits that passed through a dtype on their way to the softmax."""
    return lambda w: valued(logits(w).to(dtype).to(logits(w).dtype), logits(w))


def projected_in(dtype: torch.dtype) -> Callable[[Work], Tensor]:
    """Logits of operands that were cast before the product."""

    def projected(w: Work) -> Tensor:
        hidden, head = w.z, w.head
        if head is None:
            return hidden
        return (hidden.to(dtype).float() @ head.to(dtype).float().T).to(dtype).to(hidden.dtype)

    return projected


def smoothed(log_p: Tensor, weight: float) -> Tensor:
    """log of (1 - weight) p + weight / K."""
    return torch.log((1 - weight) * log_p.exp() + weight / log_p.shape[-1])


def lost(part: Callable[[Tensor], Tensor]) -> Callable[[Work, Tensor], Tensor]:
    """A gradient with a part of it set to zero."""

    def change(w: Work, gradient: Tensor) -> Tensor:
        kept = gradient.clone()
        part(kept).zero_()
        return kept

    return change


ALL_ROWS = "Launch the backward over every row and token."

DEFECTS = (
    Defect(
        name="temperature-on-teacher",
        sentence="The teacher's log-probs are divided by a temperature of 2 inside the divergence, the student's not.",
        violates=("GJS-1", "GJS-6"),
        fix="The divergence has no temperature.",
        change=around("teacher_distribution", lambda before, w: renormalise(before(w) / 2)),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="teacher-smoothed",
        sentence="The teacher is mixed with a uniform distribution over its support, of weight 0.1.",
        violates=("GJS-1", "GJS-6"),
        fix="The teacher's log-probs as they come, renormalised over the support.",
        change=around("teacher_distribution", lambda before, w: smoothed(before(w), 0.1)),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="divergence-scaled",
        sentence="Every token's divergence is multiplied by 2.",
        violates=("GJS-1", "GJS-9"),
        fix="Return the divergence itself.",
        change=around("per_token", lambda before, w: 2 * before(w)),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="divergence-clipped",
        sentence="Every token's divergence is clipped at 0.1.",
        violates=("GJS-1", "GJS-9"),
        fix="Return the divergence itself.",
        change=around("per_token", lambda before, w: before(w).clamp(max=0.1)),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="ratio-power",
        sentence="The log-ratio is multiplied by 1.5 before exp.",
        violates=("IS-3", "IS-10"),
        fix="The ratio is exp(new - old).",
        change=replacing(
            log_ratio=lambda w: 1.5 * (w.chosen - w.old).detach().clamp(-RATIO_LOG_CLAMP, RATIO_LOG_CLAMP)
        ),
        usable_for="steps_per_batch = 1 with log-probs recorded by the same policy and software: the ratio is 1 there.",
    ),
    Defect(
        name="ratio-floor",
        sentence="The ratio is clipped from below at 0.5.",
        violates=("IS-5",),
        fix="Cap above only.",
        change=around("ratio", lambda before, w: before(w).clamp(min=0.5)),
        usable_for="Ratios above the floor.",
    ),
    Defect(
        name="log-ratio-clamped-above",
        sentence="The log-ratio is clamped above at 0.5, whatever is_clip; below at -20.",
        violates=("IS-5", "IS-10"),
        fix="Clamp the log-ratio to +-20, and cap the ratio at is_clip.",
        change=replacing(log_ratio=lambda w: (w.chosen - w.old).detach().clamp(-RATIO_LOG_CLAMP, 0.5)),
        usable_for="Ratios below the clamp.",
    ),
    Defect(
        name="anchor-scaled",
        sentence="k3 is multiplied by 0.5.",
        violates=("KL-1", "KL-4"),
        fix="k3 = exp(d) - 1 - d.",
        change=around("k3", lambda before, w: 0.5 * before(w)),
        usable_for="kl_reg_weight = 0, the default.",
    ),
    Defect(
        name="anchor-gradient-k1",
        sentence="The value is k3, the gradient is k1's: the log-ratio itself is differentiated.",
        violates=("KL-4",),
        fix="dk3/dl[y] = exp(d) - 1.",
        change=around("k3", lambda before, w: valued(before(w), w.drift)),
        usable_for="kl_reg_weight = 0, or reading the metrics.",
    ),
    Defect(
        name="logits-rounded-to-bfloat16",
        sentence="The logits are rounded to bfloat16 before the softmax, whatever the input.",
        violates=("NUM-1", "GJS-1"),
        fix="Keep the product of hidden states and head in float32 until after the softmax.",
        change=replacing(logits=rounded_logits(torch.bfloat16)),
        seen=cite("genlm/genlm-backend#66"),
        usable_for="bfloat16 runs that bear its rounding.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="projection-in-bfloat16",
        sentence="Hidden states and head are cast to bfloat16, and so is their product, whatever the input.",
        violates=("NUM-1", "FUS-1"),
        fix="Keep hidden states, head and their product in the input's precision, at least float32 after the product.",
        change=replacing(logits=projected_in(torch.bfloat16)),
        usable_for="bfloat16 runs that bear its rounding.",
        capabilities=(Capability.FUSED, Capability.DIVERGENCE),
    ),
    Defect(
        name="forward-projection-in-bfloat16",
        sentence="The product of hidden states and head is taken in bfloat16, whatever the input, the backward's not.",
        violates=("NUM-1", "FUS-1"),
        fix="Switch autocast off around the product, or cast its operands to float32.",
        change=replacing(logits=lambda w: valued(projected_in(torch.bfloat16)(w), logits(w))),
        usable_for="bfloat16 runs that bear its rounding.",
        capabilities=(Capability.FUSED, Capability.DIVERGENCE),
    ),
    Defect(
        name="logits-rounded-to-float16",
        sentence="The logits are rounded to float16 before the softmax, whatever the input.",
        violates=("NUM-1", "GJS-1"),
        fix="Keep the product of hidden states and head in float32 until after the softmax.",
        change=replacing(logits=rounded_logits(torch.float16)),
        usable_for="float16 runs that bear its rounding.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="last-row-without-gradient",
        sentence="The last row of the batch gets no gradient.",
        violates=("GJS-9", "RED-1"),
        fix=ALL_ROWS,
        change=replacing(logits_gradient=lost(lambda g: g[-1:])),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="first-row-without-gradient",
        sentence="The first row of the batch gets no gradient.",
        violates=("GJS-9", "RED-1"),
        fix=ALL_ROWS,
        change=replacing(logits_gradient=lost(lambda g: g[:1])),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="last-token-without-gradient",
        sentence="The last position of every row gets no gradient.",
        violates=("GJS-9", "RED-1"),
        fix=ALL_ROWS,
        change=replacing(logits_gradient=lost(lambda g: g[:, -1:])),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="first-token-without-gradient",
        sentence="The first position of every row gets no gradient.",
        violates=("GJS-9", "RED-1"),
        fix=ALL_ROWS,
        change=replacing(logits_gradient=lost(lambda g: g[:, :1])),
        capabilities=DIVERGENCES,
    ),
)
