"""The mesh a run is asked for: axes out of dp, cp and tp, and where a rank stands in it. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sdpo_conformance.protocol import AXES

MOST_RANKS = 16


@dataclass(frozen=True)
class MeshShape:
    """``sizes``: (axis, ranks along it) in the order of ``AXES``; an axis that was not named is absent."""

    sizes: tuple[tuple[str, int], ...]

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """``tp=2`` or ``tp=2,dp=2``; raises ValueError with one line that says what is wrong."""
        found: dict[str, int] = {}
        for part in text.split(","):
            axis, _, size = part.strip().partition("=")
            if axis not in AXES:
                raise ValueError(
                    f"--mesh {text}: no axis {axis!r}; axes are dp, cp and tp, written as tp=2 or tp=2,dp=2"
                )
            if axis in found:
                raise ValueError(f"--mesh {text}: {axis} is named twice")
            if not size.isdecimal() or int(size) < 1:
                raise ValueError(f"--mesh {text}: {axis} needs a number of ranks, as in {axis}=2, got {size!r}")
            found[axis] = int(size)
        shape = cls(tuple((axis, found[axis]) for axis in AXES if axis in found))
        if not 2 <= shape.ranks <= MOST_RANKS:
            raise ValueError(f"--mesh {text} has {shape.ranks} rank(s); from 2 to {MOST_RANKS} can be judged")
        return shape

    @property
    def ranks(self) -> int:
        return math.prod(size for _, size in self.sizes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(axis for axis, _ in self.sizes)

    @property
    def shared(self) -> frozenset[str]:
        """The axes that really cut something."""
        return frozenset(axis for axis, size in self.sizes if size > 1)

    def size(self, axis: str) -> int:
        """Ranks along ``axis``, 1 where it is absent."""
        return dict(self.sizes).get(axis, 1)

    @property
    def batch_ranks(self) -> int:
        """Ranks that the gradient is averaged over: dp x cp."""
        return self.size("dp") * self.size("cp")

    def coordinate(self, rank: int, axis: str) -> int:
        """Where ``rank`` stands along ``axis``."""
        for name, size in reversed(self.sizes):
            rank, here = divmod(rank, size)
            if name == axis:
                return here
        return 0

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in self.sizes)
