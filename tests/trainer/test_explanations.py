"""The scenarios tell the catalogued step loops from the truth, and the diagnosis names trainers it has never seen."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import DEFECTIVE

from sdpo_conformance.specs.claas.defects import find
from sdpo_conformance.specs.claas.defects import step_loop_variants as right
from sdpo_conformance.specs.claas.oracle.step_loop import AdamW
from sdpo_conformance.specs.claas.step_loop.explanations import furthest, outcomes, step_loops
from sdpo_conformance.specs.claas.step_loop.findings import findings, findings_of, judged_once
from sdpo_conformance.specs.claas.step_loop.forced_replay import RIGHT, Forced, replayed
from sdpo_conformance.specs.claas.step_loop.ground import Moment, Weights, ground_of
from sdpo_conformance.specs.claas.step_loop.step_bounds import Bounds, bounds_of
from sdpo_conformance.specs.claas.step_loop.telling_apart import to_tell_apart
from sdpo_conformance.trainer.observation import Observation, observe
from sdpo_conformance.trainer.scenarios import (
    BFLOAT16,
    SCENARIOS,
    UNRECORDED,
    WIDER,
    Scenario,
    samples_of,
    wider_in_bfloat16,
)

VISIBLE = 3.0
"""How far beyond the bound a mistake has to be somewhere, so that no sound trainer is taken for it."""

Ground = tuple[Forced, list[tuple[Moment, Bounds]]]


@pytest.fixture(scope="module")
def right_runs() -> list[Ground]:
    """Each of the first float32 scenarios, run right, with the truth of its first steps."""
    return [run_right(scenario, 2) for scenario in SCENARIOS]


@pytest.fixture(scope="module")
def all_right_runs(right_runs: list[Ground]) -> list[Ground]:
    """These, and the others with more of their steps."""
    return [*right_runs, run_right(SCENARIOS[0], 4), *(run_right(scenario, 2) for scenario in (UNRECORDED, *WIDER))]


def run_right(scenario: Scenario, most: int) -> Ground:
    """A scenario, run right, with the truth of at most so many steps."""
    ground = ground_of(scenario)
    history: list[Weights] = [ground.start]
    optimizer, steps = AdamW(scenario.training.learning_rate), []
    left_over: Weights | None = None
    for _ in range(min(scenario.steps, most)):
        moment = Moment(ground, list(history), left_over)
        steps.append((moment, bounds_of(moment)))
        left_over = moment.gradient
        history.append(optimizer.updated(history[-1], moment.gradient))
    return Forced(ground, history[:-1], history[-1]), steps


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

IN_KL_REG = {"base-of-first-with-same-prompt", "base-of-last-with-same-prompt"}
"""These show in kl_reg alone."""

IN_HALF = {"sampler-logprobs-in-model-dtype"}
"""These show in metrics of half precision alone."""


def test_every_mistake_shows_in_some_scenario(all_right_runs: list[Ground]) -> None:
    hidden = []
    for candidate in step_loops():
        shows = False
        for forced, steps in all_right_runs:
            for step, outcome in outcomes(candidate, forced, range(1, len(steps) + 1)):
                moment, bounds = steps[step - 1]
                shows = shows or furthest(outcome.gradient, moment.gradient, bounds.gradient)[0] > VISIBLE
                if shows:
                    break
            if shows:
                break
        if not shows and candidate.defect.violates[0] not in BESIDE_THE_GRADIENT:
            hidden.append(candidate.defect.name)
    assert set(hidden) <= IN_KL_REG | IN_HALF


KEPT = 8
"""Batches of runs whose findings are kept."""

NUDGE = 0.3

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


def named(runs: tuple[Observation, ...]) -> tuple[str, list[str]]:
    """What the gradients of these runs are called, and what cannot be told from it."""
    found = [one.disagreement.extra for _, of_run in findings_of(runs) for one in of_run]
    evidence = next(extra["evidence"] for extra in found if "evidence" in extra)
    return evidence["mistake"]["name"], evidence["alike"]


@pytest.mark.parametrize(("name", "scenario", "requirement"), [
    ("refresh-skipped-at-small-gradients", "many_steps", "STEP-2"),
    ("learning-rate-falls-late", "many_steps", "STEP-10"),
    ("learning-rate-rises-early", "many_steps", "STEP-10"),
    ("sampler-logprobs-in-model-dtype", "between_bfloat16", "STEP-1"),
    ("adapter-off-by-scaling", "crowd", "STEP-5"),
])  # fmt: skip
def test_what_one_wider_scenario_shows_is_named(name: str, scenario: str, requirement: str) -> None:
    where = next(one for one in (*WIDER, *wider_in_bfloat16()) if one.name == scenario)
    distill = find(name).distill
    ordinary, wider = ran(distill, SCENARIOS[1]), ran(distill, where)
    (_, none), (_, found) = findings_of((ordinary, wider))
    assert none == ()
    assert found[0].requirements[0] == requirement
    extra = found[0].disagreement.extra
    assert extra["mistake"] == name or name in extra["evidence"]["alike"]


@pytest.mark.parametrize("first", ["longest", "shortest"])
def test_a_refresh_into_rows_of_another_order_is_named(first: str) -> None:
    name = f"refresh-into-rows-{first}-first"
    assert named((ran(find(name).distill, SCENARIOS[0]),)) == (name, [])


def test_training_another_adapter_is_named() -> None:
    def distill(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
        model.set_adapter(next(iter(model.peft_config)))
        return right.distill(right.TrainerParts(), model, samples, training, optimizer_cls)

    far = next(one for one in WIDER if one.name == "far")
    (_, none), (_, found) = findings_of((ran(distill, SCENARIOS[1]), ran(distill, far)))
    assert none == ()
    assert found[0].requirements == ("STEP-9",)
    assert found[0].disagreement.extra["mistake"] == "other-adapter-left-active"


def test_what_looks_alike_is_told_apart_where_it_parts() -> None:
    def all_or_none(run: right.Run, one: right.Prepared) -> Tensor:
        missing = any(other.recorded is None for other in run.batch)
        return right.logprobs(run, one.ids, one.response) if missing else right.first_behaviour(run, one)

    distill = right.trainer(first_behaviour=all_or_none)
    runs = (ran(distill, SCENARIOS[0]), ran(distill, UNRECORDED))
    name, alike = named(runs)
    assert {"recorded-dropped-where-one-is-missing", "samples-with-infinite-logprobs-as-unrecorded"} <= {name, *alike}
    further = to_tell_apart(runs, WIDER)
    assert 0 < len(further) <= 2
    runs += tuple(ran(distill, scenario) for scenario in further)
    assert named(runs) == ("recorded-dropped-where-one-is-missing", [])


def ran(distill: Callable[..., Any] | None, scenario: Scenario) -> Observation:
    """A run that was not refused."""
    assert distill is not None
    found = observe(distill, scenario)
    assert isinstance(found, Observation)
    return found


def refresh_of(fresh: Callable[[list[Tensor]], list[Tensor]]) -> Callable[..., Any]:
    """A trainer whose refresh hands round something else than each sample's own."""

    def refresh(run: right.Run) -> None:
        right.refresh(run)
        for one, log_probs in zip(run.batch, fresh([one.behaviour for one in run.batch]), strict=True):
            length = one.response.shape[1]
            one.behaviour = torch.nn.functional.pad(log_probs[:, :length], (0, max(0, length - log_probs.shape[1])))

    return right.trainer(refresh=refresh)


REFRESHES: Mapping[str, tuple[str, Callable[..., Any]]] = {
    "off by a constant": ("STEP-2", refresh_of(lambda own: [one - 0.37 for one in own])),
    "off by another for each sample": (
        "STEP-2",
        refresh_of(lambda own: [one + 0.1 * (number + 1) for number, one in enumerate(own)]),
    ),
    "samples in reverse order": ("STEP-4", refresh_of(lambda own: own[::-1])),
    "tokens in reverse order": ("STEP-4", refresh_of(lambda own: [one.flip(1) for one in own])),
}
"""How a refresh is broken, and the rule that leads: never one about means over samples, or about clipping, although
some gradients are wrong in their length alone."""


@pytest.mark.parametrize("name", REFRESHES)
def test_a_broken_refresh_leads_with_its_rule(name: str) -> None:
    rule, distill = REFRESHES[name]
    runs = tuple(observe(distill, scenario) for scenario in (*SCENARIOS, BFLOAT16))
    found = [one for _, of_run in findings_of(runs) for one in of_run if one.disagreement.extra["shows"] == "gradient"]
    assert {one.requirements[0] for one in found} == {rule}


def test_a_loss_of_another_size_leads_with_the_mean_over_samples() -> None:
    """At later steps alone, which no catalogued loop does: the ratio that it reports is right."""

    def reduce(run: right.Run) -> Tensor:
        return right.reduce(run) / (1 if run.step == 1 else 1 + 2**-run.step)

    runs = tuple(observe(right.trainer(reduce=reduce), scenario) for scenario in SCENARIOS)
    found = [one for _, of_run in findings_of(runs) for one in of_run if one.disagreement.extra["shows"] == "gradient"]
    assert {one.requirements[0] for one in found} == {"STEP-7"}


def test_what_breaks_another_rule_than_the_first_that_fits_is_tried_after_it() -> None:
    """A gradient of 0 is that of every loop that leaves the one sample out, or the anchor; others show elsewhere."""
    anchor_alone = next(one for one in WIDER if one.name == "anchor_alone")
    distill = find("alpha-zero-skips-the-anchor").distill
    runs = tuple(ran(distill, scenario) for scenario in (SCENARIOS[0], SCENARIOS[3], anchor_alone))
    assert named(runs) == ("alpha-zero-skips-the-anchor", [])


def test_reporting_a_named_mistake_faithfully_is_no_second_one() -> None:
    """Where clipping hides the size of a loss, what is reported still shows it."""
    distill = right.trainer(reduce=lambda run: right.reduce(run) / 3)
    runs = tuple(observe(distill, scenario) for scenario in (*SCENARIOS, BFLOAT16))
    found = [one for _, of_run in findings_of(runs) for one in of_run]
    assert {one.requirements[0] for one in found} == {"STEP-7"}


def test_a_tie_in_half_precision_is_no_second_mistake() -> None:
    """Of two wrong steps in half precision one is off by more than rounding from what explains all others."""

    def refresh(run: right.Run) -> None:
        if any(parameter.dtype == torch.bfloat16 for parameter in run.model.parameters()):
            run.batch[0].behaviour = run.batch[0].behaviour + NUDGE

    runs = tuple(observe(right.trainer(refresh=refresh), scenario) for scenario in (*SCENARIOS, BFLOAT16))
    found = [one.disagreement.extra for _, of_run in findings_of(runs) for one in of_run]
    evidence = next(extra["evidence"] for extra in found if "evidence" in extra)
    assert evidence["mistake"]["name"] == "no-refresh"
    assert evidence["explained"] + evidence["nearly"] == evidence["wrong"]
    assert evidence["nearly"] == 1


def test_the_findings_keep_the_latest_runs_and_no_more() -> None:
    """A run holds every step's weights and gradient: what was judged long ago is let go."""
    latest = judged_once.cache_info().maxsize
    assert latest is not None
    first = observe(right.trainer(), SCENARIOS[3])
    gone = weakref.ref(first)
    findings_of((first,))
    assert findings_of.cache_info().maxsize == KEPT
    del first
    for _ in range(max(KEPT, latest)):
        findings_of((observe(right.trainer(), SCENARIOS[3]),))
    gc.collect()
    assert gone() is None


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
