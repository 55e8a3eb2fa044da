"""Judging a trainer that makes its own optimizer: by its metrics and final adapter alone.

The whole loop is run in float64 from the start, so rounding piles up and the bounds are wider; the steps'
gradients, clipping and AdamW's settings are seen only through what they lead to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdpo_conformance.judging.compare import number
from sdpo_conformance.specs.claas.defects.step_loop_variants import distill
from sdpo_conformance.specs.claas.oracle.step_loop import norm, trainable
from sdpo_conformance.specs.claas.step_loop.explanations import (
    StepExplanation,
    as_reported,
    requirements_of,
    step_loops,
    words_of,
)
from sdpo_conformance.specs.claas.step_loop.finding import StepFinding, finding
from sdpo_conformance.specs.claas.step_loop.ground import Ground, Weights, upcast
from sdpo_conformance.specs.claas.step_loop.step_bounds import PRECISIONS, bounds_of
from sdpo_conformance.trainer.observation import METRICS, Observation

UNOBSERVED = (
    "distill did not step the optimizer class it was given: judged on its metrics and final adapter alone; "
    "each step's gradient, clipping and the optimizer's settings could not be observed"
)
"""What the user is told about such a trainer."""

Run = tuple[Sequence[Mapping[str, float]], Weights]
"""Metrics per step and the final adapter."""


def unobserved_findings(observation: Observation, ground: Ground) -> Iterator[StepFinding]:
    """Where the run departs from the spec's, and the known mistake whose run it is."""
    truth = ground.run
    departed = departure(observation, truth, ground)
    if departed is None:
        return
    for candidate in step_loops():
        run = replay(ground, candidate)
        if run is not None and departure(observation, run, ground) is None:
            first = 1 if differs_at(truth, run, 1) else 2
            words = f"the run is the one of {words_of(candidate)}"
            yield run_finding(observation, requirements_of(candidate, first), truth, departed, words, candidate)
            return
    requirement = {None: "STEP-10", 1: "STEP-1"}.get(departed.step, "STEP-2")
    yield run_finding(observation, (requirement,), truth, departed, "it is the run of no known mistake")


@dataclass(frozen=True)
class Departure:
    """Where a run leaves another: at the metrics of ``step``, or (None) only in the final adapter."""

    step: int | None


def run_finding(
    observation: Observation,
    requirements: tuple[str, ...],
    truth: Run,
    departed: Departure,
    detail: str,
    candidate: StepExplanation | None = None,
) -> StepFinding:
    """The first number that departs."""
    step = departed.step
    extra: dict[str, Any] = {}
    if candidate is not None:
        whole = {"mistake": as_reported(candidate), "alike": [], "explained": 1, "wrong": 1, "off": 0.0, "located": ""}
        extra = {"mistake": candidate.defect.name, "evidence": whole}
    if step is None:
        expected, got = "what the spec's steps lead to", "another"
        return finding(observation, requirements, "the final adapter", expected, got, detail=detail, extra=extra)
    wanted, found = truth[0][step - 1], observation.metrics[step - 1]
    key = max(METRICS, key=lambda k: abs(found.get(k, wanted[k]) - wanted[k]) / (abs(wanted[k]) + 1e-3))
    return finding(
        observation, requirements, key, number(wanted[key]), number(found[key]), step, detail=detail, extra=extra
    )


def replay(ground: Ground, candidate: StepExplanation) -> Run | None:
    """The whole loop with one mistake in it, in float64; None where it cannot run."""
    model = ground.at(ground.start)
    for parameter in trainable(model).values():
        parameter.grad = None
    try:
        found = distill(candidate.parts, model, ground.samples, ground.scenario.training, torch.optim.AdamW)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
        return None
    weights = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    model.eval()
    return found["per_step_metrics"], weights


def departure(observation: Observation, run: Run, ground: Ground) -> Departure | None:
    """Where the observed run is not this one; None if it is. The first step is at known weights: its bounds hold."""
    metrics, weights = run
    precision = PRECISIONS[observation.scenario.model.dtype]
    first = bounds_of(ground.first).metrics
    for index, (entry, wanted) in enumerate(zip(observation.metrics, metrics, strict=False)):
        relative = precision.metric_relative if index == 0 else precision.run_metrics
        for key in METRICS:
            bound = relative * abs(wanted[key]) + 10 * precision.metric_absolute
            bound = max(bound, first[key]) if index == 0 else bound
            if key in entry and not abs(entry[key] - wanted[key]) <= bound:
                return Departure(index + 1)
    final = upcast(observation.final)
    moved = norm({name: w - ground.start[name] for name, w in weights.items()})
    off = norm({name: final[name] - w for name, w in weights.items()})
    return None if off <= precision.run_adapter * moved else Departure(None)


def differs_at(one: Run, other: Run, step: int) -> bool:
    """Whether two runs' metrics differ at a step."""
    return any(abs(one[0][step - 1][k] - other[0][step - 1][k]) > 1e-6 for k in METRICS)
