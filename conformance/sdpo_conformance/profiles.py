"""How much work a run does: the number of examples per requirement, and its time limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """``examples`` that Hypothesis draws per requirement and entry; ``shrink_seconds`` spent on making a
    failure small; ``requirement_seconds`` after which a slow implementation gets no more examples."""

    name: str
    examples: int
    shrink_seconds: float
    requirement_seconds: float


PROFILES: Mapping[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("quick", 25, 2.0, 20.0),
        Profile("default", 100, 4.0, 90.0),
        Profile("thorough", 500, 20.0, 600.0),
        Profile("fuzz", 10_000, 60.0, 7200.0),
    )
}
