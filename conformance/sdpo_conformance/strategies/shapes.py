"""Shapes around the edges of tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from sdpo_conformance.cases import LossCase
from sdpo_conformance.protocol import Capability
from sdpo_conformance.strategies.corners import NEUTRAL
from sdpo_conformance.strategies.loss import Shape, loss_cases, pick

EDGES = (16, 8, 32, 64, 128, 256)


@st.composite
def edge_shapes(draw: DrawFn) -> Shape:
    """Each of V, T, H and K one below, at or one above a power of two; K at most V; the product bounded."""

    def near(edges: Sequence[int], lowest: int) -> int:
        return max(lowest, pick(draw, edges) + pick(draw, (1, -1, 0)))

    v = near(EDGES, 3)
    t = near((1, *EDGES[:5]) if v < 200 else (1, 16), 1)
    h = near(EDGES[:5], 3)
    k = min(v, near((1, *EDGES[:5]), 1))
    return Shape(b=pick(draw, (1, 2, 3)) if t < 60 else 1, t=t, v=v, k=k, h=h)


def edge_cases(entry: Capability, dtypes: Sequence[torch.dtype], below_one: bool) -> SearchStrategy[LossCase]:
    """Cases of such shapes, off-policy and anchored unless only the divergence is asked for."""
    corner = NEUTRAL.but(mass=("normal", "student_floor"))
    if not below_one:
        corner = corner.but(
            alpha=("half", "inside", "one"),
            ratio=("mild", "below", "above_cap"),
            anchor=("off", "on"),
            mask=("full", "ragged"),
        )
    return loss_cases(corner, entry, dtypes, edge_shapes())
