"""Filling in numbers: a seeded generator, and kinds that differ from token to token."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from sdpo_conformance.inputs.choices import Source

LARGE = 2**11
"""Normal numbers from which on they are kept: drawing one takes as long as copying ten."""

MOST_KEPT = 2**25
"""Numbers that are kept at all, 256 MiB: more than a rule of a default run draws, and the next draws the same."""


class KeptNormals:
    """The latest large draws. Requirements visit the same sizes, and many of them with the same seed: seven of ten
    normal numbers of a run had been drawn before."""

    def __init__(self) -> None:
        self.known: OrderedDict[tuple[bytes, tuple[int, ...]], tuple[Tensor, Tensor]] = OrderedDict()
        self.size = 0

    def draw(self, generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        """What ``torch.randn`` returns for a generator in this state, which it leaves as ``randn`` does."""
        key = (generator.get_state().numpy().tobytes(), shape)
        if key in self.known:
            self.known.move_to_end(key)
            values, after = self.known[key]
            generator.set_state(after)
            return values.clone()
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        self.known[key] = values.clone(), generator.get_state()
        self.size += values.numel()
        while self.size > MOST_KEPT:
            self.size -= self.known.popitem(last=False)[1][0].numel()
        return values


KEPT = KeptNormals()


class Numbers:
    """The seeded generator behind one example."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        if math.prod(shape) >= LARGE:
            return KEPT.draw(self.generator, shape)
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def choice(self, values: Sequence[float], *shape: int) -> Tensor:
        index = torch.randint(len(values), shape, generator=self.generator)
        return torch.tensor(values, dtype=torch.float64)[index]

    def below(self, bound: int, *shape: int) -> Tensor:
        return torch.randint(bound, shape, generator=self.generator)


def draw_per_token(source: Source, numbers: Numbers, kinds: Sequence[str], b: int, t: int) -> tuple[list[str], Tensor]:
    """Kinds by token: all tokens of one kind, one token apart, or mixed. Returns the kinds and, per token, an
    index into them."""
    unique = list(dict.fromkeys(kinds))
    first = source.pick(unique)
    pattern = source.pick(("all", "one", "mixed"))
    index = torch.full((b, t), unique.index(first))
    if len(unique) > 1 and pattern == "one":
        other = source.pick([kind for kind in unique if kind != first])
        index.view(-1)[int(numbers.below(b * t, 1))] = unique.index(other)
    elif len(unique) > 1 and pattern == "mixed":
        index = numbers.below(len(unique), b, t)
    return unique, index


def by_kind(kinds: list[str], index: Tensor, values: dict[str, Tensor]) -> Tensor:
    """Select each token's value by its kind."""
    result = torch.zeros(index.shape, dtype=torch.float64)
    for number, kind in enumerate(kinds):
        result = torch.where(index == number, values[kind], result)
    return result
