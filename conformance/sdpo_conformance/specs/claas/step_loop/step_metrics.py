"""Each step's metrics against the truth at the weights before it.

Or against the numbers of the mistake that the step's gradient shows: reporting a mistake faithfully is not a
second one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sdpo_conformance.judging.compare import number
from sdpo_conformance.specs.claas.step_loop.explanations import words_of
from sdpo_conformance.specs.claas.step_loop.finding import StepFinding, finding
from sdpo_conformance.specs.claas.step_loop.gradients import StepJudgement
from sdpo_conformance.specs.claas.step_loop.metric_mistakes import MetricMistakes
from sdpo_conformance.specs.claas.step_loop.update_mistakes import METRICS_KEPT
from sdpo_conformance.trainer.observation import METRICS, Observation


def shape_findings(observation: Observation, known: MetricMistakes, mistake: str) -> Iterator[StepFinding]:
    """One entry per step, counted from 1, every key there; one optimizer step each."""
    steps, entries = observation.scenario.steps, observation.metrics
    if len(entries) != steps:
        extra = {"mistake": mistake, **({"shows": "update"} if mistake == METRICS_KEPT else {})}
        yield finding(observation, "STEP-6", "per_step_metrics", f"{steps} entries", f"{len(entries)}", extra=extra)
    if observation.observed and len(observation.steps) != steps:
        taken, extra = f"{len(observation.steps)}", {"mistake": mistake, "shows": "update"}
        yield finding(observation, "STEP-10", "optimizer steps", f"{steps}", taken, extra=extra)
    for index, entry in enumerate(entries[-steps:], start=1):
        if missing := [key for key in ("step", *METRICS) if key not in entry]:
            expected, got = f"the keys step, {', '.join(METRICS)}", f"no {', '.join(missing)}"
            yield finding(observation, "STEP-6", "per_step_metrics", expected, got, index)
        elif entry["step"] != index:
            named = known.of("step")
            yield finding(
                observation,
                "STEP-6",
                "step",
                expected=f"{index}",
                got=number(entry["step"]),
                step=index,
                detail=f"it is that of {named.words}" if named else "",
                extra={"metrics": known.as_kept()},
            )


def metric_findings(
    observation: Observation, judgements: Sequence[StepJudgement], known: MetricMistakes
) -> Iterator[StepFinding]:
    """Each step's metrics; those of a step whose gradient is wrong and unexplained are passed over, for there
    is nothing to hold them against, and so are more entries than steps, which belong to none. ``known``: what the wrong
    metrics of all runs are."""
    if len(observation.metrics) > observation.scenario.steps:
        return
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
                extra={"metrics": known.as_kept()},
            )
            continue
        if judgement.wrong and judgement.mistake is None:
            continue
        for key in METRICS:
            if key in entry and not accepted(entry[key], key, judgement):
                truth, bound = judgement.moment.truth.metrics[key], judgement.bounds.metrics[key]
                named = known.of(key)
                loop = known.loop_of(key)
                words = words_of(loop) if loop else named.words if named else ""
                yield finding(
                    observation,
                    loop.defect.violates if loop else "STEP-6",
                    key,
                    expected=number(truth),
                    got=number(entry[key]),
                    step=step,
                    detail=f"it is that of {words}" if words else "",
                    excess=abs(entry[key] - truth) / bound,
                    extra={
                        "shows": "metric",
                        "metric": key,
                        "truth": truth,
                        "bound": bound,
                        "mistake": loop.defect.name if loop else None,
                        "metrics": known.as_kept(),
                    },
                )


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
