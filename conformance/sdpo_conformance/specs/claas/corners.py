"""Which corners of the input space a requirement visits: one field per dimension, each a set of kinds.

The first kind of each field is the one that examples shrink to.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Corner:
    """A product of kinds. The defaults are neutral: on-policy, no anchor, full mask, tame probabilities.

    alpha: half, inside, near_zero, near_one, zero, one · ratio: on_policy, mild, below, above_cap,
    clamp_high, clamp_low, infinite, certain (recorded as exactly 0) · is_clip: default, low, one, high, huge
    (beyond e^20) · anchor: off, on ·
    drift of the policy from the base: equal, mild, strong, clamp_high, clamp_low, certain (the base's log-prob is
    exactly 0) · mask: full, ragged, random,
    fractional, holed (zeros among fractions), tiny (sums to less than 1), empty · support: few, one, many (> 64),
    whole · response: inside,
    outside, either · mass of the support: normal, shifted, teacher_floor, student_floor, deep (entries below
    -20) · logits: normal, flat, peaked, large, equal (student and teacher agree) · size: small, tall, wide,
    crowd (many rows) · layout: see ``cases.LAYOUTS`` · head: frozen, trainable (fused only) · incoming: gradients
    into the loss.
    """

    alpha: tuple[str, ...] = ("half", "inside")
    ratio: tuple[str, ...] = ("on_policy",)
    is_clip: tuple[str, ...] = ("default",)
    anchor: tuple[str, ...] = ("off",)
    drift: tuple[str, ...] = ("equal", "mild")
    mask: tuple[str, ...] = ("full",)
    support: tuple[str, ...] = ("few", "few", "one", "many", "whole")
    response: tuple[str, ...] = ("either", "inside", "outside")
    mass: tuple[str, ...] = ("normal", "normal", "shifted")
    logits: tuple[str, ...] = ("normal", "flat", "peaked")
    size: tuple[str, ...] = ("small", "small", "small", "tall", "wide", "crowd")
    layout: tuple[str, ...] = ("contiguous",)
    head: tuple[str, ...] = ("frozen", "trainable")
    incoming: tuple[float, ...] = (1.0,)

    def but(self, **changes: Any) -> Corner:
        """This corner with fields replaced; a single kind may be given bare."""
        return replace(self, **{key: value if isinstance(value, tuple) else (value,) for key, value in changes.items()})


NEUTRAL = Corner()

TALL = (17, 33, 64, 131, 40, 257, 256, 301, 1025)
"""Responses past tiles of 16 to 1024 tokens, some a whole number of tiles."""

WIDE = (257, 1024, 1537, 4096, 4099, 1025, 8209, 512, 33001, 768, 70001)
"""Vocabularies past tiles of 256 to 65536, some a whole number of tiles, as real vocabularies are."""

CROWD = (9, 16, 33, 65)
"""Batches past tiles of 8 to 64 rows, one a whole number of tiles."""

MANY = (65, 128, 257, 512, 1025)
"""Supports past tiles of 64 to 1024, some a whole number of tiles."""

NEAR_ZERO = (1e-3, 0.01, 1e-6)
NEAR_ONE = (0.999, 0.99, 1 - 1e-5, 1 - 1e-7)
"""Values of alpha at which float32 still tells alpha from 0 and 1."""

EVERYTHING = Corner(
    alpha=("half", "inside", "near_zero", "near_one", "zero", "one"),
    ratio=("on_policy", "mild", "below", "above_cap", "clamp_high", "clamp_low", "certain"),
    is_clip=("default", "low", "one", "high", "huge"),
    anchor=("off", "on"),
    drift=("mild", "equal", "strong", "clamp_high", "clamp_low", "certain"),
    mask=("full", "ragged", "random", "fractional", "holed", "tiny"),
    mass=("normal", "normal", "shifted", "teacher_floor", "student_floor", "deep"),
    layout=("contiguous", "contiguous", "transposed", "strided", "offset", "sliced"),
    incoming=(1.0, 1.0, -0.5, 3.0),
)
"""Every kind that a MUST may ask for at once."""


EXPANDED: dict[str, tuple[float, ...]] = {
    "tall": TALL,
    "wide": WIDE,
    "many": MANY,
    "crowd": CROWD,
    "near_zero": NEAR_ZERO,
    "near_one": NEAR_ONE,
}
COSTLY = ("tall:1025", "wide:8209", "wide:33001", "wide:70001")
"""Sizes that a quick run leaves to chance."""


def visits(corner: Corner, costly: bool) -> list[Corner]:
    """``corner`` once for each kind of each of its fields, so that no kind is left to chance; the kinds that
    stand for a list of values once for each of them."""
    found = []
    for dimension in fields(corner):
        kinds: tuple[Any, ...] = getattr(corner, dimension.name)
        for kind in dict.fromkeys(kinds):
            if kind in EXPANDED:
                named = [f"{kind}:{value!r}" for value in EXPANDED[kind]]
                found += [corner.but(**{dimension.name: one}) for one in named if costly or one not in COSTLY]
            elif len(kinds) > 1:
                found.append(corner.but(**{dimension.name: kind}))
    return found
