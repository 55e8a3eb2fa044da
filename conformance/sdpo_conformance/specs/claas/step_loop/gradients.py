"""Each step's gradient against the truth at the trainer's own weights, and what it equals instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from sdpo_conformance.judging.compare import number
from sdpo_conformance.specs.claas.oracle.step_loop import norm
from sdpo_conformance.specs.claas.step_loop.explanations import MISTAKES, Mistake, Outcome
from sdpo_conformance.specs.claas.step_loop.finding import Finding, finding
from sdpo_conformance.specs.claas.step_loop.ground import Ground, Moment, Weights, upcast
from sdpo_conformance.specs.claas.step_loop.step_bounds import Bounds, bounds_of
from sdpo_conformance.trainer.observation import Observation


@dataclass
class StepJudgement:
    """A step: how far its gradient is beyond the bound (above 1 is wrong), in which tensor, and the mistake
    it equals, if any."""

    moment: Moment
    bounds: Bounds
    excess: float
    tensor: str
    mistake: Mistake | None = None
    outcome: Outcome | None = None

    @property
    def wrong(self) -> bool:
        return self.excess > 1


def judged_steps(observation: Observation, ground: Ground) -> Iterator[StepJudgement]:
    """Each observed step against the truth at its own weights."""
    history: list[Weights] = []
    left_over: Weights | None = None
    suspected: Mistake | None = None
    for step in observation.steps[: observation.scenario.steps]:
        # a parameter the optimizer never got stays where it started
        history.append({**upcast(observation.start), **(history[-1] if history else {}), **upcast(step.before)})
        moment = Moment(ground, list(history), left_over)
        bounds = bounds_of(moment)
        got = moment.handed = complete(upcast(step.gradient), moment)
        excess, tensor = furthest(got, moment.gradient, bounds.gradient)
        judgement = StepJudgement(moment, bounds, excess, tensor)
        if judgement.wrong:
            judgement.mistake, judgement.outcome = explanation(moment, got, bounds, suspected)
            suspected = judgement.mistake
        yield judgement
        left_over = got


def complete(gradient: Weights, moment: Moment) -> dict[str, Tensor]:
    """The gradient with zeros where there was none."""
    return {name: gradient.get(name, 0 * g) for name, g in moment.gradient.items()}


def furthest(got: Weights, truth: Weights, bound: Mapping[str, float]) -> tuple[float, str]:
    """The largest ratio of distance to bound over all tensors, and where; NaN counts as infinite."""
    excess = {}
    for name in truth:
        distance = float((got[name] - truth[name]).norm())
        excess[name] = distance / bound[name] if distance == distance else float("inf")
    worst = max(excess, key=lambda name: excess[name])
    return excess[worst], worst


def explanation(
    moment: Moment, got: Weights, bounds: Bounds, suspected: Mistake | None
) -> tuple[Mistake | None, Outcome | None]:
    """The known mistake whose gradient this one equals within the bound; the ``suspected`` one if it fits, or
    else the closest."""
    best: tuple[float, Mistake | None, Outcome | None] = (1.0, None, None)
    for mistake in sorted(MISTAKES, key=lambda one: one is not suspected):
        outcome = mistake.take(moment)
        if outcome is None:
            continue
        scale = max(1.0, float(norm(outcome[1]) / norm(moment.gradient)))
        excess, _ = furthest(got, outcome[1], {name: scale * b for name, b in bounds.gradient.items()})
        if excess < best[0]:
            best = (excess, mistake, outcome)
            if mistake is suspected:
                break
    return best[1], best[2]


def requirements_of(mistake: Mistake | None, step: int) -> tuple[str, ...]:
    """What a mistake at this step breaks. At the first step every wrong behaviour log-prob is STEP-1's."""
    if mistake is None:
        return ("STEP-1",) if step == 1 else ("STEP-2",)
    if step == 1 and set(mistake.requirements) & {"STEP-2", "STEP-3"}:
        return ("STEP-1",)
    return mistake.requirements


def gradient_finding(judgement: StepJudgement, observation: Observation) -> Finding:
    """Words for a wrong gradient."""
    moment, mistake = judgement.moment, judgement.mistake
    step = moment.step
    got = complete(upcast(observation.steps[step - 1].gradient), moment)
    truth = moment.gradient
    off = float(norm({name: got[name] - truth[name] for name in truth}) / norm(truth))
    if mistake is not None:
        detail = f"the gradient is the one {mistake.words}"
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
            "mistake": mistake.name if mistake else None,
            "gradient": dict(truth),
            "bounds": dict(judgement.bounds.gradient),
        },
    )
