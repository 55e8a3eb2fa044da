"""The importance ratio: is it applied, reported, and away from its cap?"""

from __future__ import annotations

import math

from sdpo_conformance.audit.errors import shown
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, NotJudged, Severity, Verdicts
from sdpo_conformance.audit.findings.resolution import resolution
from sdpo_conformance.audit.metrics import Batch, RunMetrics, labelled_steps

#: float32 arithmetic on recomputed log-probs stays far below; half-precision log-probs can reach the second.
ROUNDING = 1e-5
HALF_ROUNDING = 0.02
_SATURATED = 0.25
_EXACT = 1e-6
_EXACT_DIGITS = 7


def ratio_dropped(evidence: Evidence) -> Verdicts:
    """mean_is_ratio exactly 1 at every first step although the sampler's log-probs differ from the
    trainer's.
    """
    metrics = evidence.metrics
    if metrics is None or not metrics.has("mean_is_ratio"):
        return
    target = min(1.0, ratio_cap(evidence) or math.inf)
    firsts = [batch.steps[0].values.get("mean_is_ratio") for batch in metrics.batches if batch.steps]
    if any(ratio is None or not abs(ratio - target) <= _EXACT for ratio in firsts):
        return
    if evidence.sampler == "same":
        return
    if metrics.digits is not None and metrics.digits < _EXACT_DIGITS:
        yield NotJudged("ratio-dropped", f"the ratio is printed to {metrics.digits} digits: 1 may be as near as that")
        return
    foreign = metrics.native and evidence.request.recorded and bool(evidence.request.engine)
    if evidence.sampler == "unknown" and not foreign:
        yield NotJudged(
            "ratio-dropped",
            "the ratio is 1 where each batch starts: right where the sampler is the trainer; "
            "with another sampler (vLLM) say --sampler differs",
        )
        return
    yield Finding(
        id="ratio-dropped",
        severity=Severity.ERROR if evidence.sampler == "differs" else Severity.WARNING,
        statement=(
            "mean_is_ratio is exactly 1 although the sampler's log-probs differ from the trainer's"
            if evidence.sampler == "differs"
            else f"mean_is_ratio is exactly 1 although {shown(evidence.request.engine)} recorded the log-probs"
        ),
        evidence=(ratio_trace(metrics),),
        cause=(
            "the importance ratio is not computed from the recorded log-probs: dropped in a fused kernel, or"
            " old_student_logprobs overwritten with the trainer's own before step 1"
        ),
        next_step=(
            "multiply each token's divergence by min(exp(clamp(new - old, -20, 20)), is_clip) with old as the"
            " sampler recorded it"
        ),
        data={"first_step_ratios": [ratio for ratio in firsts if ratio is not None][:1000]},
    )


def ratio_not_reported(evidence: Evidence) -> Verdicts:
    """No mean_is_ratio at all in a run of several steps per batch."""
    metrics = evidence.metrics
    if metrics is None or metrics.has("mean_is_ratio"):
        return
    if not metrics.native or metrics.ratio_names:
        return  # this tool reports its ratio under its own name, or has none to report
    several = any(len(batch.steps) > 1 for batch in metrics.batches)
    if not several and evidence.sampler != "differs":
        return
    sdpo = metrics.has("distill_loss") or metrics.has("kl_reg")
    printed = metrics.digits is not None  # a terminal's line may show less than was recorded
    alarming = sdpo and not printed and (metrics.batching != "unknown" or evidence.sampler == "differs")
    yield Finding(
        id="ratio-not-reported",
        severity=Severity.WARNING if alarming else Severity.NOTE,
        statement="mean_is_ratio is not reported: nothing shows that the importance ratio was applied",
        evidence=(f"fields reported: {', '.join(sorted({n for step in metrics.steps for n in step.values}))}",),
        cause=(
            "a loss that never sees old_student_logprobs (a kernel fed with hidden states alone) has no ratio to report"
        ),
        next_step="report mean_is_ratio and clip_fraction, and run the suite against the loss",
    )


def clip_saturated(evidence: Evidence) -> Verdicts:
    """A large part of the tokens at the ratio's cap, where the cap is above 1."""
    metrics = evidence.metrics
    if metrics is None or not metrics.has("clip_fraction"):
        return
    cap = ratio_cap(evidence)
    if cap is not None and cap <= 1:
        return  # on-policy every token is at a cap of 1 or less
    worst: list[tuple[float, str]] = []
    for b, batch in enumerate(metrics.batches):
        for step in batch.steps:
            clip, ratio = step.values.get("clip_fraction"), step.values.get("mean_is_ratio")
            if clip is None or not clip >= _SATURATED:
                continue
            # An unknown cap may be 1, where rounding alone decides which on-policy tokens count as clipped.
            if cap is None and (ratio is None or not ratio > 1 + HALF_ROUNDING):
                continue
            worst.append((clip, f"{metrics.label(b, step)}: clip_fraction {clip:.3g}" + _at(ratio)))
    if not worst:
        return
    worst.sort(reverse=True)
    yield Finding(
        id="clip-saturated",
        severity=Severity.ERROR if worst[0][0] >= 0.9 else Severity.WARNING,
        statement=f"clip_fraction reaches {worst[0][0]:.3g}: that part of the tokens sits at the ratio's cap",
        evidence=tuple(text for _, text in worst[:5]),
        cause=(
            "the behaviour log-probs do not belong to these tokens (shifted by one, another sample's, another"
            " model's), or they are far out of date"
        ),
        next_step="compare the recorded response_logprobs with the starting policy's own",
        data={"clip_fraction": worst[0][0]},
    )


def ratio_above_cap(evidence: Evidence) -> Verdicts:
    """mean_is_ratio above is_clip, which a mean of capped ratios cannot be."""
    metrics, cap = evidence.metrics, evidence.request.training.is_clip
    if metrics is None or cap is None:
        return
    ratios = [(label, step.values.get("mean_is_ratio", math.nan)) for label, step in labelled_steps(metrics)]
    finest = resolution([ratio for _, ratio in ratios])
    above = [(label, ratio) for label, ratio in ratios if cap * (1 + ROUNDING) + finest < ratio < math.inf]
    if not above:
        return
    yield Finding(
        id="ratio-above-cap",
        severity=Severity.ERROR if metrics.native else Severity.WARNING,
        statement=f"mean_is_ratio lies above is_clip at {len(above)} step(s): a mean of capped ratios cannot",
        evidence=tuple(f"{label}: mean_is_ratio {ratio:.4g}, is_clip {cap:g}" for label, ratio in above[:5]),
        cause="the ratio is not capped, or at another cap than the settings', or the metric is taken before the cap",
        next_step="cap each token's ratio at is_clip, and report the mean of what multiplies the divergence",
        data={"largest": max(ratio for _, ratio in above)},
    )


def ratio_cap(evidence: Evidence) -> float | None:
    """is_clip: from the settings, or from a step whose every token is at the cap."""
    if evidence.request.training.is_clip is not None:
        return float(evidence.request.training.is_clip)
    if evidence.metrics is not None:
        for step in evidence.metrics.steps:
            clip, ratio = step.values.get("clip_fraction"), step.values.get("mean_is_ratio")
            if clip is not None and ratio is not None and abs(clip - 1) < _EXACT and math.isfinite(ratio):
                return ratio + _EXACT if ratio > 1 + ROUNDING else ratio
    return None


def ratio_trace(metrics: RunMetrics) -> str:
    told = []
    for b, batch in enumerate(metrics.batches[:3]):
        ratios = ", ".join(_ratio(batch, i) for i in range(min(len(batch.steps), 12)))
        more = ", …" if len(batch.steps) > 12 else ""
        told.append((f"batch {b + 1}: " if len(metrics.batches) > 1 else "") + f"mean_is_ratio {ratios}{more}")
    return "; ".join(told) + ("; …" if len(metrics.batches) > 3 else "")


def _ratio(batch: Batch, index: int) -> str:
    value = batch.steps[index].values.get("mean_is_ratio")
    return "–" if value is None else f"{value:.6g}"


def _at(ratio: float | None) -> str:
    return "" if ratio is None else f" at mean_is_ratio {ratio:.4g}"


CHECKS = (
    Check("ratio-dropped", "the ratio is exactly 1 though the sampler's log-probs differ", ratio_dropped),
    Check("ratio-not-reported", "no mean_is_ratio in a run of several steps per batch", ratio_not_reported),
    Check("ratio-above-cap", "mean_is_ratio above is_clip", ratio_above_cap),
    Check("clip-saturated", "many tokens sit at the ratio's cap", clip_saturated),
)
