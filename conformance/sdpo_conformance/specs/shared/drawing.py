"""Drawing what several specs need: sizes, logits without near ties, teachers, masks, ratios, tails near the clamp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from sdpo_conformance.inputs.choices import Source
from sdpo_conformance.inputs.numbers import Numbers, by_kind, draw_per_token

TALL = (17, 33, 65, 130)
WIDE = (257, 1025, 4099)
MANY = (65, 128, 200)
CROWD = (9, 17)
NEAR_ZERO = (1e-3, 0.01, 1e-6)
NEAR_ONE = (0.999, 0.99, 1 - 1e-5)

ALPHAS: dict[str, tuple[float, ...]] = {
    "half": (0.5,),
    "inside": (0.3, 0.7, 0.1, 0.9),
    "near_zero": NEAR_ZERO,
    "near_one": NEAR_ONE,
    "zero": (0.0,),
    "one": (1.0,),
}


def draw_alpha(source: Source, kinds: Sequence[str], dtype: torch.dtype) -> float:
    """A weight of the teacher that ``dtype`` still tells from 0 and 1: published code makes a tensor of it."""
    values = ALPHAS[source.pick(kinds)]
    usable = [one for one in values if one in (0.0, 1.0) or 0 < float(torch.tensor(one, dtype=dtype)) < 1]
    return source.pick(usable or (0.9, 0.1))


TEMPERATURES: dict[str, tuple[float, ...]] = {"one": (1.0,), "below": (0.6, 0.8, 0.25), "above": (1.4, 1.7, 3.0)}
CLIPS: dict[str, tuple[float, ...]] = {
    "default": (2.0,),
    "low": (0.5, 0.3, 0.9),
    "one": (1.0,),
    "high": (5.0, 20.0, 1.5, 100.0),
    "huge": (1e12,),
}
TAIL_TARGETS = {"edge": (1.5e-7, 2e-7, 4e-7), "open": (3e-7, 1e-6, 1e-4, 1e-3), "closed": (3e-8, 1e-8, 1e-10)}
"""Masses that the support leaves, on both sides of the tail's clamp at 1e-7."""


class Kinds:
    """A corner: a frozen dataclass of kinds, one field per dimension."""

    def but(self, **changes: Any) -> Self:
        """This corner with fields replaced; a single kind may be given bare."""
        values = {key: value if isinstance(value, tuple) else (value,) for key, value in changes.items()}
        return replace(self, **values)  # type: ignore[type-var]


@dataclass(frozen=True)
class Extent:
    """B, T, V and K."""

    b: int
    t: int
    v: int
    k: int


def draw_extent(source: Source, sizes: Sequence[str], supports: Sequence[str]) -> Extent:
    """Small mostly. size: small, tall, wide, crowd · support: few, one, many, whole (K = V), above (K > V)."""
    size, support = source.pick(sizes), source.pick(supports)
    b, t = source.integer(1, 3), source.integer(1, 5)
    if size == "tall":
        b, t = min(b, 2), source.pick(TALL)
    elif size == "crowd":
        b, t = source.pick(CROWD), source.integer(1, 3)
    if support == "many":
        k = source.pick(MANY)
        v, t = k + source.integer(3, 70), min(t, 17)
    elif support in ("whole", "above"):
        v = source.integer(3, 24)
        k = v if support == "whole" else v + source.integer(1, 80)
    else:
        k = 1 if support == "one" else source.integer(2, 8)
        v = k + source.integer(2, 30)
    if size == "wide" and support not in ("whole", "above"):
        v, t = max(v, source.pick(WIDE)), min(t, 3)
    return Extent(b, t, v, k)


def draw_student(source: Source, numbers: Numbers, kinds: Sequence[str], extent: Extent, dtype: torch.dtype) -> Tensor:
    """(B, T, V) float64 logits. kinds: normal, flat, peaked, large (an offset of 1e4), equal."""
    kind = source.pick(kinds)
    half16 = dtype == torch.float16
    scale = {"flat": 0.05, "peaked": 2.5 if half16 else 6.0}.get(kind, 1.0 if half16 else 1.5)
    logits = scale * numbers.normal(extent.b, extent.t, extent.v)
    if kind == "large":
        logits = logits + source.pick((1.0, -1.0)) * {torch.bfloat16: 64.0, torch.float16: 256.0}.get(dtype, 1e4)
    return logits


def separated(logits: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """The logits in ``dtype``, every token's k largest raised until no rounding can exchange one for another."""
    if k >= logits.shape[-1]:
        return logits.to(dtype)
    eps = torch.finfo(dtype).eps
    for _ in range(8):
        rounded = logits.to(dtype).double()
        values, ids = rounded.topk(k + 1, dim=-1)
        spread = values[..., :1] - rounded.amin(-1, keepdim=True)
        wanted = 4 * eps * torch.maximum(rounded.abs().amax(-1, keepdim=True), spread)
        missing = (wanted - (values[..., k - 1 : k] - values[..., k:])).clamp(min=0.0)
        if not bool(missing.any()):
            break
        raised = (missing * 1.25).expand_as(ids[..., :k])
        logits = rounded.scatter_add(-1, ids[..., :k], raised)
    return logits.to(dtype)


def draw_teacher(source: Source, numbers: Numbers, logits: Tensor, equal: bool, dtype: torch.dtype) -> Tensor:
    """(B, T, V) float64 teacher logits related to the student's; ``equal``: the same at times."""
    scale = (0.5 if dtype == torch.float16 else 1.3) * source.pick((1.0, 0.2, 2.0))
    if equal and source.pick((True, False)):
        scale = 0.0
    return logits.double() + scale * numbers.normal(*logits.shape)


def leaving(logits: Tensor, support: Tensor, mass: Tensor) -> Tensor:
    """The logits with what stands off the support shifted so that it keeps ``mass`` (B, T) of the probability."""
    inside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, support, True)
    on = logits.masked_fill(~inside, -torch.inf).logsumexp(-1)
    off = logits.masked_fill(inside, -torch.inf).logsumexp(-1)
    shift = mass.log() - torch.log1p(-mass) + on - off
    return torch.where(inside | ~torch.isfinite(shift).unsqueeze(-1), logits, logits + shift.unsqueeze(-1))


def draw_mask(source: Source, numbers: Numbers, kinds: Sequence[str], b: int, t: int, side: torch.dtype) -> Tensor:
    """(B, T). kinds: full, ragged, random, row_empty, fractional, weighted (fractional, each row sums to at least 1),
    tiny (sums to less than 1), empty."""
    kind = source.pick(kinds)
    mask = torch.ones(b, t, dtype=torch.float64)
    if kind == "empty":
        mask = torch.zeros_like(mask)
    elif kind == "ragged":
        mask = (torch.arange(t).unsqueeze(0) < numbers.below(t, b, 1) + 1).double()
    elif kind == "random":
        mask = (numbers.uniform(0, 1, b, t) < 0.6).double()
        mask.view(-1)[int(numbers.below(b * t, 1))] = 1.0
    elif kind == "row_empty":
        mask = (torch.arange(t).unsqueeze(0) < numbers.below(t, b, 1) + 1).double()
        mask[int(numbers.below(b, 1))] = 0.0 if b > 1 else 1.0
    elif kind == "tiny":
        return ((numbers.below(8, b, t) + 1).double() / (16 * b * t)).to(side)
    elif kind in ("fractional", "weighted"):
        mask = (numbers.below(32, b, t) + 1).double() / 16
        if kind == "weighted":
            mask[:, 0] += (mask.sum(1) < 1).double()
        return mask.to(side)
    return mask.to(source.pick((side, torch.int64)))


def lengths_of(mask: Tensor) -> Tensor:
    """(B,) int64: a row's positions up to its last one that counts."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (places * (mask != 0)).amax(1)


def draw_rows(source: Source, numbers: Numbers, kinds: Sequence[str], b: int, side: torch.dtype) -> Tensor | None:
    """(B,) self-distillation mask, or None. kinds: absent, all, some, none."""
    kind = source.pick(kinds)
    if kind == "absent":
        return None
    if kind == "some":
        rows = (numbers.uniform(0, 1, b) < 0.5).double()
        rows[int(numbers.below(b, 1))] = 1.0
        rows[int(numbers.below(b, 1))] = 0.0
        return rows.to(side)
    return torch.full((b,), float(kind == "all"), dtype=torch.float64).to(side)


def log_ratios(source: Source, numbers: Numbers, kinds: Sequence[str], b: int, t: int, clip: float) -> Tensor:
    """(B, T) log of a ratio before clamp and cap. kinds: on_policy, mild, below, above_cap, clamp_high, clamp_low,
    infinite."""
    names, index = draw_per_token(source, numbers, kinds, b, t)
    top = min(math.log(clip), 17.0)
    values = {
        "on_policy": torch.zeros(b, t, dtype=torch.float64),
        "mild": numbers.normal(b, t) * 0.7,
        "below": -numbers.uniform(1.5, 8, b, t),
        "above_cap": top + numbers.uniform(0.7, 2.5, b, t),
        "clamp_high": numbers.uniform(20.7, 35, b, t),
        "clamp_low": -numbers.uniform(20.7, 35, b, t),
        "infinite": numbers.choice((math.inf, -math.inf), b, t),
    }
    return by_kind(names, index, values)


def draw_ids(source: Source, numbers: Numbers, extent: Extent, logits: Tensor) -> Tensor:
    """(B, T) response ids: any, or likely ones, ids 0 and V - 1 more often than chance has them."""
    liking = numbers.uniform(0, 1, extent.b, extent.t, extent.v)
    if source.pick((False, True)):
        liking = liking + logits.double().softmax(-1) * 3
    if source.pick((False, True)):
        liking[..., 0] += 0.8
        liking[..., -1] += 0.8
    return liking.argmax(-1)
