"""How a case is cut into the parts of its ranks, and how their gradients go together again.

tp cuts the vocabulary into contiguous stretches, dp the rows, cp the positions. A rank that gets no row or
position gets a copy of one whose mask is 0: it has none that counts, but its tensors are not empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.sharded.mesh import MeshShape
from sdpo_conformance.sharded.part import HEAD, HIDDEN, LOGITS, Part
from sdpo_conformance.specs.claas.loss_case import LossCase

FILLER = -1
"""Stands for a row or position of no meaning, whose mask is 0."""


@dataclass(frozen=True)
class Cut:
    """``starts`` and ``stretches``: the first id and the number of columns of each tp rank; columns of ids from the
    vocabulary's size on are padding, and hold ``filling``. ``rows`` of each dp rank, ``positions`` of each cp rank.
    """

    mesh: MeshShape
    starts: tuple[int, ...]
    stretches: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    positions: tuple[tuple[int, ...], ...]
    filling: str = "zero"

    @property
    def extent(self) -> int:
        """Columns of all tp ranks together, padding included."""
        return max(start + size for start, size in zip(self.starts, self.stretches, strict=True))

    def as_dtensor(self, vocabulary: int) -> Cut:
        """The cut as a DTensor can lie: equal stretches, or those of torch.chunk, of which the last may be empty."""
        if len(set(self.stretches)) == 1:
            return self
        stretch = -(-vocabulary // len(self.starts))
        starts = tuple(min(place * stretch, vocabulary) for place in range(len(self.starts)))
        return replace(self, starts=starts, stretches=tuple(min(stretch, vocabulary - start) for start in starts))

    def words(self) -> str:
        """For people."""
        parts = [f"mesh {self.mesh}"]
        if self.mesh.size("tp") > 1:
            ends = [start + size for start, size in zip(self.starts, self.stretches, strict=True)]
            parts.append("ids " + ", ".join(f"{a}-{b - 1}" for a, b in zip(self.starts, ends, strict=True)))
        if self.mesh.size("dp") > 1:
            parts.append("rows " + " | ".join(places(rows) for rows in self.rows))
        if self.mesh.size("cp") > 1:
            parts.append("positions " + " | ".join(places(positions) for positions in self.positions))
        return ", ".join(parts)


def places(indices: Sequence[int]) -> str:
    """``0 2 3``, padding as ``-``."""
    shown = ["-" if index == FILLER else str(index) for index in indices]
    return " ".join(shown if len(shown) <= 8 else [*shown[:7], "..."])


@dataclass(frozen=True, eq=False)
class ShardedCase(LossCase):
    """A loss case and how it lies on the mesh."""

    cut: Cut | None = None

    @property
    def laid(self) -> Cut:
        assert self.cut is not None
        return self.cut

    def with_fields(self, **changes: Any) -> ShardedCase:
        """The same case, cut alike, with fields of the input replaced."""
        found = super().with_fields(**changes)
        assert isinstance(found, ShardedCase)
        return found


def sharded(case: LossCase, cut: Cut) -> ShardedCase:
    """``case`` on a mesh."""
    return ShardedCase(case.loss_input, case.layout, case.trainable_head, case.incoming, case.name, cut)


def chunked(vocabulary: int, ranks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Starts and stretches as torch.chunk cuts, without padding; evenly where that would leave a rank nothing."""
    stretch = -(-vocabulary // ranks)
    starts = [min(rank * stretch, vocabulary) for rank in range(ranks)]
    sizes = [min(stretch, vocabulary - start) for start in starts]
    if min(sizes) == 0:
        sizes = [vocabulary // ranks + (rank < vocabulary % ranks) for rank in range(ranks)]
        starts = [sum(sizes[:rank]) for rank in range(ranks)]
    return tuple(starts), tuple(sizes)


def aligned(vocabulary: int, ranks: int, alignment: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Starts and equal stretches, each a multiple of ``alignment``: what lies beyond the vocabulary is padding."""
    stretch = -(-vocabulary // (ranks * alignment)) * alignment
    return tuple(rank * stretch for rank in range(ranks)), (stretch,) * ranks


def runs(count: int, ranks: int, first: int) -> tuple[tuple[int, ...], ...]:
    """Indices in contiguous runs, ``first`` of them on rank 0 and the rest spread evenly."""
    rest, start, found = count - first, first, [tuple(range(first))]
    for rank in range(ranks - 1):
        size = rest // (ranks - 1) + (rank < rest % (ranks - 1))
        found.append(tuple(range(start, start + size)))
        start += size
    return tuple(run or (FILLER,) for run in found)


def balanced(count: int, ranks: int) -> tuple[tuple[int, ...], ...]:
    """The load-balanced cut of causal attention: rank r gets the chunks r and 2n-1-r of 2n, padded to whole ones."""
    size = -(-count // (2 * ranks))
    padded = [index if index < count else FILLER for index in range(2 * ranks * size)]
    chunks = [tuple(padded[start : start + size]) for start in range(0, len(padded), size)]
    return tuple(chunks[rank] + chunks[2 * ranks - 1 - rank] for rank in range(ranks))


def contiguous(count: int, ranks: int) -> tuple[tuple[int, ...], ...]:
    """Equal contiguous chunks, padded at the end."""
    size = -(-count // ranks)
    padded = [index if index < count else FILLER for index in range(ranks * size)]
    return tuple(tuple(padded[rank * size : (rank + 1) * size]) for rank in range(ranks))


def part_of(case: ShardedCase, rank: int) -> Part:
    """What ``rank`` is given."""
    cut, mesh = case.laid, case.laid.mesh
    tensors = {}
    for key, tensor in case.tensors().items():
        local = tensor if key == HEAD else tokens_of(cut, rank, tensor, masked=key == "response_mask")
        if key in (LOGITS, HEAD):
            local = vocabulary_of(cut, mesh.coordinate(rank, "tp"), local, 0 if key == HEAD else -1)
        tensors[key] = local.contiguous()
    start = cut.starts[mesh.coordinate(rank, "tp")]
    return Part(tensors, case.differentiable, start, case.vocabulary, cut.extent, case.training, case.incoming)


def tokens_of(cut: Cut, rank: int, tensor: Tensor, masked: bool = False) -> Tensor:
    """The rank's rows and positions of (B, T, ...); ``masked``: filler gets zeros."""
    rows = torch.tensor(cut.rows[cut.mesh.coordinate(rank, "dp")])
    positions = torch.tensor(cut.positions[cut.mesh.coordinate(rank, "cp")])
    local = tensor[rows.clamp(min=0)][:, positions.clamp(min=0)]
    if masked:
        real = (rows != FILLER).unsqueeze(1) & (positions != FILLER).unsqueeze(0)
        local = torch.where(real, local, torch.zeros_like(local))
    return local


def vocabulary_of(cut: Cut, place: int, tensor: Tensor, dim: int) -> Tensor:
    """The stretch of tp rank ``place`` along ``dim``, padding filled in."""
    start, size, total = cut.starts[place], cut.stretches[place], tensor.shape[dim]
    real = max(0, min(size, total - start))
    local = tensor.narrow(dim, min(start, total - real), real)
    if real == size:
        return local
    shape = list(local.shape)
    shape[dim] = size - real
    return torch.cat([local, padding(cut.filling, tensor, shape, dim)], dim=dim)


def padding(filling: str, tensor: Tensor, shape: list[int], dim: int) -> Tensor:
    """What stands in padding: zeros, something that would win every softmax, or leaves nothing beside it in float32, or
    -inf (logits alone)."""
    if filling == "masked" and dim == -1:
        return tensor.new_full(shape, float("-inf"))
    if filling == "high" and dim == -1:
        return tensor.new_full(shape, float(tensor.max()) + 4.0)
    if filling == "huge" and dim == -1:
        return tensor.new_full(shape, float(tensor.max()) + 400.0)
    if filling in ("high", "huge"):
        return ((2 if filling == "high" else 200) * tensor[:1]).expand(shape)
    return tensor.new_zeros(shape)


@dataclass(frozen=True)
class Leak:
    """A gradient where there must be none: at padding of the vocabulary, or at filler."""

    rank: int
    largest: float


def leak(case: ShardedCase, key: str, rank: int, gradient: Tensor) -> Leak | None:
    """Whether a rank's gradient to ``key`` is anything but 0 at its padding columns."""
    cut = case.laid
    place = cut.mesh.coordinate(rank, "tp")
    real = max(0, min(cut.stretches[place], case.vocabulary - cut.starts[place]))
    beyond = gradient[real:] if key == HEAD else gradient[..., real:]
    if not beyond.numel() or not bool((beyond != 0).any()):
        return None
    return Leak(rank, float(torch.nan_to_num(beyond.abs(), nan=torch.inf).max()))


def whole(case: ShardedCase, key: str, gradients: Sequence[Tensor | None], replica: int = 0) -> Tensor:
    """The gradient to the whole of ``key`` after the mean over dp x cp, from every rank's own.

    ``replica``: for the hidden states, which every tp rank holds, the tp rank whose gradient is read.
    """
    cut, mesh = case.laid, case.laid.mesh
    full = torch.zeros(case.tensors()[key].shape, dtype=torch.float64)
    for rank, gradient in enumerate(gradients):
        if gradient is None:
            continue
        place = mesh.coordinate(rank, "tp")
        if key == HIDDEN and place != replica:
            continue
        start = min(cut.starts[place], case.vocabulary)
        stop = min(start + cut.stretches[place], case.vocabulary)
        if key == HEAD:
            full[start:stop] += gradient[: stop - start]
            continue
        into = slice(None) if key == HIDDEN else slice(start, stop)
        local = gradient if key == HIDDEN else gradient[..., : stop - start]
        for b, row in enumerate(cut.rows[mesh.coordinate(rank, "dp")]):
            for t, position in enumerate(cut.positions[mesh.coordinate(rank, "cp")]):
                if row != FILLER and position != FILLER:
                    full[row, position, into] += local[b, t]
    return full / mesh.batch_ranks


def recut(case: ShardedCase, **changes: Any) -> ShardedCase:
    """The same case cut otherwise."""
    return replace(case, cut=replace(case.laid, **changes))
