"""Scenarios on which mistakes that the runs so far cannot tell apart would differ.

Two mistakes may do the same wherever a trainer was run: a prompt that is cut shows only in prompts long enough. Before
one is named, the trainer is run where they part, as far as there is a scenario for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from sdpo_conformance.specs.claas.oracle.step_loop import AdamW
from sdpo_conformance.specs.claas.step_loop.explanations import StepExplanation, furthest, outcomes
from sdpo_conformance.specs.claas.step_loop.findings import judged_runs
from sdpo_conformance.specs.claas.step_loop.forced_replay import Forced, ReplayOutcome
from sdpo_conformance.specs.claas.step_loop.ground import Moment, Weights, ground_of
from sdpo_conformance.specs.claas.step_loop.step_bounds import Bounds, bounds_of
from sdpo_conformance.trainer.observation import Observation
from sdpo_conformance.trainer.scenarios import Scenario

VISIBLE = 3.0
"""Of a gradient's bound: mistakes whose gradients are further apart than this will be told apart."""

STEPS = 2
"""Steps of a right run along which they are compared."""

MOST = 2
"""Scenarios that a trainer is run on for the sake of a name."""


def to_tell_apart(observations: tuple[Observation, ...], scenarios: Sequence[Scenario]) -> list[Scenario]:
    """Of these scenarios the few, cheap ones first, on which what cannot be told from the mistake of these runs
    parts from it; none where the runs show one mistake, or none."""
    shown = next((one for run in judged_runs(observations).values() for one in run.wrong if one.mistake), None)
    if shown is None or shown.mistake is None:
        return []
    open_ones, found = list(shown.alike), list[Scenario]()
    seen = {one.scenario for one in observations}
    for scenario in sorted((one for one in scenarios if one not in seen), key=cost):
        if not open_ones or len(found) == MOST:
            break
        left = [one for one in open_ones if not apart(shown.mistake, one, scenario)]
        if len(left) < len(open_ones):
            found.append(scenario)
            open_ones = left
    return found


def cost(scenario: Scenario) -> int:
    """Tokens times layers."""
    return scenario.model.layers * sum(sum(lengths) for lengths in scenario.lengths)


def apart(one: StepExplanation, other: StepExplanation, scenario: Scenario) -> bool:
    """Whether two mistakes give other gradients somewhere along a right run."""
    forced, bounds = right_run(scenario)
    steps = range(1, len(bounds) + 1)
    pairs = zip(made_by(one, forced, steps), made_by(other, forced, steps), strict=False)
    return any(
        furthest(a.gradient, b.gradient, bounds[step - 1].gradient)[0] > VISIBLE
        for step, (a, b) in enumerate(pairs, start=1)
    )


def made_by(candidate: StepExplanation, forced: Forced, steps: Sequence[int]) -> list[ReplayOutcome]:
    """A candidate's outcomes, step by step."""
    return [outcome for _, outcome in outcomes(candidate, forced, steps)]


@lru_cache(maxsize=32)
def right_run(scenario: Scenario) -> tuple[Forced, list[Bounds]]:
    """The first steps of a right trainer, with what each gradient may be off by."""
    ground = ground_of(scenario)
    history: list[Weights] = [ground.start]
    optimizer, bounds = AdamW(scenario.training.learning_rate), list[Bounds]()
    for _ in range(min(scenario.steps, STEPS)):
        moment = Moment(ground, list(history))
        bounds.append(bounds_of(moment))
        history.append(optimizer.updated(history[-1], moment.gradient))
    return Forced(ground, history[:-1], history[-1]), bounds
