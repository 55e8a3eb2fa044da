"""The scenarios tell the catalogued step loops from the truth, and the diagnosis names trainers it has never seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from variants import DEFECTIVE

from sdpo_conformance.specs.claas.oracle.step_loop import AdamW
from sdpo_conformance.specs.claas.step_loop.explanations import furthest, outcomes, step_loops
from sdpo_conformance.specs.claas.step_loop.findings import findings
from sdpo_conformance.specs.claas.step_loop.forced_replay import RIGHT, Forced, replayed
from sdpo_conformance.specs.claas.step_loop.ground import Moment, Weights, ground_of
from sdpo_conformance.specs.claas.step_loop.step_bounds import Bounds, bounds_of
from sdpo_conformance.trainer.observation import observe
from sdpo_conformance.trainer.scenarios import BFLOAT16, SCENARIOS, Scenario, samples_of

VISIBLE = 3.0
"""How far beyond the bound a mistake has to be somewhere, so that no sound trainer is taken for it."""

Ground = tuple[Forced, list[tuple[Moment, Bounds]]]


@pytest.fixture(scope="module")
def right_runs() -> list[Ground]:
    """Each float32 scenario, run right, with the truth of its first steps."""
    found = []
    for scenario in SCENARIOS:
        ground = ground_of(scenario)
        history: list[Weights] = [ground.start]
        optimizer, steps = AdamW(scenario.training.learning_rate), []
        left_over: Weights | None = None
        for _ in range(min(scenario.steps, 2)):
            moment = Moment(ground, list(history), left_over)
            steps.append((moment, bounds_of(moment)))
            left_over = moment.gradient
            history.append(optimizer.updated(history[-1], moment.gradient))
        found.append((Forced(ground, history[:-1], history[-1]), steps))
    return found


def test_the_right_loop_replays_to_the_truth(right_runs: list[Ground]) -> None:
    for forced, steps in right_runs:
        for (moment, bounds), (_, outcome) in zip(steps, replayed(RIGHT, forced), strict=True):
            assert furthest(outcome.gradient, moment.gradient, bounds.gradient)[0] < 0.01


def test_a_loss_that_writes_into_its_input_leaves_the_truth_alone(right_runs: list[Ground]) -> None:
    def scribbling(loss_input: Any) -> Mapping[str, Any]:
        found = RIGHT.loss(loss_input)
        for tensor in (loss_input.old_student_logprobs, loss_input.base_logprobs, loss_input.teacher_logprobs):
            tensor.zero_()
        return found

    forced, _ = right_runs[0]
    ground = forced.ground
    kept = [*ground.recorded, *(t for one in ground.prepared for t in (one.base_logprobs, one.teacher_logprobs))]
    before = [tensor.clone() for tensor in kept]
    list(replayed(replace(RIGHT, loss=scribbling), forced))
    assert all(torch.equal(one, two) for one, two in zip(before, kept, strict=True))


BESIDE_THE_GRADIENT = ("STEP-6", "STEP-9", "STEP-10", "STEP-11", "STEP-12")

LATER = {"refresh-once", "refresh-every-other-step", "refresh-before-update", "missing-logprobs-as-zero"}
"""These show from the third step on, or where a sampler recorded nothing."""


def test_every_mistake_shows_in_some_scenario(right_runs: list[Ground]) -> None:
    hidden = []
    for candidate in step_loops():
        shows = False
        for forced, steps in right_runs:
            for step, outcome in outcomes(candidate, forced, range(1, len(steps) + 1)):
                moment, bounds = steps[step - 1]
                shows = shows or furthest(outcome.gradient, moment.gradient, bounds.gradient)[0] > VISIBLE
                if shows:
                    break
            if shows:
                break
        if not shows and candidate.defect.violates[0] not in BESIDE_THE_GRADIENT:
            hidden.append(candidate.defect.name)
    assert set(hidden) <= LATER


HELD_OUT = {
    "recorded log-probs ignored": "sampler-logprobs-ignored",
    "teacher without feedback": "teacher-on-student-prompt",
    "anchor to the sampler": "base-of-sampler",
    "last sample only": "last-sample-only",
    "clipping by value": "clip-by-value",
}
"""Trainers of ``variants``, which the catalogue never saw, and what each is."""


@pytest.mark.parametrize("name", HELD_OUT)
def test_a_held_out_trainer_is_named(name: str) -> None:
    found = [one.disagreement.extra for one in findings(observe(DEFECTIVE[name][1], SCENARIOS[0]))]
    evidence = next(extra["evidence"] for extra in found if "evidence" in extra)
    assert HELD_OUT[name] in (evidence["mistake"]["name"], *evidence["alike"])
    assert evidence["explained"] == evidence["wrong"]


@pytest.mark.parametrize("scenario", [*SCENARIOS, BFLOAT16], ids=lambda scenario: scenario.name)
def test_no_ratio_is_near_the_cap(scenario: Scenario) -> None:
    ground = ground_of(scenario)
    moment = Moment(ground, [ground.start])
    for own, recorded in zip(moment.own(), ground.recorded, strict=True):
        distance = ((own - recorded).exp() / moment.training.is_clip).log().abs()
        assert float(distance.min()) > 0.05


def test_batches_are_the_same_every_time() -> None:
    first = samples_of(SCENARIOS[0])
    samples_of.cache_clear()
    assert samples_of(SCENARIOS[0]) == first
