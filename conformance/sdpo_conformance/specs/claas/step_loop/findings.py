"""Everything a run did wrong, each finding under the requirement that names it.

A step's gradient is compared with the truth at the trainer's own weights. Where it differs, the known mistake
that it equals (``explanations``) says which requirement is broken; an unexplained difference counts against
STEP-1 at the first step and STEP-2 at later ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sdpo_conformance.specs.claas.step_loop.finding import StepFinding, finding
from sdpo_conformance.specs.claas.step_loop.gradients import (
    JudgedRun,
    evidence,
    explain_runs,
    gradient_finding,
    judged_run,
    only_lengths,
)
from sdpo_conformance.specs.claas.step_loop.ground import Ground, ground_of, upcast
from sdpo_conformance.specs.claas.step_loop.metric_mistakes import MetricMistakes, metric_mistakes
from sdpo_conformance.specs.claas.step_loop.step_metrics import metric_findings, shape_findings
from sdpo_conformance.specs.claas.step_loop.unobserved import unobserved_findings
from sdpo_conformance.specs.claas.step_loop.update_mistakes import update_mistake
from sdpo_conformance.specs.claas.step_loop.updates import update_findings
from sdpo_conformance.trainer.observation import Observation

Findings = tuple[tuple[Observation, Sequence[StepFinding]], ...]


@dataclass(frozen=True)
class Shown:
    """What the runs show together: the evidence about their gradients, whether these are wrong in their length alone,
    what their wrong metrics are, and the mistake that their updates show."""

    gradients: Mapping[str, Any]
    scaled: bool
    metrics: MetricMistakes
    updates: str


@lru_cache(maxsize=24)
def judged_once(observation: Observation) -> JudgedRun:
    """A run with its steps judged, kept for the next batch of runs that it is in."""
    return judged_run(observation, ground_at(observation))


@lru_cache(maxsize=8)
def judged_runs(observations: tuple[Observation, ...]) -> Mapping[int, JudgedRun]:
    """The runs of one trainer whose steps could be observed, by their place: what explains one run is held against
    all. Worked out once while the runs are among the latest 8 batches of them."""
    judged: dict[int, JudgedRun] = {}
    for number, observation in enumerate(observations):
        if observation.observed:
            judged[number] = judged_once(observation)
    explain_runs(list(judged.values()))
    return judged


@lru_cache(maxsize=8)
def findings_of(observations: tuple[Observation, ...]) -> Findings:
    """Everything wrong with these runs of one trainer, run by run; kept as the judged runs are."""
    judged = judged_runs(observations)
    runs = list(judged.values())
    updates = update_mistake(observations)
    shown = Shown({**evidence(runs), "updates": updates}, only_lengths(runs), metric_mistakes(runs), updates)
    return tuple(
        (observation, tuple(_findings(observation, judged.get(number), shown)))
        for number, observation in enumerate(observations)
    )


def findings(observation: Observation) -> Sequence[StepFinding]:
    """Everything wrong with one run, by itself."""
    return findings_of((observation,))[0][1]


def ground_at(observation: Observation) -> Ground:
    """The scenario's ground, from the weights that the run began at."""
    ground = ground_of(observation.scenario)
    return ground.from_weights(upcast(observation.start)) if "same" in observation.scenario.history else ground


def _findings(observation: Observation, run: JudgedRun | None, shown: Shown) -> Iterator[StepFinding]:
    yield from state_findings(observation, shown.updates)
    yield from shape_findings(observation, shown.metrics, shown.updates)
    if run is None:
        yield from unobserved_findings(observation, ground_at(observation))
        return
    for judgement in run.wrong:
        yield gradient_finding(judgement, observation, shown.gradients, shown.scaled)
    yield from metric_findings(observation, run.steps, shown.metrics)
    yield from update_findings(observation, shown.updates)


def state_findings(observation: Observation, mistake: str) -> Iterator[StepFinding]:
    """What of the model changed besides the adapter's weights."""
    if observation.changed:
        more = f" and {len(observation.changed) - 1} more" if len(observation.changed) > 1 else ""
        yield finding(
            observation,
            "STEP-9",
            "the samples, and the model apart from the adapter's weights",
            expected="as it was found, the adapter enabled",
            got=observation.changed[0] + more,
            extra={"shows": "state", "mistake": mistake},
        )
