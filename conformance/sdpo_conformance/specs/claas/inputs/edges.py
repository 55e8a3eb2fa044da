"""Shapes around the edges of tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from sdpo_conformance.inputs.choices import SeededSource, Source
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.corners import NEUTRAL, Corner
from sdpo_conformance.specs.claas.inputs.losses import Shape, build_case
from sdpo_conformance.specs.claas.loss_case import LossCase

EDGES = (16, 8, 32, 64, 128, 256)
WIDTHS = (257, 512, 513, 1025, 4097)
"""Hidden sizes past tiles of 256 to 4096: each visited once, for they are those of real models."""

ANY_DIVERGENCE = NEUTRAL.but(mass=("normal", "student_floor"))
ANY_LOSS = ANY_DIVERGENCE.but(
    alpha=("half", "inside", "one"),
    ratio=("mild", "below", "above_cap"),
    anchor=("off", "on"),
    mask=("full", "ragged"),
)


def edge_shape(source: Source) -> Shape:
    """Each of V, T, H and K one below, at or one above a power of two; K at most V; the product bounded."""

    def near(edges: Sequence[int], lowest: int) -> int:
        return max(lowest, source.pick(edges) + source.pick((1, -1, 0)))

    v = near(EDGES, 3)
    t = near((1, *EDGES[:5]) if v < 200 else (1, 16), 1)
    h = near(EDGES[:5], 3)
    k = min(v, near((1, *EDGES[:5]), 1))
    return Shape(b=source.pick((1, 2, 3)) if t < 60 else 1, t=t, v=v, k=k, h=h)


def wide_hidden_states(corner: Corner, entry: Capability, dtype: torch.dtype, seed: int) -> Iterator[LossCase]:
    """One case of ``corner`` for each of ``WIDTHS``, else small."""
    for h in WIDTHS:

        def shape_of(_: Source, h: int = h) -> Shape:
            return Shape(b=2, t=3, v=37, k=5, h=h)

        yield build_case(SeededSource(f"{seed}/{h}"), corner, entry, [dtype], shape_of)
