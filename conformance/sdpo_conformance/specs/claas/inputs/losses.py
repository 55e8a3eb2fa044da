"""Building loss inputs: a source chooses the structure, a seeded generator fills in the numbers.

Hypothesis's examples so shrink to small shapes and plain kinds; what a kind means for the numbers stands here
once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from sdpo_conformance.inputs.choices import HypothesisSource, Source
from sdpo_conformance.inputs.numbers import Numbers, by_kind, draw_per_token
from sdpo_conformance.judging.call import is_fused_entry
from sdpo_conformance.protocol import Capability, FusedSDPOLossInput, SDPOLossInput, TrainingConfig
from sdpo_conformance.specs.claas.bounds import MANY_TERMS
from sdpo_conformance.specs.claas.corners import CROWD, MANY, NEAR_ONE, NEAR_ZERO, TALL, WIDE, Corner
from sdpo_conformance.specs.claas.loss_case import LossCase

ALPHAS: dict[str, tuple[float, ...]] = {
    "half": (0.5,),
    "inside": (0.3, 0.7, 0.1, 0.9),
    "near_zero": NEAR_ZERO,
    "near_one": NEAR_ONE,
    "zero": (0.0,),
    "one": (1.0,),
}
IS_CLIPS: dict[str, tuple[float, ...]] = {
    "default": (5.0,),
    "low": (0.5, 0.9, 0.3),
    "one": (1.0,),
    "high": (2.7, 1.5, 20.0, 100.0, 1e4),
    "huge": (1e9, 1e12),
}
KL_WEIGHTS = (0.1, 1.0, 0.01, 2.5, 1e-4)
FLOOR_TARGETS = (-17.5, -19.4, -15.0, -21.0, -25.0)
"""log of the support's mass, on both sides of log 1e-8 = -18.42 and never within rounding of it."""

LEAST_NEUTRAL_MASS = -16.0
"""log of the least mass that a support has where the mass is not what is tested."""

MIXES = ("uniform", "upstream", "float32_sides")
"""Half precision with everything in it; with float32 old log-probs and mask, as CLaaS's trainer has it; with
only the logits in half precision."""


@dataclass(frozen=True)
class Shape:
    """B, T, V, K and, for hidden states, H."""

    b: int
    t: int
    v: int
    k: int
    h: int


ShapeOf = Callable[[Source], Shape]


def draw_shape(source: Source, corner: Corner, fused: bool) -> Shape:
    """Small shapes mostly; tall ones cross tiles of tokens, wide ones tiles of the vocabulary."""
    size, _, length = source.pick(corner.size).partition(":")
    support, _, members = source.pick(corner.support).partition(":")
    b = source.integer(1, 3)
    if size == "tall":
        b, t = min(b, 2), int(length) if length else source.pick(TALL)
    elif size == "crowd":
        b, t = int(length) if length else source.pick(CROWD), source.integer(1, 3)
    else:
        t = source.integer(1, 5)
    if support == "many":
        k = int(members) if members else source.pick(MANY)
        v = k + source.integer(3, 70)
        t = min(t, 3 if k > 200 else 33)
    elif support == "whole":
        k = v = source.integer(2, 40)
    else:
        k = 1 if support == "one" else source.integer(2, 8)
        v = k + source.integer(2, 40)
    if size == "wide" and support != "whole":
        v = max(v, int(length) if length else source.pick(WIDE))
        b, t = (1, min(t, 2)) if v > 5000 else (b, min(t, 3))
    h = source.pick((8, 4, 17, 33, 65)) if fused else 0
    return Shape(b, t, v, k, h)


def draw_alpha(source: Source, corner: Corner) -> float:
    """A value of one of the corner's kinds, or the one that a visit names."""
    kind, _, value = source.pick(corner.alpha).partition(":")
    return float(value) if value else source.pick(ALPHAS[kind])


def draw_logits(
    source: Source, numbers: Numbers, corner: Corner, shape: Shape, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """(B, T, V) float64 student logits before hot tokens and offsets, and the offset common to a token."""
    kind = source.pick(corner.logits)
    half16 = dtype == torch.float16
    scale = {"flat": 0.05, "peaked": 2.0 if half16 else 5.0}.get(kind, 1.0 if half16 else 1.5)
    logits = scale * numbers.normal(shape.b, shape.t, shape.v)
    if source.pick((False, True)) and shape.v <= MANY_TERMS:  # equal terms: their float32 sum rounds one way
        logits = (logits * 8).round() / 8
    offset = 0.0
    if kind == "large":
        largest = {torch.bfloat16: 256.0, torch.float16: 1000.0}.get(dtype, 1e4)
        offset = source.pick((largest, -largest))
    return logits, offset


def draw_teacher(
    source: Source,
    numbers: Numbers,
    corner: Corner,
    shape: Shape,
    logits: Tensor,
    hot: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Teacher log-probs and indices, (B, T, K): the top-k of a distribution related to the student's."""
    half16 = dtype == torch.float16
    scale = (0.5 if half16 else 1.5) * source.pick((1.0, 0.2, 2.0, 1.0, 0.2, 0.05, 0.01))
    if "equal" in corner.logits and source.pick((True, False)):
        scale = 0.0
    teacher = logits + scale * numbers.normal(*logits.shape)
    if source.pick((False, True, False)):
        edge = source.pick((0, shape.v - 1))
        teacher[..., edge] = teacher.amax(-1) + 0.5
    if shape.v > 1000:
        far = [index for index in (shape.v - 1, 2**15 + 1, 2**16 + 1) if index < shape.v]
        teacher[..., far] = teacher.amax(-1, keepdim=True) + 0.25
    if hot is not None:
        teacher.scatter_(-1, hot, -100.0)
    logprobs, support = torch.topk(teacher.log_softmax(-1), shape.k, dim=-1)
    if shape.k > 64:  # the likeliest last: a support that is cut short loses what weighs most
        return logprobs.flip(-1), support.flip(-1)
    if source.pick((False, True)):
        order = numbers.uniform(0, 1, *logprobs.shape).argsort(-1)
        logprobs, support = logprobs.gather(-1, order), support.gather(-1, order)
    return logprobs, support


def draw_response(source: Source, numbers: Numbers, corner: Corner, shape: Shape, support: Tensor) -> Tensor:
    """(B, T) response ids inside or outside the support, ids 0 and V - 1 more often than chance has them."""
    kinds, index = draw_per_token(
        source,
        numbers,
        [k for k in corner.response if k != "either"] or ["inside", "outside"],
        shape.b,
        shape.t,
    )
    member = torch.zeros(shape.b, shape.t, shape.v, dtype=torch.bool).scatter_(-1, support, True)
    liking = numbers.uniform(0, 1, shape.b, shape.t, shape.v)
    if source.pick((False, True)):
        liking[..., 0] += 0.8
        liking[..., -1] += 0.8
    inside = torch.where(member, liking, -1.0).argmax(-1)
    outside = torch.where(member, -1.0, liking).argmax(-1)
    if shape.k == shape.v:
        return inside
    wants_inside = torch.tensor([kind == "inside" for kind in kinds])[index]
    return torch.where(wants_inside, inside, outside)


def draw_mask(source: Source, numbers: Numbers, corner: Corner, b: int, t: int, side: torch.dtype) -> Tensor:
    """(B, T) in one of the dtypes that upstream accepts."""
    kind = source.pick(corner.mask)
    whole: list[torch.dtype] = [side, torch.bool, torch.int64, torch.int32, torch.uint8]
    if kind == "full":
        mask = torch.ones(b, t, dtype=torch.float64)
    elif kind == "empty":
        mask = torch.zeros(b, t, dtype=torch.float64)
    elif kind == "ragged":
        lengths = numbers.below(t, b, 1) + 1
        mask = (torch.arange(t).unsqueeze(0) < lengths).double()
    elif kind == "random":
        mask = (numbers.uniform(0, 1, b, t) < 0.6).double()
        mask.view(-1)[int(numbers.below(b * t, 1))] = 1.0
    elif kind == "fractional":
        mask = (numbers.below(32, b, t) + 1).double() / 16
        return mask.to(side)
    elif kind == "holed":
        mask = (numbers.below(32, b, t) + 1).double() / 16 * (numbers.uniform(0, 1, b, t) < 0.6)
        mask.view(-1)[int(numbers.below(b * t, 1))] = 0.75
        return mask.to(side)
    else:
        mask = (numbers.below(8, b, t) + 1).double() / (16 * b * t)
        return mask.to(side)
    return mask.to(source.pick(whole))


COINCIDENCES = ("none", "none", "none", "rows", "tokens")
PER_POSITION = (
    *("student_logits", "student_hidden", "teacher_logprobs", "teacher_indices"),
    *("base_logprobs", "old_student_logprobs", "response_ids"),
)


def coincide(kind: str, tensors: Sequence[Tensor]) -> None:
    """Make the last row the first one once more, or the second token of every row its first; in place, where there are
    two."""
    for tensor in tensors:
        if kind == "rows" and tensor.shape[0] > 1:
            tensor[-1] = tensor[0]
        elif kind == "tokens" and tensor.shape[1] > 1:
            tensor[:, 1] = tensor[:, 0]


@st.composite
def loss_cases(
    draw: DrawFn,
    corner: Corner,
    entry: Capability,
    dtypes: Sequence[torch.dtype],
    shape_of: ShapeOf | None = None,
) -> LossCase:
    """``build_case`` as a Hypothesis strategy."""
    return build_case(HypothesisSource(draw), corner, entry, dtypes, shape_of)


def build_case(
    source: Source,
    corner: Corner,
    entry: Capability,
    dtypes: Sequence[torch.dtype],
    shape_of: ShapeOf | None = None,
) -> LossCase:
    """A case for ``entry`` within ``corner``, in one of ``dtypes`` for logits or hidden states; ``shape_of``
    instead of what the corner's size and support give."""
    fused = is_fused_entry(entry)
    dtype = source.pick(dtypes)
    half = dtype in (torch.bfloat16, torch.float16)
    half16 = dtype == torch.float16
    mix = source.pick(MIXES) if half else "uniform"
    near = dtype if mix in ("uniform", "upstream") else torch.float32
    side = dtype if mix == "uniform" else torch.float32
    shape = shape_of(source) if shape_of is not None else draw_shape(source, corner, fused)
    b, t = shape.b, shape.t
    numbers = Numbers(source.integer(0, 2**16))

    logits, offset = draw_logits(source, numbers, corner, shape, dtype)
    masses = [kind for kind in corner.mass if not (half16 and kind in ("teacher_floor", "student_floor", "deep"))]
    mass_kinds, mass = draw_per_token(source, numbers, masses or ["normal"], b, t)
    hot = None
    if "student_floor" in mass_kinds and shape.k < shape.v:
        hot = numbers.below(shape.v, 1).expand(b, t, 1)
    tau, support = draw_teacher(source, numbers, corner, shape, logits, hot, dtype)
    at_floor = numbers.choice(FLOOR_TARGETS, b, t)
    height = torch.zeros(b, t, dtype=torch.float64)
    if hot is not None:
        lowered = logits.gather(-1, support).logsumexp(-1) - at_floor - logits.gather(-1, hot).squeeze(-1)
        height = torch.where(mass == mass_kinds.index("student_floor"), lowered, 0.0)
    if "shifted" in mass_kinds:
        shift = numbers.uniform(-2 if half16 else -6, 2, b, t)
        tau = tau + torch.where(mass == mass_kinds.index("shifted"), shift, 0.0).unsqueeze(-1)
    if "teacher_floor" in mass_kinds:
        shift = at_floor - tau.logsumexp(-1)
        tau = tau + torch.where(mass == mass_kinds.index("teacher_floor"), shift, 0.0).unsqueeze(-1)
    y = draw_response(source, numbers, corner, shape, support)
    if "deep" in mass_kinds:
        deep = (mass == mass_kinds.index("deep")).unsqueeze(-1) & (support == y.unsqueeze(-1))
        tau = torch.where(deep, numbers.uniform(-40, -21, b, t).unsqueeze(-1), tau)

    neutral = torch.ones(b, t, dtype=torch.bool)
    if "student_floor" in mass_kinds:
        neutral = mass != mass_kinds.index("student_floor")
    leading: dict[str, Tensor]
    if fused:
        leading = hidden_and_head(numbers, shape, logits, support, neutral, hot, height, offset, dtype)
        z = leading["student_hidden"].double() @ leading["lm_head_weight"].double().T
    else:
        logits = logits * temper(logits, support, neutral).unsqueeze(-1) + offset
        if hot is not None:
            logits = logits.scatter_add(-1, hot, height.unsqueeze(-1))
        leading = {"student_logits": logits.to(dtype)}
        z = leading["student_logits"].double()
    chosen = z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)

    is_clip = source.pick(
        IS_CLIPS[source.pick([k for k in corner.is_clip if not (half16 and k == "huge")] or ["default"])]
    )
    training = TrainingConfig(
        alpha=draw_alpha(source, corner),
        is_clip=is_clip,
        kl_reg_weight=source.pick(KL_WEIGHTS) if source.pick(corner.anchor) == "on" else 0.0,
    )
    old = chosen - log_ratios(source, numbers, corner, chosen, is_clip)
    base = chosen - drifts(source, numbers, corner, chosen, half16)
    id_dtype = source.pick((torch.int64, torch.int64, torch.int32))
    fields = {
        "teacher_logprobs": tau.to(near),
        "teacher_indices": support.to(id_dtype),
        "base_logprobs": base.to(near),
        "response_mask": draw_mask(source, numbers, corner, b, t, side),
        "old_student_logprobs": old.to(side),
        "response_ids": y.to(id_dtype),
    }
    kind: Any = FusedSDPOLossInput if fused else SDPOLossInput
    coincide(source.pick(COINCIDENCES), [tensor for key, tensor in (leading | fields).items() if key in PER_POSITION])
    layout = source.pick(corner.layout)
    if layout == "expanded":
        for group in (leading, fields):
            for key, tensor in group.items():
                if key != "lm_head_weight":
                    group[key] = tensor[:1].expand_as(tensor).contiguous()
    return LossCase(
        kind(training=training, **leading, **fields),
        layout=layout,
        trainable_head=fused and source.pick(corner.head) == "trainable",
        incoming=source.pick(corner.incoming),
    )


def temper(logits: Tensor, support: Tensor, neutral: Tensor) -> Tensor:
    """(B, T) factors, 1 nearly everywhere, that flatten the logits of ``neutral`` tokens until the support has
    mass: a peaked student and a small support would else meet the floor of GJS-8 by chance."""
    factor = torch.ones(logits.shape[:2], dtype=torch.float64)
    # no vocabulary has more mass than its largest logit so many times: mostly that says enough, and takes no exp
    most = logits.amax(-1) + math.log(logits.shape[-1])
    least = logits.gather(-1, support).logsumexp(-1) - most
    if not bool((neutral & (least < LEAST_NEUTRAL_MASS + 1e-9)).any()):
        return factor
    while True:
        flat = logits * factor.unsqueeze(-1)
        mass = flat.gather(-1, support).logsumexp(-1) - flat.logsumexp(-1)
        low = neutral & (mass < LEAST_NEUTRAL_MASS)
        if not bool(low.any()):
            return factor
        factor = torch.where(low, factor / 2, factor)


def hidden_and_head(
    numbers: Numbers,
    shape: Shape,
    logits: Tensor,
    support: Tensor,
    neutral: Tensor,
    hot: Tensor | None,
    height: Tensor,
    offset: float,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Hidden states and a head whose product spreads as ``logits`` do: one column of the head raises the hot
    token, one shifts every token of the vocabulary alike, the rest is noise."""
    spread = float(logits.std()) if logits.numel() > 1 else 1.0
    hidden = spread * numbers.normal(shape.b, shape.t, shape.h) / math.sqrt(max(shape.h - 2, 1))
    head = numbers.normal(shape.v, shape.h)
    hidden *= temper(hidden[..., 2:] @ head[:, 2:].T, support, neutral).unsqueeze(-1)
    hidden[..., 0] = height
    hidden[..., 1] = offset
    head[:, 0] = 0.0
    head[:, 1] = 1.0
    if hot is not None:
        head[hot[0, 0, 0], 0] = 1.0
    return {"student_hidden": hidden.to(dtype), "lm_head_weight": head.to(dtype)}


def log_ratios(source: Source, numbers: Numbers, corner: Corner, chosen: Tensor, is_clip: float) -> Tensor:
    """(B, T) l[y] - old before rounding to the dtype of old; ``chosen`` is l[y]."""
    b, t = chosen.shape
    kinds, index = draw_per_token(source, numbers, corner.ratio, b, t)
    log_cap = min(math.log(is_clip), 17.0)
    return by_kind(
        kinds,
        index,
        {
            "on_policy": torch.zeros(b, t, dtype=torch.float64),
            "mild": numbers.normal(b, t) * 0.7,
            "below": -numbers.uniform(1.5, 8, b, t),
            "above_cap": log_cap + numbers.uniform(0.7, 2.5, b, t),
            "clamp_high": numbers.uniform(20.7, 35, b, t),
            "clamp_low": -numbers.uniform(20.7, 35, b, t),
            "infinite": numbers.choice((math.inf, -math.inf), b, t),
            "certain": chosen,
        },
    )


def drifts(source: Source, numbers: Numbers, corner: Corner, chosen: Tensor, half16: bool) -> Tensor:
    """(B, T) l[y] - base before rounding; ``chosen`` is l[y]. float16 cannot hold exp of more than 11."""
    b, t = chosen.shape
    kinds, index = draw_per_token(source, numbers, corner.drift, b, t)
    strong = numbers.choice((-1.0, 1.0), b, t) * numbers.uniform(3, 7 if half16 else 17, b, t)
    return by_kind(
        kinds,
        index,
        {
            "equal": torch.zeros(b, t, dtype=torch.float64),
            "mild": numbers.normal(b, t),
            "strong": strong,
            "certain": chosen,
            "clamp_high": strong.abs() if half16 else numbers.uniform(22, 35, b, t),
            "clamp_low": -strong.abs() if half16 else -numbers.uniform(22, 35, b, t),
        },
    )
