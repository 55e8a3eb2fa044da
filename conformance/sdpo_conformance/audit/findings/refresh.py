"""Are the behaviour log-probs refreshed after each step?

With the refresh, the ratio of every step but a batch's first is 1 up to rounding (CLaaS distillation.py,
end of the step loop). With is_clip below 1 it is is_clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from sdpo_conformance.audit.errors import shown
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, NotJudged, Severity, Verdicts
from sdpo_conformance.audit.findings.ratio import HALF_ROUNDING, ROUNDING, ratio_cap, ratio_trace
from sdpo_conformance.audit.metrics import RunMetrics, Step

_VISIBLE_MISMATCH = 5e-3
_WITH_DROPOUT = 0.1
#: Among many samples some drift by chance in one batch.
_FEWEST_BATCHES = 3


@dataclass(frozen=True)
class _Later:
    """A step after its batch's first, with how far its mean ratio lies from where a refresh puts it."""

    name: str
    position: int
    ratio: float
    deviation: float
    first_deviation: float


def behaviour_not_refreshed(evidence: Evidence) -> Verdicts:
    """mean_is_ratio away from 1 after a batch's first step."""
    metrics = evidence.metrics
    reason = _why_not_judged(metrics)
    if metrics is None or reason:
        yield NotJudged("behaviour-not-refreshed", reason)
        return
    target = min(1.0, ratio_cap(evidence) or math.inf)
    later = _later_steps(metrics, target)
    dropout = evidence.change.after.dropout if evidence.change else 0.0
    if not dropout:
        yield from _samples_not_refreshed(metrics, target, later)
    if not later:
        yield NotJudged("behaviour-not-refreshed", "mean_is_ratio is not reported as a number after the first step")
        return
    limit = _WITH_DROPOUT if dropout else HALF_ROUNDING
    worst = max(later, key=lambda step: abs(step.deviation))
    clipped = _clipped_after_refresh(metrics, ratio_cap(evidence))
    drifting = _drifts(later) or (not dropout and (_leaves_exact_start(later) or _keeps_mismatch(later)))
    if abs(worst.deviation) > limit or clipped:
        severity = Severity.ERROR
    elif drifting:
        severity = Severity.WARNING
    elif abs(worst.deviation) > ROUNDING:
        yield Finding(
            id="behaviour-not-refreshed",
            severity=Severity.NOTE,
            statement=(
                f"after the first step the ratio is off {target:g} by up to {abs(worst.deviation):.2g}, without a trend"
            ),
            evidence=(ratio_trace(metrics),),
            cause=("half-precision log-probs, or dropout in the forward, explain this much; a stale policy could too"),
            next_step="recompute the log-probs in float32 to tell the two apart",
            data={"worst": worst.deviation},
        )
        return
    else:
        return
    first = later[0].first_deviation
    mismatched = abs(first) > _VISIBLE_MISMATCH
    ambiguous = metrics.batching == "assumed" and mismatched and not _drifts(later) and not clipped
    told = [ratio_trace(metrics)]
    if abs(worst.deviation) > ROUNDING:
        told.append(f"{worst.name}: {worst.ratio:.6g}, where a refreshed run has {target:g} up to rounding")
    told.extend(clipped[:3])
    yield Finding(
        id="behaviour-not-refreshed",
        severity=Severity.WARNING if ambiguous else severity,
        statement=(
            "the importance ratio drifts from step to step: the behaviour log-probs are not refreshed"
            if not mismatched
            else (
                "the importance ratio does not come back to 1 after the first step: the behaviour log-probs"
                " are not refreshed"
            )
        ),
        evidence=tuple(told),
        cause=(
            "old_student_logprobs stays at the policy that sampled the response, so steps 2 and later are"
            " off-policy" + ("; or each of these rows is the first step of a batch of its own" if ambiguous else "")
        ),
        next_step=(
            "recompute each sample's behaviour log-probs under the updated adapter, without gradient, after"
            " every step but the last, or train with steps_per_batch = 1"
            + ("; if every row is a batch, say steps_per_batch = 1 in training.json" if ambiguous else "")
        ),
        data={"worst": worst.deviation, "target": target, "ratios": [step.ratio for step in later[:1000]]},
    )


def _samples_not_refreshed(metrics: RunMetrics, target: float, later: Sequence[_Later]) -> Verdicts:
    """Single samples whose ratio drifts in most of several batches though the mean's does not, where they cancel."""
    if _drifts(later) or any(abs(step.deviation) > HALF_ROUNDING for step in later):
        return
    names = sorted({name for step in metrics.steps for name in step.samples})
    drifting = []
    for name in names:
        own = _later_steps(metrics, target, name)
        batches = sum(step.position == 1 for step in own)
        worst = max((abs(step.deviation) for step in own), default=0.0)
        if batches >= _FEWEST_BATCHES and worst > HALF_ROUNDING and _drifts(own):
            drifting.append((name, worst))
    if drifting:
        told = ", ".join(f"sample {shown(name)} by up to {worst:.3g}" for name, worst in drifting[:5])
        yield Finding(
            id="behaviour-not-refreshed",
            severity=Severity.ERROR,
            statement=f"the importance ratio of {len(drifting)} of {len(names)} samples drifts from step to step",
            evidence=(told, "in the mean over the samples these cancel"),
            cause="only some of the samples get new behaviour log-probs after a step",
            next_step="recompute every sample's behaviour log-probs after every step but the last",
            data={"samples": [name for name, _ in drifting]},
        )


def _why_not_judged(metrics: RunMetrics | None) -> str:
    if metrics is None:
        return "no metrics"
    if all(len(batch.steps) < 2 for batch in metrics.batches):
        return "one step per batch: there is nothing to refresh"
    if not metrics.has("mean_is_ratio"):
        return _other_ratio(metrics)
    if metrics.averaged_over > 1:
        return f"rows average over batches: each stands for {metrics.averaged_over} steps (logging_steps)"
    if metrics.batching == "unknown":
        return (
            f"a {metrics.kind} does not say where a batch ends; put steps_per_batch into training.json, "
            "or name a file that has it with --config"
        )
    return ""


def _other_ratio(metrics: RunMetrics) -> str:
    """What is there in place of mean_is_ratio."""
    if not metrics.ratio_names:
        return "no importance ratio is reported under any name that is known"
    names = ", ".join(shown(name) for name in metrics.ratio_names[:3])
    who = "the log" if metrics.tool in ("wandb", "another tool") else metrics.tool
    return f"{who} reports its ratio as {names}: of batches sampled anew, which shows nothing of a refresh"


def _later_steps(metrics: RunMetrics, target: float, sample: str | None = None) -> list[_Later]:
    """Of the mean over the samples, or of one of them."""
    later = []
    for b, batch in enumerate(metrics.batches):
        first = _deviation(batch.steps[0], target, sample) if batch.steps else math.nan
        for position, step in enumerate(batch.steps[1:], start=1):
            deviation = _deviation(step, target, sample)
            if math.isfinite(deviation):
                ratio = target + deviation if sample else step.values["mean_is_ratio"]
                later.append(_Later(metrics.label(b, step), position, ratio, deviation, first))
    return later


def _deviation(step: Step, target: float, sample: str | None) -> float:
    """How far the mean ratio lies from where a refresh puts it. A sample of which no token counts has a mean of 0."""
    if sample is not None:
        return step.samples.get(sample, {}).get("mean_is_ratio", math.nan) - target
    ratios = [sample["mean_is_ratio"] for sample in step.samples.values() if "mean_is_ratio" in sample]
    counted = sum(ratio != 0 for ratio in ratios) / len(ratios) if any(ratios) else 1.0
    return step.values.get("mean_is_ratio", math.nan) - target * counted


def _drifts(later: Sequence[_Later]) -> bool:
    """Growing steadily over three or more steps of a batch, as Adam's steps of equal size make it grow.

    Rounding has no such trend; the bounds on the growth keep out what it looks like by chance.
    """
    runs: list[list[_Later]] = []
    for step in later:
        if step.position == 1 or not runs:
            runs.append([])
        runs[-1].append(step)
    judged = [run for run in runs if len(run) >= 3 and max(abs(s.deviation) for s in run) > ROUNDING]
    return bool(judged) and sum(map(_steady, judged)) > len(judged) / 2


def _steady(run: Sequence[_Later]) -> bool:
    sizes = [abs(step.deviation) for step in run]
    one_sided = len({step.deviation > 0 for step in run}) == 1
    growing = all(a < b for a, b in pairwise(sizes))
    start_below = not abs(run[0].first_deviation) > sizes[0] or abs(run[0].first_deviation) > HALF_ROUNDING
    return one_sided and growing and start_below and 1.5 * sizes[0] <= sizes[-1] <= 4 * len(run) * sizes[0]


def _leaves_exact_start(later: Sequence[_Later]) -> bool:
    """On-policy to float32 rounding at the first step, and clearly not after it: rounding cannot be the
    reason.
    """
    return any(
        abs(s.first_deviation) <= ROUNDING and abs(s.deviation) > max(1e-4, 20 * abs(s.first_deviation)) for s in later
    )


def _keeps_mismatch(later: Sequence[_Later]) -> bool:
    """The first step's distance between sampler and trainer is still there at two or more later steps.

    Rounding of that size is no larger, but it would not agree to a tenth from step to step.
    """
    kept = [
        step
        for step in later
        if abs(step.first_deviation) > _VISIBLE_MISMATCH
        and abs(step.deviation - step.first_deviation) <= 0.1 * abs(step.first_deviation)
    ]
    return len(kept) == len(later) >= 2


def _clipped_after_refresh(metrics: RunMetrics, cap: float | None) -> list[str]:
    """Clipped tokens after a batch's first step; on-policy there are none while the cap is above 1."""
    if cap is None or cap <= 1 + ROUNDING:
        return []
    return [
        f"{metrics.label(b, step)}: clip_fraction {clip:.3g}, where a refreshed run has 0 (is_clip {cap:g})"
        for b, batch in enumerate(metrics.batches)
        for step in batch.steps[1:]
        if (clip := step.values.get("clip_fraction", 0.0)) > 0
    ]


CHECKS = (Check("behaviour-not-refreshed", "the ratio drifts after a batch's first step", behaviour_not_refreshed),)
