"""Ways to get the k3 anchor to the base policy wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_conformance.specs.claas.defects.defect import Change, Defect, around, both, replacing
from sdpo_conformance.specs.claas.defects.loss_parts import Work, drift, k3, kl, loss, renormalise, token_mean
from sdpo_conformance.specs.claas.defects.sources import cite
from sdpo_conformance.specs.claas.defects.wrong_divergence import valued
from sdpo_conformance.specs.claas.defects.wrong_importance import teacher_at_y

WITHOUT_ANCHOR = "kl_reg_weight = 0, the default; only the kl_reg metric is wrong there."
VALUES_ONLY = "kl_reg_weight = 0, the default, where every number is right."


def straight_through(w: Work) -> Tensor:
    """The clamped value with the gradient of the unclamped one."""
    difference = w.chosen - w.base
    return valued(difference.clamp(-20, 20), difference)


def clamped_to_zero_gradient(w: Work) -> Tensor:
    """k3 with the gradient of k2, d^2 / 2."""
    return valued(k3(w), w.drift.square() / 2)


def sampled_kl_of_support(w: Work) -> Tensor:
    """Not an estimator at the sampled token but KL(q, p) over the support."""
    return kl(renormalise(w.l.gather(-1, w.support)), renormalise(w.tau))


def gradient_with_ratio(w: Work) -> Tensor:
    """The anchor's value with the gradient of its terms times the ratio."""
    return w.distill_loss + w.kl_reg_weight * valued(w.kl_reg, token_mean(w, w.k3 * w.ratio))


def second_order_below(limit: float) -> Change:
    """d^2 / 2 near 0."""
    return replacing(k3=lambda w: torch.where(w.drift.abs() < limit, w.drift.square() / 2, k3(w)))


DEFECTS = (
    Defect(
        name="anchor-sign-flipped",
        sentence="The anchor's log-ratio is base minus student, as veRL's kl_penalty has it.",
        violates=("KL-1", "KL-4"),
        fix="d = clamp(l[y] - base, -20, 20); k3 = exp(d) - 1 - d.",
        change=replacing(drift=lambda w: (w.base - w.chosen).clamp(-20, 20)),
        seen=cite("marin-community/marin#1708"),
        usable_for=WITHOUT_ANCHOR,
    ),
    Defect(
        name="anchor-k1",
        sentence="The anchor is k1, the log-ratio itself.",
        violates=("KL-1", "KL-2", "KL-4"),
        fix="k3 = exp(d) - 1 - d.",
        change=replacing(k3=lambda w: w.drift),
        seen=cite("marin-community/marin#1708"),
        usable_for=WITHOUT_ANCHOR,
    ),
    Defect(
        name="anchor-k2",
        sentence="The anchor is k2, half the squared log-ratio.",
        violates=("KL-1", "KL-4"),
        fix="k3 = exp(d) - 1 - d.",
        change=replacing(k3=lambda w: w.drift.square() / 2),
        seen=cite("one-covenant/grail#42"),
        usable_for=WITHOUT_ANCHOR,
    ),
    Defect(
        name="anchor-second-order-near-zero",
        sentence="For log-ratios within 0.25 the anchor is half their square: the third order is missing.",
        violates=("KL-1", "KL-4"),
        fix="k3 = expm1(d) - d loses no digits near 0; else add d^3 / 6 and what follows.",
        change=second_order_below(0.25),
        usable_for=WITHOUT_ANCHOR,
    ),
    Defect(
        name="anchor-drift-masked",
        sentence="The mask multiplies the anchor's log-ratio, not k3.",
        violates=("RED-4",),
        fix="sum(k3 mask)/n: k3 of a weighted log-ratio is no weighted k3.",
        change=both(
            replacing(drift=lambda w: drift(w) * w.mask),
            replacing(kl_reg=lambda w: w.k3.sum() / w.count),
        ),
        usable_for="Masks of zeros and ones.",
    ),
    Defect(
        name="ratio-applied-to-anchor-gradient",
        sentence="The anchor's gradient is multiplied by the importance ratio, its value is not.",
        violates=("IS-8", "KL-4"),
        fix="The ratio multiplies the divergence alone, in the backward as in the forward.",
        change=replacing(loss=gradient_with_ratio),
        usable_for="kl_reg_weight = 0, the default.",
    ),
    Defect(
        name="anchor-absolute",
        sentence="The anchor is the absolute log-ratio.",
        violates=("KL-1", "KL-4"),
        fix="k3 = exp(d) - 1 - d.",
        change=replacing(k3=lambda w: w.drift.abs()),
        usable_for=WITHOUT_ANCHOR,
    ),
    Defect(
        name="anchor-without-minus-one",
        sentence="The anchor is exp(d) - d, so equal policies are not at 0.",
        violates=("KL-2", "KL-1"),
        fix="k3 = exp(d) - 1 - d.",
        change=replacing(k3=lambda w: w.drift.exp() - w.drift),
        seen=cite("marin-community/marin#1708"),
        usable_for="Training: the gradient is right, the values are off by a constant.",
    ),
    Defect(
        name="anchor-over-support",
        sentence="The anchor is the KL to the teacher over the support, not k3 to the base at the sampled token.",
        violates=("KL-6", "KL-1"),
        fix="k3 of clamp(l[y] - base, -20, 20), at the response token.",
        change=replacing(k3=sampled_kl_of_support),
        usable_for=WITHOUT_ANCHOR,
    ),
    Defect(
        name="anchor-value-clamped",
        sentence="k3 is clamped to +-10, as in veRL.",
        violates=("KL-3", "KL-1", "KL-4"),
        fix="Clamp the log-ratio to +-20; leave k3 as it is.",
        change=around("k3", lambda before, w: before(w).clamp(-10, 10)),
        seen=cite("OpenRLHF/OpenRLHF#1309"),
        usable_for="Policies within 2.6 nats of the base, where k3 is below 10.",
    ),
    Defect(
        name="anchor-clamp-missing",
        sentence="The anchor's log-ratio is not clamped before exp.",
        violates=("KL-3", "KL-4"),
        fix="Clamp l[y] - base to +-20 before exp.",
        change=replacing(drift=lambda w: w.chosen - w.base),
        seen=cite("THUDM/slime#2198"),
        usable_for="Policies within 20 nats of the base.",
    ),
    Defect(
        name="anchor-clamp-ten",
        sentence="The anchor's log-ratio is clamped to +-10.",
        violates=("KL-3", "KL-4"),
        fix="Clamp l[y] - base to +-20.",
        change=replacing(drift=lambda w: (w.chosen - w.base).clamp(-10, 10)),
        usable_for="Policies within 10 nats of the base.",
    ),
    Defect(
        name="anchor-clamped-above-only",
        sentence="The anchor's log-ratio has no lower clamp.",
        violates=("KL-3", "KL-4"),
        fix="Clamp l[y] - base to +-20 on both sides.",
        change=replacing(drift=lambda w: (w.chosen - w.base).clamp(max=20)),
        usable_for="Tokens at most 20 nats less likely than under the base.",
    ),
    Defect(
        name="anchor-detached",
        sentence="No gradient flows through the anchor: it is only a metric.",
        violates=("KL-4",),
        fix="Compute k3 of the student's log-probs with their graph.",
        change=around("k3", lambda before, w: before(w).detach()),
        seen=cite("Goekdeniz-Guelmez/mlx-lm-lora#69"),
        usable_for=VALUES_ONLY,
    ),
    Defect(
        name="anchor-straight-through",
        sentence="The clamp passes gradient on, so the anchor pulls outside +-20 too.",
        violates=("KL-4",),
        fix="Outside the clamp k3 is constant: no gradient.",
        change=replacing(drift=straight_through),
        seen=cite("OpenRLHF/OpenRLHF#1101"),
        usable_for="Policies within 20 nats of the base, and kl_reg_weight = 0.",
    ),
    Defect(
        name="anchor-gradient-k2",
        sentence="The value is k3, the gradient is k2's: the log-ratio.",
        violates=("KL-4",),
        fix="dk3/dl[y] = exp(d) - 1.",
        change=replacing(k3=clamped_to_zero_gradient),
        seen=cite("verl-project/verl#2953", "OpenRLHF/OpenRLHF#1309"),
        usable_for=VALUES_ONLY,
    ),
    Defect(
        name="anchor-exponential-detached",
        sentence="exp(d) is taken for a constant, so the anchor always pushes the token's probability up.",
        violates=("KL-4",),
        fix="dk3/dl[y] = exp(d) - 1.",
        change=replacing(k3=lambda w: w.drift.exp().detach() - 1 - w.drift),
        usable_for=VALUES_ONLY,
    ),
    Defect(
        name="anchor-to-old",
        sentence="The anchor is taken to the behaviour policy.",
        violates=("KL-6", "KL-1"),
        fix="Anchor to base_logprobs: the model with its adapter disabled.",
        change=replacing(drift=lambda w: (w.chosen - w.old).clamp(-20, 20)),
        seen=cite("huggingface/trl#1340"),
        usable_for=WITHOUT_ANCHOR,
    ),
    Defect(
        name="anchor-to-teacher",
        sentence="The anchor is taken to the feedback-conditioned teacher.",
        violates=("KL-6", "KL-1"),
        fix="Anchor to base_logprobs: the model with its adapter disabled.",
        change=replacing(drift=lambda w: (w.chosen - teacher_at_y(w)).clamp(-20, 20)),
        seen=cite("huggingface/trl#1340"),
        usable_for=WITHOUT_ANCHOR,
    ),
    Defect(
        name="anchor-to-itself",
        sentence="The base log-probs are the student's own, so the anchor is 0.",
        violates=("KL-1", "KL-6"),
        fix="Anchor to base_logprobs: the model with its adapter disabled.",
        change=replacing(drift=lambda w: 0 * w.chosen),
        seen=cite("kfallah/CLaaS#37"),
        usable_for=WITHOUT_ANCHOR,
    ),
    Defect(
        name="anchor-weight-ignored",
        sentence="kl_reg is reported but not in the loss, whatever kl_reg_weight.",
        violates=("KL-5", "KL-4"),
        fix="loss = distill_loss + kl_reg_weight * kl_reg.",
        change=replacing(loss=lambda w: w.distill_loss + 0 * w.kl_reg),
        seen=cite("unslothai/unsloth#11277"),
        usable_for=VALUES_ONLY,
    ),
    Defect(
        name="anchor-weight-one",
        sentence="kl_reg is added with weight 1, whatever kl_reg_weight.",
        violates=("KL-5", "KL-4"),
        fix="loss = distill_loss + kl_reg_weight * kl_reg.",
        change=replacing(loss=lambda w: w.distill_loss + w.kl_reg),
        usable_for="kl_reg_weight = 1.",
    ),
    Defect(
        name="anchor-weight-hard-coded",
        sentence="kl_reg is added with weight 0.001, whatever kl_reg_weight.",
        violates=("KL-5", "KL-4"),
        fix="loss = distill_loss + kl_reg_weight * kl_reg.",
        change=replacing(loss=lambda w: w.distill_loss + 1e-3 * w.kl_reg),
    ),
    Defect(
        name="anchor-weight-scaled",
        sentence="kl_reg is added with its weight times 2, and reported right.",
        violates=("KL-5", "KL-4"),
        fix="loss = distill_loss + kl_reg_weight * kl_reg.",
        change=replacing(loss=lambda w: w.distill_loss + 2 * w.kl_reg_weight * w.kl_reg),
        usable_for="kl_reg_weight = 0, the default.",
    ),
    Defect(
        name="anchor-weight-shared",
        sentence="The weight is shared out: loss = (1 - kl_reg_weight) * distill_loss + kl_reg_weight * kl_reg.",
        violates=("KL-5", "KL-4"),
        fix="loss = distill_loss + kl_reg_weight * kl_reg.",
        change=replacing(loss=lambda w: (1 - w.kl_reg_weight) * w.distill_loss + w.kl_reg_weight * w.kl_reg),
        usable_for="kl_reg_weight = 0, the default.",
    ),
    Defect(
        name="anchor-subtracted",
        sentence="The anchor is subtracted from the loss, so it pushes away from the base.",
        violates=("KL-5", "KL-4"),
        fix="loss = distill_loss + kl_reg_weight * kl_reg.",
        change=replacing(loss=lambda w: w.distill_loss - w.kl_reg_weight * w.kl_reg),
        usable_for=VALUES_ONLY,
    ),
    Defect(
        name="anchor-reported-weighted",
        sentence="kl_reg is reported after its weight was applied.",
        violates=("KL-5",),
        fix="Report kl_reg itself.",
        change=around(
            "result",
            lambda before, w, metrics: before(w, {**metrics, "kl_reg": w.kl_reg_weight * metrics["kl_reg"]}),
        ),
        usable_for="Training: loss and gradient are right, the metric is not.",
    ),
    Defect(
        name="anchor-weighted-twice",
        sentence="The weight is applied to kl_reg, and once more where it is added to the loss.",
        violates=("KL-5", "KL-4"),
        fix="loss = distill_loss + kl_reg_weight * kl_reg.",
        change=replacing(loss=lambda w: w.distill_loss + w.kl_reg_weight**2 * w.kl_reg),
        usable_for="kl_reg_weight = 0 and kl_reg_weight = 1.",
    ),
    Defect(
        name="anchor-scaled-by-clip",
        sentence="The anchor is only added where the ratio is not capped.",
        violates=("IS-8", "KL-1"),
        fix="The anchor does not know the ratio.",
        change=around("k3", lambda before, w: torch.where(w.ratio < w.is_clip, before(w), 0.0)),
        seen=cite("PrimeIntellect-ai/prime-rl#1391"),
        usable_for="Ratios below is_clip, and on-policy steps with is_clip > 1.",
    ),
    Defect(
        name="anchor-in-bfloat16",
        sentence="exp(d) - 1 - d is evaluated in bfloat16, where it cancels to nothing for small d.",
        violates=("NUM-1", "KL-1"),
        fix="Evaluate expm1(d) - d in float32.",
        change=around(
            "k3",
            lambda before, w: valued((w.drift.bfloat16().exp() - 1 - w.drift.bfloat16()).to(w.drift), before(w)),
        ),
        seen=cite("genlm/genlm-backend#66"),
        usable_for="kl_reg_weight = 0, or bfloat16 runs that bear its rounding.",
    ),
    Defect(
        name="distill-loss-reported-as-total",
        sentence="distill_loss is reported with the anchor in it.",
        violates=("KL-5",),
        fix="Report sum(D r mask)/n under distill_loss.",
        change=around("result", lambda before, w, metrics: before(w, {**metrics, "distill_loss": loss(w).detach()})),
        usable_for="Training: loss and gradient are right, the metric is not.",
    ),
)
