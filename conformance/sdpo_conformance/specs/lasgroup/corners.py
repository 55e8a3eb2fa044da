"""The corners of lasgroup's input space, and inputs drawn within them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdpo_conformance.inputs.choices import Source
from sdpo_conformance.inputs.numbers import Numbers
from sdpo_conformance.specs.lasgroup.loss_input import AGGREGATIONS, LasgroupLossInput, LasgroupTraining
from sdpo_conformance.specs.shared import drawing


@dataclass(frozen=True)
class LasgroupCorner(drawing.Kinds):
    """The defaults are neutral: on-policy, temperature 1, full mask, no weights.

    mode: tail, renormalised, whole, sampled · alpha: half, inside, near_zero, near_one, zero, one · tails: free, or
    student_teacher of open, closed and edge · mass of the teacher on the
    support: normal, low (down to e^-40) · ratio: absent, on_policy, mild, below, above_cap, clamp_high, clamp_low,
    infinite · weights: absent, given, token, sequence, token_normalised, sequence_normalised · rollout: kinds of its
    log-ratio · aggregation: the modes of agg_loss · rows: the self-distillation mask · counts of the whole
    batch: absent, whole (this call is all of it). The rest: specs/shared/drawing.
    """

    mode: tuple[str, ...] = ("tail",)
    alpha: tuple[str, ...] = ("half", "inside")
    support: tuple[str, ...] = ("few", "few", "one", "many")
    tails: tuple[str, ...] = ("free",)
    mass: tuple[str, ...] = ("normal",)
    ratio: tuple[str, ...] = ("on_policy",)
    is_clip: tuple[str, ...] = ("default",)
    weights: tuple[str, ...] = ("absent",)
    rollout: tuple[str, ...] = ("mild", "above_cap", "below")
    threshold: tuple[str, ...] = ("default",)
    temperature: tuple[str, ...] = ("one",)
    mask: tuple[str, ...] = ("full",)
    rows: tuple[str, ...] = ("absent",)
    aggregation: tuple[str, ...] = ("token-mean",)
    counts: tuple[str, ...] = ("absent",)
    logits: tuple[str, ...] = ("normal", "flat", "peaked")
    size: tuple[str, ...] = ("small", "small", "small", "tall", "wide", "crowd")
    layout: tuple[str, ...] = ("contiguous",)
    incoming: tuple[float, ...] = (1.0,)


NEUTRAL = LasgroupCorner()
OFF_POLICY = ("mild", "below", "above_cap")
EVERYTHING = LasgroupCorner(
    mode=("tail", "renormalised", "whole", "sampled"),
    alpha=("half", "inside", "near_zero", "near_one", "zero", "one"),
    support=("few", "few", "one", "many", "whole", "above"),
    mass=("normal", "normal", "low"),
    ratio=("on_policy", "absent", "mild", "below", "above_cap", "clamp_high", "clamp_low"),
    is_clip=("default", "low", "one", "high", "huge"),
    weights=("absent", "given", "token", "sequence", "token_normalised", "sequence_normalised"),
    rollout=("mild", "above_cap", "below", "clamp_high", "clamp_low"),
    threshold=("default", "low", "high"),
    temperature=("one", "below", "above"),
    mask=("full", "ragged", "random", "row_empty", "fractional", "tiny"),
    rows=("absent", "all", "some"),
    aggregation=AGGREGATIONS,
    layout=("contiguous", "contiguous", "transposed", "strided", "offset", "sliced"),
    incoming=(1.0, 1.0, -0.5, 3.0),
)
"""Every kind that a MUST may ask for at once."""


def draw(source: Source, corner: LasgroupCorner, dtypes: Sequence[torch.dtype]) -> LasgroupLossInput:
    """An input within ``corner``, in one of ``dtypes`` for the logits."""
    dtype = source.pick(dtypes)
    half = dtype in (torch.bfloat16, torch.float16)
    side = source.pick((dtype, torch.float32)) if half else dtype
    wide = torch.float32 if half else dtype  # what trainers and samplers hold log-probs and weights in
    mode = source.pick(corner.mode)
    extent = drawing.draw_extent(source, corner.size, corner.support)
    b, t = extent.b, extent.t
    numbers = Numbers(source.integer(0, 2**16))
    temperature = source.pick(drawing.TEMPERATURES[source.pick(corner.temperature)])

    student = drawing.draw_student(source, numbers, corner.logits, extent, dtype)
    teacher = drawing.draw_teacher(source, numbers, student, "equal" in corner.logits, dtype)
    tails = source.pick(corner.tails)
    if tails != "free" and extent.k < extent.v:
        support = student.topk(extent.k, dim=-1).indices
        for_student, for_teacher = (numbers.choice(drawing.TAIL_TARGETS[kind], b, t) for kind in tails.split("_"))
        student = temperature * drawing.leaving(student / temperature, support, for_student)
        teacher = temperature * drawing.leaving(teacher / temperature, support, for_teacher)
    logits = drawing.separated(student, extent.k, dtype)
    if source.pick(corner.mass) == "low" and extent.k < extent.v:
        depth = numbers.uniform(4, 9 if dtype == torch.float16 else 40, b, t, 1)
        ids = logits.double().topk(extent.k, dim=-1).indices
        teacher = teacher.scatter_add(-1, ids, -depth.expand(ids.shape))
    z = logits.double() / temperature
    y = drawing.draw_ids(source, numbers, extent, logits)
    chosen = z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)

    ratio_kinds = [kind for kind in corner.ratio if kind != "absent"]
    without = not ratio_kinds or ("absent" in corner.ratio and source.pick((False, True)))
    clip_kinds = [kind for kind in corner.is_clip if not (dtype == torch.float16 and kind == "huge")]
    clip = source.pick(drawing.CLIPS[source.pick(clip_kinds or ["default"])])
    old = chosen - drawing.log_ratios(source, numbers, ratio_kinds or ["mild"], b, t, clip)
    training = LasgroupTraining(
        full_logit_distillation=mode != "sampled",
        distillation_topk=None if mode in ("whole", "sampled") else extent.k,
        distillation_add_tail=mode != "renormalised",
        alpha=1.0 if mode == "sampled" else drawing.draw_alpha(source, corner.alpha, dtype),
        is_clip=None if without else clip,
        temperature=temperature,
        loss_agg_mode=source.pick(corner.aggregation),
    )
    mask = drawing.draw_mask(source, numbers, corner.mask, b, t, wide)
    given = LasgroupLossInput(
        student_logits=logits,
        teacher_logits=teacher.to(side),
        response_ids=y,
        response_mask=mask,
        training=training,
        old_log_probs=old.to(wide),
        self_distillation_mask=drawing.draw_rows(source, numbers, corner.rows, b, wide),
    )
    weighted = with_weights(source, numbers, corner, given, wide)
    return with_counts(weighted) if source.pick(corner.counts) == "whole" else weighted


def with_counts(given: LasgroupLossInput) -> LasgroupLossInput:
    """The input with the counts of a batch that it is the whole of."""
    mask = given.response_mask.double()
    if given.self_distillation_mask is not None:
        mask = mask * given.self_distillation_mask.double().unsqueeze(-1)
    tokens, rows = max(float(mask.sum()), 1.0), max(int((mask.sum(-1) > 0).sum()), 1)
    return replace(given, training=replace(given.training, batch_num_tokens=tokens, global_batch_size=rows))


def with_weights(
    source: Source, numbers: Numbers, corner: LasgroupCorner, given: LasgroupLossInput, side: torch.dtype
) -> LasgroupLossInput:
    """The input with rollout weights, or with the log-probs that they are computed from."""
    kind = source.pick(corner.weights)
    b, t = given.response_ids.shape
    if kind == "absent":
        return given
    if kind == "given":
        weights: Tensor = numbers.uniform(0.1, 3.0, b, t) * (given.response_mask.double() != 0)
        return replace(given, rollout_is_weights=weights.to(side))
    per, _, normalised = kind.partition("_")
    threshold = source.pick({"default": (2.0,), "low": (0.5, 1.0), "high": (5.0, 1e9)}[source.pick(corner.threshold)])
    assert given.old_log_probs is not None
    old = torch.nan_to_num(given.old_log_probs.double(), posinf=-1.0, neginf=-30.0)
    kinds = [one for one in corner.rollout if per == "token" or not one.startswith("clamp")]
    log_ratio = drawing.log_ratios(source, numbers, kinds or ["mild"], b, t, threshold)
    if per == "sequence":
        log_ratio = log_ratio / max(1.0, t / 2)
    return replace(
        given,
        old_log_probs=old.to(side),
        rollout_log_probs=(old - log_ratio).to(side),
        training=replace(
            given.training,
            rollout_is=per,
            rollout_is_threshold=threshold,
            rollout_is_batch_normalize=bool(normalised),
        ),
    )
