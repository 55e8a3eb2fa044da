"""Each step's metrics against the truth at the weights before it.

Or against the numbers of the mistake that the step's gradient shows: reporting a mistake faithfully is not a
second one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sdpo_conformance.judging.compare import number
from sdpo_conformance.specs.claas.oracle.step_loop import norm
from sdpo_conformance.specs.claas.step_loop.explanations import StepExplanation, outcomes, step_loops, words_of
from sdpo_conformance.specs.claas.step_loop.finding import StepFinding, finding
from sdpo_conformance.specs.claas.step_loop.forced_replay import Forced
from sdpo_conformance.specs.claas.step_loop.gradients import StepJudgement
from sdpo_conformance.trainer.observation import METRICS, Observation


def shape_findings(observation: Observation) -> Iterator[StepFinding]:
    """One entry per step, counted from 1, every key there; one optimizer step each."""
    steps, entries = observation.scenario.steps, observation.metrics
    if len(entries) != steps:
        yield finding(observation, "STEP-6", "per_step_metrics", f"{steps} entries", f"{len(entries)}")
    if observation.observed and len(observation.steps) != steps:
        taken, extra = f"{len(observation.steps)}", {"shows": "update"}
        yield finding(observation, "STEP-10", "optimizer steps", f"{steps}", taken, extra=extra)
    for index, entry in enumerate(entries, start=1):
        if missing := [key for key in ("step", *METRICS) if key not in entry]:
            expected, got = f"the keys step, {', '.join(METRICS)}", f"no {', '.join(missing)}"
            yield finding(observation, "STEP-6", "per_step_metrics", expected, got, index)
        elif entry["step"] != index:
            yield finding(observation, "STEP-6", "step", f"{index}", number(entry["step"]), index)


def metric_findings(observation: Observation, judgements: Sequence[StepJudgement]) -> Iterator[StepFinding]:
    """Each step's metrics; those of a step whose gradient is wrong and unexplained are passed over, for there
    is nothing to hold them against."""
    for index, (entry, judgement) in enumerate(zip(observation.metrics, judgements, strict=False)):
        step = index + 1
        if index and repeated(observation, index):
            yield finding(
                observation,
                "STEP-6",
                "per_step_metrics",
                expected="metrics of the step's own forward",
                got=f"bit for bit those of step {index}",
                step=step,
                detail="the weights changed in between: the optimizer steps, the metrics are stale",
            )
            continue
        if judgement.wrong and judgement.mistake is None:
            continue
        for key in METRICS:
            if key in entry and not accepted(entry[key], key, judgement):
                truth, bound = judgement.moment.truth.metrics[key], judgement.bounds.metrics[key]
                anchor = other_anchor(entry[key], judgement) if key == "kl_reg" else None
                yield finding(
                    observation,
                    anchor.defect.violates if anchor else "STEP-6",
                    key,
                    expected=number(truth),
                    got=number(entry[key]),
                    step=step,
                    detail=f"it is that of {words_of(anchor)}"
                    if anchor
                    else metric_words(key, entry[key], judgements, index),
                    excess=abs(entry[key] - truth) / bound,
                    extra={
                        "shows": "metric",
                        "metric": key,
                        "truth": truth,
                        "bound": bound,
                        "mistake": anchor.defect.name if anchor else None,
                    },
                )


def other_anchor(got: float, judgement: StepJudgement) -> StepExplanation | None:
    """The wrong anchor whose kl_reg this is: with kl_reg_weight = 0 no gradient shows it."""
    moment = judgement.moment
    forced = Forced(moment.ground, moment.history, moment.history[-1])
    for candidate in step_loops():
        if not candidate.defect.name.startswith("base-"):
            continue
        for _, outcome in outcomes(candidate, forced, [moment.step]):
            mistaken = outcome.metrics["kl_reg"]
            scale = max(1.0, mistaken / max(moment.truth.metrics["kl_reg"], 1e-12))
            if abs(got - mistaken) <= scale * judgement.bounds.metrics["kl_reg"]:
                return candidate
    return None


def accepted(got: float, key: str, judgement: StepJudgement) -> bool:
    """Whether a metric is the truth's, or that of the mistake the gradient shows."""
    truth, bound = judgement.moment.truth.metrics[key], judgement.bounds.metrics[key]
    if abs(got - truth) <= bound:
        return True
    if judgement.outcome is None:
        return False
    mistaken = judgement.outcome.metrics[key]
    return abs(got - mistaken) <= bound * max(1.0, abs(mistaken) / max(abs(truth), 1e-12))


def repeated(observation: Observation, index: int) -> bool:
    """Whether the losses are bit for bit those of the step before although the weights moved."""
    before, entry = observation.metrics[index - 1], observation.metrics[index]
    keys = ("total_loss", "distill_loss", "kl_reg", "grad_norm")
    weights = (observation.steps[index - 1].before, observation.steps[index].before)
    moved = any(not w.equal(weights[1][name]) for name, w in weights[0].items() if name in weights[1])
    return moved and all(key in entry and entry.get(key) == before.get(key) for key in keys)


def metric_words(key: str, got: float, judgements: Sequence[StepJudgement], index: int) -> str:
    """What a wrong metric equals instead."""
    judgement = judgements[index]
    bound = judgement.bounds.metrics[key]
    truth = judgement.moment.truth
    candidates: list[tuple[str, float]] = []
    if index:
        candidates.append((f"it is that of step {index}", judgements[index - 1].moment.truth.metrics[key]))
    if index + 1 < len(judgements):
        candidates.append(("it is taken after the update", judgements[index + 1].moment.truth.metrics[key]))
    if key == "grad_norm":
        candidates.append(("it is the norm after clipping", float(norm(judgement.moment.gradient))))
    elif key == "total_loss":
        candidates.append(("it leaves out the anchor", truth.metrics["distill_loss"]))
        candidates.append(("it is the sum over samples", truth.metrics[key] * len(truth.losses)))
    else:
        weighted = truth.metrics[key] * judgement.moment.training.kl_reg_weight
        candidates.append(("it is already multiplied by kl_reg_weight", weighted))
        last = float(getattr(truth.losses[-1], key))
        candidates.append(("it is that of the last sample, not the mean over samples", last))
        candidates.append(("it is the sum over samples", truth.metrics[key] * len(truth.losses)))
    return next((words for words, value in candidates if abs(got - value) <= bound), "")
