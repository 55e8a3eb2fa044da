"""Shapes around the edges of tiles."""

from __future__ import annotations

from collections.abc import Sequence

from sdpo_conformance.strategies.corners import NEUTRAL
from sdpo_conformance.strategies.loss import Shape
from sdpo_conformance.strategies.source import Source

EDGES = (16, 8, 32, 64, 128, 256)

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
