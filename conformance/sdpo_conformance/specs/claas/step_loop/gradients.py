"""Each step's gradient against the truth at the trainer's own weights, and what it equals instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sdpo_conformance.judging.compare import number
from sdpo_conformance.specs.claas.oracle.step_loop import norm
from sdpo_conformance.specs.claas.step_loop.explanations import (
    StepExplanation,
    TakenStep,
    as_reported,
    explain,
    furthest,
    requirements_of,
    words_of,
)
from sdpo_conformance.specs.claas.step_loop.finding import StepFinding, finding
from sdpo_conformance.specs.claas.step_loop.forced_replay import Forced, ReplayOutcome
from sdpo_conformance.specs.claas.step_loop.ground import Ground, Moment, Weights, upcast
from sdpo_conformance.specs.claas.step_loop.step_bounds import Bounds, bounds_of
from sdpo_conformance.trainer.observation import Observation


@dataclass
class StepJudgement:
    """A step: how far its gradient is beyond the bound (above 1 is wrong), in which tensor, and the mistake
    it equals, if any, with what cannot be told from it."""

    moment: Moment
    bounds: Bounds
    excess: float
    tensor: str
    got: Weights
    mistake: StepExplanation | None = None
    outcome: ReplayOutcome | None = None
    alike: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        return self.excess > 1


_SEARCHED: list[str] = []
"""Scenarios of this process for which more than the step loops was tried."""


def judged_steps(observation: Observation, ground: Ground) -> list[StepJudgement]:
    """Each observed step against the truth at its own weights, and what the wrong ones equal."""
    history: list[Weights] = []
    left_over: Weights | None = None
    judged: list[StepJudgement] = []
    for step in observation.steps[: observation.scenario.steps]:
        # a parameter the optimizer never got stays where it started
        history.append({**upcast(observation.start), **(history[-1] if history else {}), **upcast(step.before)})
        moment = Moment(ground, list(history), left_over)
        bounds = bounds_of(moment)
        got = complete(upcast(step.gradient), moment)
        excess, tensor = furthest(got, moment.gradient, bounds.gradient)
        judged.append(StepJudgement(moment, bounds, excess, tensor, got))
        left_over = got
    wrong = [one.moment.step for one in judged if one.wrong]
    # with more or fewer updates than steps, an update is no step that a loop could be replayed to
    if not wrong or len(observation.steps) != observation.scenario.steps:
        return judged

    def searched() -> int:
        _SEARCHED.append(observation.scenario.name)
        return len(_SEARCHED)

    reported = dict(enumerate(observation.metrics, start=1))
    taken = {
        one.moment.step: TakenStep(one.moment, one.bounds, one.got, reported.get(one.moment.step, {})) for one in judged
    }
    found = explain(forced_along(observation, ground, history), taken, wrong, searched)
    for one in judged:
        if one.moment.step in found.best:
            one.mistake, one.outcome = found.best[one.moment.step]
            one.alike = found.alike[one.moment.step]
    return judged


def forced_along(observation: Observation, ground: Ground, history: Sequence[Weights]) -> Forced:
    """The run's weights, for step loops to be replayed along."""
    last = observation.steps[len(history) - 1]
    return Forced(ground, history, {**history[-1], **upcast(last.after)})


def complete(gradient: Weights, moment: Moment) -> dict[str, Tensor]:
    """The gradient with zeros where there was none."""
    return {name: gradient.get(name, 0 * g) for name, g in moment.gradient.items()}


def located(judgements: Sequence[StepJudgement]) -> str:
    """Which steps are wrong, and which are right, in words."""
    wrong = [one.moment.step for one in judgements if one.wrong]
    right = [one.moment.step for one in judgements if not one.wrong]
    if not wrong:
        return ""
    if len(wrong) == len(judgements):
        return "the gradient is wrong at every step" if len(wrong) > 1 else "the gradient is wrong"
    if right == list(range(1, wrong[0])) and wrong == list(range(wrong[0], len(judgements) + 1)):
        return f"the gradient is right up to step {right[-1]} and wrong from step {wrong[0]} on"
    steps = ", ".join(map(str, wrong))
    return f"the gradient is wrong at step {steps} and right at step {', '.join(map(str, right))}"


def evidence(judgement: StepJudgement, judgements: Sequence[StepJudgement]) -> Mapping[str, Any]:
    """What a failure keeps for the diagnosis: the mistake that explains most of the run's wrong steps, and how many."""
    wrong = [one for one in judgements if one.wrong]

    def explained(mistake: StepExplanation | None) -> int:
        return sum(one.mistake is not None and one.mistake is mistake for one in wrong)

    best = max(wrong, key=lambda one: explained(one.mistake))
    return {
        "mistake": None if best.mistake is None else as_reported(best.mistake),
        "alike": best.alike,
        "explained": explained(best.mistake),
        "wrong": len(wrong),
        "off": judgement.excess,
        "located": located(judgements),
    }


def gradient_finding(
    judgement: StepJudgement, observation: Observation, judgements: Sequence[StepJudgement]
) -> StepFinding:
    """Words for a wrong gradient."""
    moment, mistake = judgement.moment, judgement.mistake
    step = moment.step
    got = judgement.got
    truth = moment.gradient
    off = float(norm({name: got[name] - truth[name] for name in truth}) / norm(truth))
    if mistake is not None:
        detail = f"the gradient is the one of {words_of(mistake)}"
    else:
        detail = f"first seen in {judgement.tensor}; it equals no known mistake"
    return finding(
        observation,
        requirements_of(mistake, step),
        "gradient handed to the optimizer",
        expected=f"norm {number(float(norm(truth)))}",
        got=f"norm {number(float(norm(got)))}, {100 * off:.3g} % of the expected norm away",
        step=step,
        detail=detail,
        excess=judgement.excess,
        extra={
            "shows": "gradient",
            "mistake": mistake.defect.name if mistake else None,
            "evidence": evidence(judgement, judgements),
            "gradient": dict(truth),
            "bounds": dict(judgement.bounds.gradient),
        },
    )
