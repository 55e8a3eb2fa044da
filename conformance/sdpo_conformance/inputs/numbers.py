"""Filling in numbers: a seeded generator, and kinds that differ from token to token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdpo_conformance.inputs.choices import Source


class Numbers:
    """The seeded generator behind one example."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
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
