"""Each step's gradient against the truth at the trainer's own weights, and what it equals instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from sdpo_conformance.judging.compare import number
from sdpo_conformance.specs.claas.oracle.step_loop import norm
from sdpo_conformance.specs.claas.step_loop.explanations import (
    StepExplanation,
    TakenRun,
    TakenStep,
    as_reported,
    explain,
    furthest,
    requirements_of,
    words_of,
)
from sdpo_conformance.specs.claas.step_loop.finding import StepFinding, finding
from sdpo_conformance.specs.claas.step_loop.forced_replay import Forced, ReplayOutcome, RightSteps
from sdpo_conformance.specs.claas.step_loop.ground import Ground, Moment, Weights, upcast
from sdpo_conformance.specs.claas.step_loop.step_bounds import Bounds, bounds_of
from sdpo_conformance.trainer.observation import Observation

SLIGHT = 0.01
"""Of its norm: a gradient that is nowhere further off than this may have been rounded to half precision."""

SEVERAL = 6
"""Steps, all of them off, from which on that is said."""


@dataclass
class StepJudgement:
    """A step: how far its gradient is beyond the bound (above 1 is wrong), in which tensor, and the mistake
    it equals, if any, with what cannot be told from it. ``outcome``: that mistake's, also where it leaves the gradient
    as it should be. ``near``: in half precision, what explains the other steps and nearly this one."""

    moment: Moment
    bounds: Bounds
    excess: float
    tensor: str
    got: Weights
    mistake: StepExplanation | None = None
    outcome: ReplayOutcome | None = None
    near: StepExplanation | None = None
    alike: list[StepExplanation] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        return self.excess > 1

    @property
    def off(self) -> float:
        """How far the gradient is from the truth, as a share of the truth's norm."""
        truth = self.moment.gradient
        return float(norm({name: self.got[name] - g for name, g in truth.items()}) / norm(truth))

    @property
    def times(self) -> float | None:
        """How many times the right length the gradient has, None where its direction is another."""
        truth = self.moment.gradient
        along = sum(float((self.got[name] * g).sum()) for name, g in truth.items())
        times = along / max(float(norm(truth)) ** 2, 1e-300)
        rest = {name: times * g for name, g in truth.items()}
        bound = {name: max(1.0, abs(times)) * b for name, b in self.bounds.gradient.items()}
        return times if times and furthest(self.got, rest, bound)[0] <= 1 else None


@dataclass
class JudgedRun:
    """A run with its steps judged."""

    observation: Observation
    ground: Ground
    steps: list[StepJudgement]

    @property
    def wrong(self) -> list[StepJudgement]:
        return [one for one in self.steps if one.wrong]

    def forced(self) -> Forced:
        """The run's weights, for step loops to be replayed along; it keeps graphs and is not kept itself."""
        observation = self.observation
        history = self.steps[-1].moment.history
        return Forced(self.ground, history, {**history[-1], **upcast(observation.steps[len(history) - 1].after)})

    @cached_property
    def right(self) -> RightSteps:
        """The right loop along the run."""
        return RightSteps(self.forced())


def judged_run(observation: Observation, ground: Ground) -> JudgedRun:
    """Each observed step against the truth at its own weights."""
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
    return JudgedRun(observation, ground, judged)


def explain_runs(runs: Sequence[JudgedRun]) -> None:
    """Give the wrong steps of a trainer's runs the mistake that their gradients equal, where one explains enough."""
    # with more or fewer updates than steps, an update is no step that a loop could be replayed to
    judged = [run for run in runs if len(run.observation.steps) == run.observation.scenario.steps]
    if not any(run.wrong for run in judged):
        return
    taken = []
    for run in judged:
        reported = dict(enumerate(run.observation.metrics, start=1))
        steps = {
            one.moment.step: TakenStep(one.moment, one.bounds, one.got, reported.get(one.moment.step, {}))
            for one in run.steps
        }
        taken.append(TakenRun(run.forced(), steps, [one.moment.step for one in run.wrong]))
    found = explain(taken)
    for index, run in enumerate(judged):
        for one in run.steps:
            one.outcome = found.outcomes.get((index, one.moment.step))
            if one.wrong and one.outcome is not None:
                one.mistake, one.alike = found.best, list(found.alike)
            one.near = found.best if (index, one.moment.step) in found.nearly else None


def complete(gradient: Weights, moment: Moment) -> dict[str, Tensor]:
    """The gradient with zeros where there was none."""
    return {name: gradient.get(name, 0 * g) for name, g in moment.gradient.items()}


def slight_everywhere(runs: Sequence[JudgedRun]) -> bool:
    """Whether in full precision every step of every run is wrong, and none by more than rounding to half."""
    steps = [one for run in runs if run.observation.scenario.model.dtype != "bfloat16" for one in run.steps]
    return len(steps) >= SEVERAL and all(one.wrong and one.off <= SLIGHT for one in steps)


def located(run: JudgedRun, rounded: bool) -> str:
    """Which steps are wrong, and which are right, in words; what is right about the wrong ones; ``rounded``: all are
    slightly wrong."""
    times = [one.times for one in run.wrong]
    lengths = [length for length in times if length is not None]
    words = where_wrong(run)
    if rounded and run.wrong:
        worst = max(one.off for one in run.wrong)
        return f"{words}: by at most {100 * worst:.2g} % of its norm, the size of half precision's rounding"
    if not words or len(lengths) < len(times):
        return words
    least, most = (f"{length:.4g}" for length in (min(lengths), max(lengths)))
    so = f"{least} times" if least == most else f"{least} to {most} times"
    return f"{words}: its direction is right, its length {so} the right one"


def where_wrong(run: JudgedRun) -> str:
    """Which steps are wrong, and which are right."""
    wrong = [one.moment.step for one in run.wrong]
    right = [one.moment.step for one in run.steps if not one.wrong]
    if not wrong:
        return ""
    if not right:
        return "the gradient is wrong at every step" if len(wrong) > 1 else "the gradient is wrong"
    if right == list(range(1, wrong[0])) and wrong == list(range(wrong[0], len(run.steps) + 1)):
        return f"the gradient is right up to step {right[-1]} and wrong from step {wrong[0]} on"
    steps = ", ".join(map(str, wrong))
    return f"the gradient is wrong at step {steps} and right at step {', '.join(map(str, right))}"


def evidence(runs: Sequence[JudgedRun]) -> Mapping[str, Any]:
    """What a failure keeps for the diagnosis: the mistake that the runs' wrong steps show, and how many of them."""
    wrong = [one for run in runs for one in run.wrong]
    explained = [one for one in wrong if one.mistake is not None]
    rounded = slight_everywhere(runs)
    return {
        "mistake": as_reported(explained[0].mistake) if explained and explained[0].mistake else None,
        "alike": list(dict.fromkeys(one.defect.shown for one in explained[0].alike)) if explained else [],
        "explained": len(explained),
        "nearly": sum(one.near is not None for one in wrong),
        "wrong": len(wrong),
        "located": {run.observation.scenario.name: located(run, rounded) for run in runs if run.wrong},
    }


LENGTH = {True: "STEP-8", False: "STEP-7"}
"""By whether the step is clipped: the requirement that a gradient of the right direction and a wrong length breaks."""


def only_lengths(runs: Sequence[JudgedRun]) -> bool:
    """Whether all that is wrong with the gradients is their length, and not for the ratio's sake: then it is how
    samples are reduced or gradients clipped. What begins after the first step has to report the ratio that it should,
    for else it may be the behaviour policy's."""
    unexplained = [(run, one) for run in runs for one in run.wrong if not (one.mistake or one.near)]
    ratios = [ratio_is_right(run, one) for run, one in unexplained]
    begins = any(one.moment.step == 1 for _, one in unexplained)
    lengths = all(one.times is not None for _, one in unexplained)
    return lengths and False not in ratios and (begins or None not in ratios)


def ratio_is_right(run: JudgedRun, judgement: StepJudgement) -> bool | None:
    """Whether a step reports the mean ratio that it should have; None where it reports none."""
    reported = dict(enumerate(run.observation.metrics, start=1)).get(judgement.moment.step, {}).get("mean_is_ratio")
    truth, bound = judgement.moment.truth.metrics["mean_is_ratio"], judgement.bounds.metrics["mean_is_ratio"]
    return None if reported is None else abs(reported - truth) <= bound


def gradient_finding(
    judgement: StepJudgement, observation: Observation, shown: Mapping[str, Any], scaled: bool
) -> StepFinding:
    """Words for a wrong gradient; ``shown``: the evidence of all runs; ``scaled``: what no mistake explains is wrong in
    its length alone."""
    moment, mistake = judgement.moment, judgement.mistake
    cause = mistake or judgement.near
    step = moment.step
    got = judgement.got
    truth = moment.gradient
    if mistake is not None:
        detail = f"the gradient is the one of {words_of(mistake)}"
    elif judgement.near is not None:
        detail = f"in half precision the gradient comes near the one of {words_of(judgement.near)}"
    else:
        detail = f"first seen in {judgement.tensor}; it equals no known mistake"
    return finding(
        observation,
        requirements_of(cause, step) if cause or not scaled else (LENGTH[judgement.moment.clips],),
        "gradient handed to the optimizer",
        expected=f"norm {number(float(norm(truth)))}",
        got=f"norm {number(float(norm(got)))}, {100 * judgement.off:.3g} % of the expected norm away",
        step=step,
        detail=detail,
        excess=judgement.excess,
        extra={
            "shows": "gradient",
            "mistake": mistake.defect.name if mistake else None,
            "evidence": shown,
            "gradient": dict(truth),
            "bounds": dict(judgement.bounds.gradient),
        },
    )
