"""Whether two checks found the same, by their words: where no values were kept."""

from __future__ import annotations

import math
import re

NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")


def place(aspect: str) -> str:
    """The quantity, without the element: two elements may be equally wrong."""
    return aspect.partition("[")[0]


def alike(one: str, other: str) -> bool:
    """The same words, with numbers that agree to three digits."""
    if NUMBER.sub("#", one) != NUMBER.sub("#", other):
        return False
    pairs = zip(NUMBER.findall(one), NUMBER.findall(other), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=1e-3, abs_tol=1e-12) for a, b in pairs)
