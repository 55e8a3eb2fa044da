"""Drawing how a case is cut: the kinds of cut that a rule visits, from Hypothesis or from a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from sdpo_conformance.inputs.choices import HypothesisSource, SeededSource, Source
from sdpo_conformance.protocol import Capability
from sdpo_conformance.sharded.mesh import MeshShape
from sdpo_conformance.specs.claas.corners import Corner, visits
from sdpo_conformance.specs.claas.inputs.losses import build_case
from sdpo_conformance.specs.claas.loss_case import LossCase
from sdpo_conformance.specs.claas.sharded.cut import (
    Cut,
    ShardedCase,
    aligned,
    balanced,
    chunked,
    contiguous,
    runs,
    sharded,
)


@dataclass(frozen=True)
class Cuts:
    """vocabulary: chunk (as torch.chunk), or aligned:N (equal stretches, a multiple of N, padding at the end) ·
    filling of padding: zero, high (it would win every softmax), huge (exponentials beside it are 0), masked (-inf) ·
    rows: even, lopsided, none_first, none_last (a rank has no row that counts) · positions: contiguous, balanced (as
    for causal attention)."""

    vocabulary: tuple[str, ...] = ("chunk",)
    filling: tuple[str, ...] = ("zero",)
    rows: tuple[str, ...] = ("even", "lopsided")
    positions: tuple[str, ...] = ("contiguous", "balanced")


PLAIN = Cuts()
PADDED = Cuts(vocabulary=("aligned:1", "aligned:4", "aligned:64"), filling=("zero", "high", "huge", "masked"))


def draw_cut(source: Source, mesh: MeshShape, cuts: Cuts, vocabulary: int, rows: int, positions: int) -> Cut:
    """One of ``cuts`` for a case of this size."""
    kind, _, alignment = source.pick(cuts.vocabulary).partition(":")
    tp, dp, cp = mesh.size("tp"), mesh.size("dp"), mesh.size("cp")
    starts, stretches = (
        aligned(vocabulary, tp, int(alignment)) if kind == "aligned" and tp > 1 else chunked(vocabulary, tp)
    )
    shares = {
        "even": runs(rows, dp, -(-rows // dp)) if dp > 1 else (tuple(range(rows)),),
        "lopsided": runs(rows, dp, max(1, rows - 1)) if dp > 1 else (tuple(range(rows)),),
        "none_first": runs(rows, dp, 0) if dp > 1 else (tuple(range(rows)),),
        "none_last": runs(rows, dp, rows) if dp > 1 else (tuple(range(rows)),),
    }
    whole = (tuple(range(positions)),)
    spread = balanced if source.pick(cuts.positions) == "balanced" else contiguous
    return Cut(
        mesh=mesh,
        starts=starts,
        stretches=stretches,
        rows=shares[source.pick(cuts.rows)],
        positions=spread(positions, cp) if cp > 1 else whole,
        filling=source.pick(cuts.filling),
    )


def build_sharded(
    source: Source, corner: Corner, entry: Capability, dtypes: Sequence[torch.dtype], mesh: MeshShape, cuts: Cuts
) -> ShardedCase:
    """A case of ``corner``, cut one way of ``cuts``."""
    case = build_case(source, corner, entry, dtypes)
    return laid(source, case, mesh, cuts)


def laid(source: Source, case: LossCase, mesh: MeshShape, cuts: Cuts) -> ShardedCase:
    """``case`` cut one way of ``cuts``."""
    rows, positions = case.loss_input.response_ids.shape
    return sharded(case, draw_cut(source, mesh, cuts, case.vocabulary, rows, positions))


@st.composite
def sharded_cases(
    draw: DrawFn, corner: Corner, entry: Capability, dtypes: Sequence[torch.dtype], mesh: MeshShape, cuts: Cuts
) -> ShardedCase:
    """``build_sharded`` as a Hypothesis strategy."""
    return build_sharded(HypothesisSource(draw), corner, entry, dtypes, mesh, cuts)


def sharded_visits(
    seed: str, corner: Corner, entry: Capability, dtypes: Sequence[torch.dtype], mesh: MeshShape, cuts: Cuts
) -> Iterator[ShardedCase]:
    """Each kind of each dimension of the case, and each kind of cut, at least once."""
    kinds = [replace(cuts, **{f.name: (kind,)}) for f in fields(cuts) for kind in getattr(cuts, f.name)]
    corners = visits(corner, costly=False)
    for number in range(max(len(kinds), len(corners))):
        source = SeededSource(f"{seed}/{number}")
        yield build_sharded(
            source,
            corners[number % len(corners)] if corners else corner,
            entry,
            dtypes,
            mesh,
            kinds[number % len(kinds)],
        )
