"""How finely a column of metrics was written down, and so what two equal entries are worth as evidence.

0.0312 twice in a log rounded to four decimals is what convergence looks like; 0.031238472103118896 twice is
not. Evidence is counted in decades: log10 of how far the value usually moves over how far it could have moved
without showing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise

_FLOAT32_ROUNDING = 2.0**-22
#: Without any other step to compare with, a step is taken to move a metric by one percent.
_USUAL_RELATIVE_MOVE = 0.01


def resolution(values: Sequence[float]) -> float:
    """The smallest difference that the column could show: of its decimals, or of its binary precision."""
    finite = [abs(value) for value in values if math.isfinite(value) and value]
    if not finite:
        return 0.0
    decimals = max(_decimals(value) for value in finite)
    bits = max(8, max(_bits(value) for value in finite))
    return max(10.0**-decimals, max(finite) * 2.0 ** (1 - bits))


def same(a: float, b: float) -> bool:
    """Equal up to float32 rounding."""
    return abs(a - b) <= _FLOAT32_ROUNDING * max(abs(a), abs(b))


def usual_moves(values: Sequence[float], finest: float) -> list[float]:
    """For each pair of neighbours, the smallest visible move of any *other* pair.

    The smallest rather than the mean is the cautious choice: moves shrink while a run converges. With no
    other
    pair that moved visibly, a step is taken to move a metric by one percent.
    """
    moves = [_visible_move(a, b, finest) for a, b in pairwise(values)]
    least = sorted(moves)[:2]
    fallback = _USUAL_RELATIVE_MOVE * max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    others = [least[1] if len(least) > 1 and move == least[0] else least[0] for move in moves]
    return [other if math.isfinite(other) else fallback for other in others]


def _visible_move(a: float, b: float, finest: float) -> float:
    """Their distance; infinite, so that it never is the smallest, where nothing visible moved."""
    if not (math.isfinite(a) and math.isfinite(b)) or same(a, b) or abs(a - b) < finest / 2:
        return math.inf
    return abs(a - b)


def surprise(move: float, usual: float, finest: float) -> float:
    """Decades by which a move is smaller than usual, as far as the column can show it; never negative."""
    smallest = max(move, finest, 1e-300)
    if not (0 < usual < math.inf and smallest < math.inf):
        return 0.0  # numbers whose difference overflows say nothing about standing still
    return max(0.0, math.log10(usual) - math.log10(smallest))


def _decimals(value: float) -> int:
    exponent = Decimal(repr(value)).normalize().as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


def _bits(value: float) -> int:
    mantissa = int(math.frexp(value)[0] * 2**53)
    return 53 - ((mantissa & -mantissa).bit_length() - 1)
