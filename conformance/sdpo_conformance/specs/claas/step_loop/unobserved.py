"""Judging a trainer that makes its own optimizer: by its metrics and final adapter alone.

The whole loop is run in float64 from the start, so rounding piles up and the bounds are wider; the steps'
gradients, clipping and AdamW's settings are seen only through what they lead to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sdpo_conformance.judging.compare import number
from sdpo_conformance.specs.claas.oracle.step_loop import AdamW, norm
from sdpo_conformance.specs.claas.step_loop.explanations import MISTAKES, Mistake, Outcome
from sdpo_conformance.specs.claas.step_loop.finding import Finding, finding
from sdpo_conformance.specs.claas.step_loop.gradients import requirements_of
from sdpo_conformance.specs.claas.step_loop.ground import Ground, Moment, Weights, upcast
from sdpo_conformance.specs.claas.step_loop.step_bounds import PRECISIONS
from sdpo_conformance.trainer.observation import METRICS, Observation

UNOBSERVED = (
    "distill did not step the optimizer class it was given: judged on its metrics and final adapter alone; "
    "each step's gradient, clipping and the optimizer's settings could not be observed"
)
"""What the user is told about such a trainer."""

Run = tuple[Sequence[Mapping[str, float]], Weights]
"""Metrics per step and the final adapter."""


def unobserved_findings(observation: Observation, ground: Ground) -> Iterator[Finding]:
    """Where the run departs from the spec's, and the known mistake whose run it is."""
    truth = ground.run
    departed = departure(observation, truth, ground)
    if departed is None:
        return
    for mistake in MISTAKES:
        run = replay(ground, mistake)
        if run is not None and departure(observation, run, ground) is None:
            first = 1 if differs_at(truth, run, 1) else 2
            words = f"the run is the one {mistake.words}"
            yield run_finding(observation, requirements_of(mistake, first), truth, departed, words)
            return
    requirement = {None: "STEP-10", 1: "STEP-1"}.get(departed.step, "STEP-2")
    yield run_finding(observation, (requirement,), truth, departed, "it is the run of no known mistake")


@dataclass(frozen=True)
class Departure:
    """Where a run leaves another: at the metrics of ``step``, or (None) only in the final adapter."""

    step: int | None


def run_finding(
    observation: Observation, requirements: tuple[str, ...], truth: Run, departed: Departure, detail: str
) -> Finding:
    """The first number that departs."""
    step = departed.step
    if step is None:
        expected, got = "what the spec's steps lead to", "another"
        return finding(observation, requirements, "the final adapter", expected, got, detail=detail)
    wanted, found = truth[0][step - 1], observation.metrics[step - 1]
    key = max(METRICS, key=lambda k: abs(found.get(k, wanted[k]) - wanted[k]) / (abs(wanted[k]) + 1e-3))
    return finding(observation, requirements, key, number(wanted[key]), number(found[key]), step, detail=detail)


def replay(ground: Ground, mistake: Mistake) -> Run | None:
    """The whole loop with one mistake in it; None where it cannot show in this scenario."""
    training = ground.scenario.training
    history: list[Weights] = [ground.start]
    left_over: Weights | None = None
    optimizer, metrics, shows = AdamW(training.learning_rate), [], False
    for _ in range(training.steps_per_batch):
        moment = Moment(ground, list(history), left_over)
        taken = mistake.take(moment)
        shows = shows or taken is not None
        outcome: Outcome = taken or (moment.truth, moment.gradient)
        metrics.append(outcome[0].metrics)
        left_over = outcome[1]
        history.append(optimizer.updated(history[-1], outcome[1]))
    return (metrics, history[-1]) if shows else None


def departure(observation: Observation, run: Run, ground: Ground) -> Departure | None:
    """Where the observed run is not this one; None if it is."""
    metrics, weights = run
    precision = PRECISIONS[observation.scenario.model.dtype]
    for index, (entry, wanted) in enumerate(zip(observation.metrics, metrics, strict=False)):
        relative = precision.metric_relative if index == 0 else precision.run_metrics
        for key in METRICS:
            bound = relative * abs(wanted[key]) + 10 * precision.metric_absolute
            if key in entry and not abs(entry[key] - wanted[key]) <= bound:
                return Departure(index + 1)
    final = upcast(observation.final)
    moved = norm({name: w - ground.start[name] for name, w in weights.items()})
    off = norm({name: final[name] - w for name, w in weights.items()})
    return None if off <= precision.run_adapter * moved else Departure(None)


def differs_at(one: Run, other: Run, step: int) -> bool:
    """Whether two runs' metrics differ at a step."""
    return any(abs(one[0][step - 1][k] - other[0][step - 1][k]) > 1e-6 for k in METRICS)
