"""Where choices come from: Hypothesis, which shrinks them, or a seeded generator, which is quick."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Protocol, TypeVar

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

Kind = TypeVar("Kind")


class Source(Protocol):
    """The choices that building a case takes."""

    def pick(self, options: Sequence[Kind]) -> Kind:
        """One of ``options``; the first is the plainest."""
        ...

    def integer(self, low: int, high: int) -> int:
        """``low`` to ``high``, both included; low is the plainest."""
        ...


@cache
def whole_numbers(low: int, high: int) -> st.SearchStrategy[int]:
    """Made once: a case takes some thirty choices, and making a strategy takes longer than drawing from it."""
    return st.integers(low, high)


class HypothesisSource:
    """Choices that Hypothesis makes, and shrinks."""

    def __init__(self, draw: DrawFn) -> None:
        self.draw = draw

    def pick(self, options: Sequence[Kind]) -> Kind:
        return options[self.draw(whole_numbers(0, len(options) - 1))]

    def integer(self, low: int, high: int) -> int:
        return self.draw(whole_numbers(low, high))


class SeededSource:
    """Choices that a seed makes."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def pick(self, options: Sequence[Kind]) -> Kind:
        return self.random.choice(list(options))

    def integer(self, low: int, high: int) -> int:
        return self.random.randint(low, high)
