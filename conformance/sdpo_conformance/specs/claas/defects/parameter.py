"""A number that a defect depends on, fitted to what was observed: it is part of the answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

REFINEMENTS = 36
"""Halvings, by the golden section, of the interval around the best of the values tried first: to 1e-7 of it."""

NEARBY = 1e-3
"""Relative step from a value at which a defect does nothing, as a temperature of 1."""

PATIENCE = 6
"""Halvings after which the distances inside the interval must have fallen: towards a value that fits they fall with the
interval, to a twentieth."""

FALLEN = 0.7

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Parameter:
    """``words``: what the number is. ``make``: the change of a loss's parts, or the parts of a step loop, at a value.
    ``values``: tried first, in order; between neighbours of the best the number is refined, unless ``whole``.
    ``stated``: the words of the defect's sentence that hold the number, in whose place a fitted one is said."""

    words: str
    make: Callable[[float], Any]
    values: tuple[float, ...]
    stated: str
    whole: bool = False

    def fitting(self, distance: Callable[[float], float], limit: float, enough: float) -> list[tuple[float, float]]:
        """Every value whose ``distance`` is within a limit, with it, the nearest first: of counts all that are tried,
        for on one input several may do the same; else the one that ``fitted`` finds."""
        tried = [(one, distance(one)) for one in self.values] if self.whole else [self.fitted(distance, enough)]
        return sorted((pair for pair in tried if pair[1] <= limit), key=lambda pair: pair[1])

    def fitted(self, distance: Callable[[float], float], enough: float) -> tuple[float, float]:
        """The value of least ``distance``, and that distance. Where no value tried comes nearer than ``enough``, and a
        step away from the best comes no nearer than the best, it is not refined."""
        tried = {value: distance(value) for value in self.values}
        best = min(tried, key=lambda value: tried[value])
        if self.whole or not math.isfinite(tried[best]):
            return best, tried[best]
        if tried[best] > enough:
            nearby = {value: distance(value) for value in (best * (1 - NEARBY), best * (1 + NEARBY))}
            if min(nearby.values()) >= tried[best]:
                return best, tried[best]
            tried |= nearby
            best = min(tried, key=lambda value: tried[value] if value in self.values else math.inf)
        index = self.values.index(best)
        low, high = self.values[max(index - 1, 0)], self.values[min(index + 1, len(self.values) - 1)]

        a, b = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        at_a, at_b = distance(a), distance(b)
        tried |= {a: at_a, b: at_b}
        larger: list[float] = []
        for _ in range(REFINEMENTS):
            larger.append(max(at_a, at_b))
            if len(larger) > PATIENCE and larger[-1] > FALLEN * larger[-1 - PATIENCE]:
                break
            if at_a <= at_b:
                high, b, at_b = b, a, at_a
                a = high - GOLDEN * (high - low)
                tried[a] = at_a = distance(a)
            else:
                low, a, at_a = a, b, at_b
                b = low + GOLDEN * (high - low)
                tried[b] = at_b = distance(b)
        best = min(tried, key=lambda value: tried[value])
        return best, tried[best]


def simplest(value: float, fits: Callable[[float], bool]) -> float:
    """The number of fewest digits near a fitted value that fits as well; the value itself otherwise."""
    for digits in range(1, 6):
        rounded = float(f"{value:.{digits}g}")
        if fits(rounded):
            return rounded
    return value


def logarithmic(low: float, high: float, count: int) -> tuple[float, ...]:
    """Values from ``low`` to ``high``, evenly spaced in their logarithm."""
    step = (high / low) ** (1 / (count - 1))
    return tuple(low * step**index for index in range(count))


def whole_numbers(values: Iterable[int]) -> tuple[float, ...]:
    """Values that are counts."""
    return tuple(float(value) for value in values)
