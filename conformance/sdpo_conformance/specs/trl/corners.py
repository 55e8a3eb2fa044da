"""The corners of TRL's input space, and inputs drawn within them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sdpo_conformance.inputs.choices import Source
from sdpo_conformance.inputs.numbers import Numbers
from sdpo_conformance.specs.shared import drawing
from sdpo_conformance.specs.trl.loss_input import TRLLossInput, TRLTraining


@dataclass(frozen=True)
class TRLCorner(drawing.Kinds):
    """The defaults are neutral: a local teacher, on-policy, temperature 1, full mask.

    teacher: local, served (its own top-k, at temperature 1) · mode: tail, renormalised, whole, sampled · ratio:
    on_policy, mild, ...; absent (the clip is None), no_old (old is missing). The rest: specs/shared/drawing.
    """

    teacher: tuple[str, ...] = ("local",)
    mode: tuple[str, ...] = ("tail",)
    alpha: tuple[str, ...] = ("half", "inside")
    support: tuple[str, ...] = ("few", "few", "one", "many")
    tails: tuple[str, ...] = ("free",)
    mass: tuple[str, ...] = ("normal",)
    ratio: tuple[str, ...] = ("on_policy",)
    is_clip: tuple[str, ...] = ("default",)
    temperature: tuple[str, ...] = ("one",)
    mask: tuple[str, ...] = ("full",)
    rows: tuple[str, ...] = ("absent",)
    logits: tuple[str, ...] = ("normal", "flat", "peaked")
    size: tuple[str, ...] = ("small", "small", "small", "tall", "wide", "crowd")
    layout: tuple[str, ...] = ("contiguous",)
    incoming: tuple[float, ...] = (1.0,)


NEUTRAL = TRLCorner()
SERVED = NEUTRAL.but(teacher="served", mode=("renormalised", "tail"), support=("few", "few", "one", "many", "whole"))
EVERYTHING = TRLCorner(
    teacher=("local", "local", "served"),
    mode=("sampled", "renormalised", "tail", "whole"),
    alpha=("half", "inside", "near_zero", "near_one", "zero", "one"),
    support=("few", "few", "one", "many", "whole"),
    mass=("normal", "normal", "low"),
    ratio=("on_policy", "absent", "no_old", "mild", "below", "above_cap", "clamp_high", "clamp_low"),
    is_clip=("default", "low", "one", "high", "huge"),
    temperature=("one", "below", "above"),
    mask=("full", "ragged", "random", "row_empty", "fractional", "tiny"),
    rows=("absent", "all", "some"),
    layout=("contiguous", "contiguous", "transposed", "strided", "offset", "sliced"),
    incoming=(1.0, 1.0, -0.5, 3.0),
)
"""Every kind that a MUST may ask for at once."""

MODES = {"tail": "topk_logits", "renormalised": "topk_logits", "whole": "full_logits", "sampled": "sampled_token"}


def draw(source: Source, corner: TRLCorner, dtypes: Sequence[torch.dtype]) -> TRLLossInput:
    """An input within ``corner``, in one of ``dtypes`` for the logits."""
    dtype = source.pick(dtypes)
    half = dtype in (torch.bfloat16, torch.float16)
    side = source.pick((dtype, torch.float32)) if half else dtype
    wide = torch.float32 if half else dtype
    served = source.pick(corner.teacher) == "served"
    mode = source.pick([one for one in corner.mode if not (served and one == "whole")] or ["renormalised"])
    extent = drawing.draw_extent(source, corner.size, corner.support)
    b, t = extent.b, extent.t
    numbers = Numbers(source.integer(0, 2**16))
    temperature = source.pick(drawing.TEMPERATURES[source.pick(corner.temperature)])

    student = drawing.draw_student(source, numbers, corner.logits, extent, dtype)
    teacher = drawing.draw_teacher(source, numbers, student, "equal" in corner.logits, dtype)
    tails = source.pick(corner.tails)
    if tails != "free" and extent.k < extent.v:
        support = student.topk(extent.k, dim=-1).indices
        masses = [numbers.choice(drawing.TAIL_TARGETS[kind], b, t) for kind in tails.split("_")]
        student = temperature * drawing.leaving(student / temperature, support, masses[0])
        teacher = temperature * drawing.leaving(teacher / temperature, support, masses[1])
    logits = drawing.separated(student, extent.k, dtype)
    if source.pick(corner.mass) == "low" and extent.k < extent.v and not served:
        depth = numbers.uniform(4, 9 if dtype == torch.float16 else 40, b, t, 1)
        ids = logits.double().topk(extent.k, dim=-1).indices
        teacher = teacher.scatter_add(-1, ids, -depth.expand(ids.shape))
    y = drawing.draw_ids(source, numbers, extent, logits)
    chosen = (logits.double() / temperature).log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)

    kinds = [kind for kind in corner.ratio if kind not in ("absent", "no_old")]
    missing = [kind for kind in corner.ratio if kind in ("absent", "no_old")]
    without = source.pick(missing) if missing and (not kinds or source.pick((False, True))) else ""
    clip_kinds = [kind for kind in corner.is_clip if not (dtype == torch.float16 and kind == "huge")]
    clip = source.pick(drawing.CLIPS[source.pick(clip_kinds or ["default"])])
    old = chosen - drawing.log_ratios(source, numbers, kinds or ["mild"], b, t, clip)
    sampled = mode == "sampled"
    training = TRLTraining(
        distillation_mode=MODES[mode],
        distillation_topk=extent.k if MODES[mode] == "topk_logits" else None,
        distillation_add_tail=mode == "tail",
        distillation_alpha=1.0 if sampled and not served else drawing.draw_alpha(source, corner.alpha, dtype),
        distillation_is_clip=None if without == "absent" else clip,
        temperature=temperature,
        use_teacher_server=served,
    )
    given = TRLLossInput(
        student_logits=logits,
        completion_ids=y,
        completion_mask=drawing.draw_mask(source, numbers, corner.mask, b, t, wide),
        training=training,
        self_distillation_mask=drawing.draw_rows(source, numbers, corner.rows, b, wide),
        old_per_token_logps=None if without == "no_old" else old.to(wide),
    )
    if not served:
        return replace(given, teacher_logits=teacher.to(side))
    logprobs = teacher.log_softmax(-1)
    values, ids = logprobs.topk(extent.k, dim=-1)
    return replace(
        given,
        teacher_topk_logprobs=values.to(wide),
        teacher_topk_ids=ids,
        teacher_actual_logprobs=logprobs.gather(-1, y.unsqueeze(-1)).squeeze(-1).to(wide),
    )
