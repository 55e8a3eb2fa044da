"""The corners of ``forward_kl_topk``'s input space, and inputs drawn within them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sdpo_conformance.inputs.choices import Source
from sdpo_conformance.inputs.numbers import Numbers, draw_per_token
from sdpo_conformance.specs.shared import drawing
from sdpo_conformance.specs.verl_topk.loss_input import AGGREGATIONS, VerlTopKLossInput, VerlTopKTraining

CLAMPS: dict[str, tuple[float | None, ...]] = {"default": (-10.0,), "off": (None,), "other": (-2.0, -5.0, -20.0)}
CAPS: dict[str, tuple[float | None, ...]] = {"default": (10.0,), "off": (None,), "other": (0.3, 0.05, 1.5)}

CHUNKS = ("even", "one_over", "one_under", "beyond")


@dataclass(frozen=True)
class VerlTopKCorner(drawing.Kinds):
    """The defaults are neutral: verl's options, no clamp reached, full mask.

    clamp (log_prob_min_clamp), cap (loss_max_clamp): default, off, other · tokens: plain, student_low (a support token
    far below the clamp), teacher_low, teacher_inf (-inf), both_low, negative (the student above the teacher), far (the
    sum beyond the cap) · counts: local (of this call), global (of a larger batch, over ranks) · scale: none, given ·
    lengths (response_lengths): absent, given · chunks of the vocabulary: off, even, one_over (the last of one column),
    one_under (one column short), beyond (one chunk).
    """

    clamp: tuple[str, ...] = ("default",)
    cap: tuple[str, ...] = ("default",)
    tokens: tuple[str, ...] = ("plain",)
    support: tuple[str, ...] = ("few", "few", "one", "many", "whole")
    temperature: tuple[str, ...] = ("one",)
    mask: tuple[str, ...] = ("full",)
    counts: tuple[str, ...] = ("local",)
    aggregation: tuple[str, ...] = ("token-mean",)
    scale: tuple[str, ...] = ("none",)
    lengths: tuple[str, ...] = ("absent",)
    chunks: tuple[str, ...] = ("off",)
    logits: tuple[str, ...] = ("normal", "flat", "peaked")
    size: tuple[str, ...] = ("small", "small", "small", "tall", "wide", "crowd")
    layout: tuple[str, ...] = ("contiguous",)
    incoming: tuple[float, ...] = (1.0,)


NEUTRAL = VerlTopKCorner()
EVERYTHING = VerlTopKCorner(
    clamp=("default", "off", "other"),
    cap=("default", "off", "other"),
    tokens=("plain", "student_low", "teacher_low", "teacher_inf", "both_low", "negative", "far"),
    temperature=("one", "below", "above"),
    mask=("full", "ragged", "random", "row_empty", "fractional"),
    counts=("local", "global"),
    aggregation=AGGREGATIONS,
    scale=("none", "given"),
    lengths=("absent", "given"),
    chunks=("off", *CHUNKS),
    layout=("contiguous", "contiguous", "transposed", "strided", "offset", "sliced"),
    incoming=(1.0, 1.0, -0.5, 3.0),
)
"""Every kind that a MUST may ask for at once."""


def draw_chunk_size(source: Source, kind: str, vocabulary: int) -> int:
    """Columns in a chunk; more than the vocabulary has where no size is of this kind."""
    of = {"even": vocabulary, "one_over": vocabulary - 1, "one_under": vocabulary + 1, "beyond": 0}[kind]
    sizes = [size for size in range(2, vocabulary) if of and of % size == 0]
    return source.pick(sizes or (vocabulary + 1,))


def draw(source: Source, corner: VerlTopKCorner, dtypes: Sequence[torch.dtype]) -> VerlTopKLossInput:
    """An input within ``corner``, in one of ``dtypes`` for the logits."""
    dtype = source.pick(dtypes)
    half = dtype in (torch.bfloat16, torch.float16)
    wide = torch.float32 if half else dtype
    extent = drawing.draw_extent(source, corner.size, corner.support)
    b, t = extent.b, extent.t
    numbers = Numbers(source.integer(0, 2**16))
    temperature = source.pick(drawing.TEMPERATURES[source.pick(corner.temperature)])
    clamp = source.pick(CLAMPS[source.pick(corner.clamp)])
    cap = source.pick(CAPS[source.pick(corner.cap)])
    level = -10.0 if clamp is None else clamp

    student = drawing.draw_student(source, numbers, corner.logits, extent, dtype)
    teacher = drawing.draw_teacher(source, numbers, student, "equal" in corner.logits, dtype)
    logprobs, ids = teacher.log_softmax(-1).topk(extent.k, dim=-1)
    names, index = draw_per_token(source, numbers, corner.tokens, b, t)

    def of_kind(*kinds: str) -> torch.Tensor:
        found = torch.zeros(b, t, dtype=torch.bool)
        for number, name in enumerate(names):
            if name in kinds:
                found |= index == number
        return found.unsqueeze(-1)

    last = ids[..., -1:]
    sunk = student.logsumexp(-1, keepdim=True) + (level - numbers.uniform(1, 6, b, t, 1)) * temperature
    low = of_kind("student_low", "both_low")
    student = torch.where(low, student.scatter(-1, last, sunk), student)
    if extent.k < extent.v:
        depth = numbers.uniform(12, 16, b, t, 1) * temperature
        far = student.scatter_add(-1, ids, -depth.expand(ids.shape))
        student = torch.where(of_kind("far"), far, student)
    ends = logprobs[..., -1:].clone()
    ends = torch.where(of_kind("teacher_low", "both_low"), level - numbers.uniform(1, 6, b, t, 1), ends)
    ends = torch.where(of_kind("teacher_inf") & (clamp is not None), torch.full_like(ends, -torch.inf), ends)
    logprobs = torch.cat((logprobs[..., :-1], ends), dim=-1)
    tempered = (student / temperature).log_softmax(-1).gather(-1, ids)
    below = tempered - numbers.uniform(0.2, 1.0, b, t, 1)
    logprobs = torch.where(of_kind("negative"), below, logprobs)

    mask = drawing.draw_mask(source, numbers, corner.mask, b, t, wide)
    total = float(mask.double().sum())
    is_global = source.pick(corner.counts) == "global"
    training = VerlTopKTraining(
        log_prob_min_clamp=clamp,
        loss_max_clamp=cap,
        temperature=temperature,
        loss_agg_mode=source.pick(corner.aggregation),
        dp_size=source.pick((2, 4)) if is_global else 1,
        batch_num_tokens=total * source.pick((3.0, 1.5)) + 5.0 if is_global else max(total, 1.0),
        global_batch_size=b + source.pick((3, 7)) if is_global else b,
        loss_scale_factor=source.pick((12.0, 100.0)) if source.pick(corner.scale) == "given" else None,
    )
    lengths = drawing.lengths_of(mask) if source.pick(corner.lengths) == "given" else None
    chunks = source.pick(corner.chunks)
    if chunks != "off":
        size = draw_chunk_size(source, chunks, extent.v)
        training = replace(training, use_chunked_topk=True, chunked_topk_chunk_size=size)
    return VerlTopKLossInput(
        student_logits=drawing.separated(student, extent.k, dtype),
        teacher_logprobs=logprobs.to(wide),
        teacher_ids=ids,
        response_mask=mask,
        training=training,
        response_lengths=lengths,
    )
