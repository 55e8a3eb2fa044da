"""One thing that a run did wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.trainer.observation import Observation


@dataclass(frozen=True)
class StepFinding:
    """Under the requirements it breaks; the first names it."""

    requirements: tuple[str, ...]
    disagreement: Disagreement


def finding(
    observation: Observation,
    requirements: str | tuple[str, ...],
    aspect: str,
    expected: str,
    got: str,
    step: int | None = None,
    **more: Any,
) -> StepFinding:
    """A finding about this run; ``step`` counts from 1."""
    where = observation.scenario.name if step is None else f"step {step} of {observation.scenario.name}"
    extra = {"scenario": observation.scenario.name, "step": step, **more.pop("extra", {})}
    found = Disagreement(aspect=f"{aspect} ({where})", expected=expected, got=got, probe="distill", extra=extra, **more)
    return StepFinding((requirements,) if isinstance(requirements, str) else requirements, found)
