"""How much work a run does: the number of examples per requirement, and its time limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """Per requirement and entry: ``recorded`` cases at most, spread over those that apply; ``visits`` to each kind of
    each dimension of the input space, the ``costly`` sizes among them or not, all of them or every second (``every``
    = 2, neighbouring requirements sharing them out); and ``examples`` that Hypothesis draws. A failure is made small
    by as many further examples as ``shrinks`` says, for ``shrink_seconds`` at most; after ``requirement_seconds`` a
    slow implementation gets no more examples."""

    name: str
    visits: int
    costly: bool
    every: int
    recorded: float
    examples: int
    shrinks: int
    shrink_seconds: float
    requirement_seconds: float


PROFILES: Mapping[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("check", 1, False, 2, 12, 0, 0, 1.0, 5.0),
        Profile("quick", 1, False, 2, math.inf, 12, 30, 2.0, 20.0),
        Profile("default", 2, True, 1, math.inf, 50, 150, 4.0, 90.0),
        Profile("thorough", 10, True, 1, math.inf, 400, 1_000, 20.0, 600.0),
        Profile("fuzz", 100, True, 1, math.inf, 10_000, 5_000, 60.0, 7200.0),
    )
}
