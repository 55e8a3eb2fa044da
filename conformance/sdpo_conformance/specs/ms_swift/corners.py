"""The corners of ms-swift's input space, and inputs drawn within them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_conformance.inputs.choices import Source
from sdpo_conformance.inputs.numbers import Numbers
from sdpo_conformance.specs.ms_swift.loss_input import INACTIVE, MsSwiftLossInput, MsSwiftTraining
from sdpo_conformance.specs.shared import drawing


@dataclass(frozen=True)
class MsSwiftCorner(drawing.Kinds):
    """The defaults are neutral: the teacher's top-k given, temperature 1, a whole response.

    teacher: topk (log-probs given), local (logits, of which gkd_logits_topk are kept), local_smaller
    (the same with V_t < V), full, larger (V_t > V), smaller
    (V_t < V) · beta: as alpha · labels: full, ragged, holes, row_empty, first (some rows' first label counts), none ·
    prompt: same, longer (the teacher's is), rows (its rows differ in their counts) · cover: all, some (a position whose
    top-k is all -inf) · mass: normal, shifted (a constant added to the teacher's log-probs), low (e^-25 to e^-60).
    counts of the whole batch: absent, whole (this call is all of it).
    """

    teacher: tuple[str, ...] = ("topk",)
    beta: tuple[str, ...] = ("half", "inside")
    support: tuple[str, ...] = ("few", "few", "one", "many", "whole")
    temperature: tuple[str, ...] = ("one",)
    labels: tuple[str, ...] = ("full",)
    counts: tuple[str, ...] = ("absent",)
    prompt: tuple[str, ...] = ("same",)
    cover: tuple[str, ...] = ("all",)
    mass: tuple[str, ...] = ("normal",)
    logits: tuple[str, ...] = ("normal", "flat", "peaked")
    size: tuple[str, ...] = ("small", "small", "small", "tall", "wide", "crowd")
    layout: tuple[str, ...] = ("contiguous",)
    incoming: tuple[float, ...] = (1.0,)


NEUTRAL = MsSwiftCorner()
EVERYTHING = MsSwiftCorner(
    teacher=("topk", "local", "local_smaller", "full", "larger", "smaller"),
    beta=("half", "inside", "near_zero", "near_one", "zero", "one"),
    temperature=("one", "below", "above"),
    labels=("full", "ragged", "holes", "row_empty", "first"),
    prompt=("same", "longer", "rows"),
    cover=("all", "some"),
    mass=("normal", "shifted", "low"),
    layout=("contiguous", "contiguous", "transposed", "strided", "offset", "sliced"),
    incoming=(1.0, 1.0, -0.5, 3.0),
)
"""Every kind that a MUST may ask for at once."""


def draw_active(source: Source, numbers: Numbers, kinds: Sequence[str], b: int, t: int) -> Tensor:
    """(B, T + 1) bool: which labels count; T positions predict, the first label follows none of them."""
    kind = source.pick(kinds)
    counted = torch.ones(b, t, dtype=torch.bool)
    if kind == "none":
        counted = torch.zeros_like(counted)
    elif kind in ("ragged", "row_empty"):
        counted = torch.arange(t).unsqueeze(0) < numbers.below(t, b, 1) + 1
        if kind == "row_empty" and b > 1:
            counted[int(numbers.below(b, 1))] = False
    elif kind == "holes":
        counted = numbers.uniform(0, 1, b, t) < 0.6
        counted.view(-1)[int(numbers.below(b * t, 1))] = True
    first = torch.full((b, 1), False)
    if kind == "first":
        first = numbers.uniform(0, 1, b, 1) < 0.5
        first[int(numbers.below(b, 1))] = True
    return torch.cat((first, counted), dim=1)


def labelled(counted: Tensor, numbers: Numbers, v: int) -> Tensor:
    """Labels of these positions: a token id, or -100."""
    ids = numbers.below(v, *counted.shape)
    return torch.where(counted, ids, torch.full_like(ids, INACTIVE))


def elsewhere(source: Source, numbers: Numbers, kind: str, counted: Tensor) -> Tensor:
    """The teacher's counted labels: as many, in other places."""
    b, s = counted.shape
    if kind == "same":
        return counted
    if kind == "longer" or b == 1:
        width = source.integer(1, 4)
        moved = torch.cat((torch.zeros(b, width, dtype=torch.bool), counted), dim=1)
        moved[:, width] &= False
        lost = counted[:, 0]
        moved[:, 1] |= lost  # a first label would make the last position active: give it a plain place
        return moved
    total = int(counted.sum())
    width = max(s, -(-total // b)) + 1
    places = torch.zeros(b * width, dtype=torch.bool)
    free = [row * width + column for row in range(b) for column in range(1, width)]
    order = numbers.uniform(0, 1, len(free)).argsort().tolist()
    places[[free[index] for index in order[:total]]] = True
    return places.view(b, width)


def draw(source: Source, corner: MsSwiftCorner, dtypes: Sequence[torch.dtype]) -> MsSwiftLossInput:
    """An input within ``corner``, in one of ``dtypes`` for the logits."""
    dtype = source.pick(dtypes)
    half = dtype in (torch.bfloat16, torch.float16)
    side = source.pick((dtype, torch.float32)) if half else dtype
    kind = source.pick(corner.teacher)
    extent = drawing.draw_extent(source, corner.size, corner.support)
    b, t, v = extent.b, extent.t, extent.v
    numbers = Numbers(source.integer(0, 2**16))
    counted = draw_active(source, numbers, corner.labels, b, t)
    there = elsewhere(source, numbers, source.pick(corner.prompt), counted)
    whole = drawing.Extent(b, t + 1, v, extent.k)
    logits = drawing.draw_student(source, numbers, corner.logits, whole, dtype).to(dtype)

    here_at, there_at = counted.roll(-1, 1).nonzero(), there.roll(-1, 1).nonzero()
    width = there.shape[1]
    teacher = 1.5 * numbers.normal(b, width, v)
    spread = (0.5 if dtype == torch.float16 else 1.3) * source.pick((1.0, 0.2, 2.0))
    if "equal" in corner.logits and source.pick((True, False)):
        spread = 0.0
    near = logits.double()[here_at[:, 0], here_at[:, 1]] + spread * numbers.normal(here_at.shape[0], v)
    teacher[there_at[:, 0], there_at[:, 1]] = near
    training = MsSwiftTraining(
        beta=drawing.draw_alpha(source, corner.beta, dtype),
        temperature=source.pick(drawing.TEMPERATURES[source.pick(corner.temperature)]),
        gkd_logits_topk=extent.k if kind.startswith("local") else None,
        num_items_in_batch=int(counted.sum()) or 1 if source.pick(corner.counts) == "whole" else None,
    )
    fields: dict[str, Tensor] = {}
    if kind == "topk":
        values, ids = teacher.log_softmax(-1).topk(extent.k, dim=-1)
        if source.pick((False, True)):
            order = numbers.uniform(0, 1, *values.shape).argsort(-1)
            values, ids = values.gather(-1, order), ids.gather(-1, order)
        mass = source.pick(corner.mass)
        if mass == "shifted":
            values = values + numbers.uniform(-2, 2, b, width, 1)
        elif mass == "low" and side != torch.float16 and dtype != torch.float16:
            values = values - numbers.uniform(25, 60, b, width, 1)
        if source.pick(corner.cover) == "some" and there_at.shape[0] > 1:
            row, column = there_at[int(numbers.below(there_at.shape[0], 1))].tolist()
            values[row, column] = -torch.inf
        fields = {"teacher_topk_logprobs": values.to(side), "teacher_topk_indices": ids}
    elif kind.startswith("local"):
        teacher = teacher[..., : max(extent.k, v - source.integer(1, 6))] if kind == "local_smaller" else teacher
        fields = {"teacher_logits": drawing.separated(teacher, extent.k, side)}
    else:
        extra = source.integer(1, 6)
        if kind == "larger":
            teacher = torch.cat((teacher, numbers.normal(b, width, extra)), dim=-1)
        elif kind == "smaller":
            teacher = teacher[..., : max(1, v - extra)]
        fields = {"teacher_logits": teacher.to(side)}
    return MsSwiftLossInput(
        student_logits=logits,
        labels=labelled(counted, numbers, v),
        teacher_labels=labelled(there, numbers, v),
        training=training,
        **fields,
    )
