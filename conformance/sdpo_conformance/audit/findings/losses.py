"""The losses themselves: what their numbers cannot be in a run of this algorithm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from sdpo_conformance.audit.findings.liveness import dead_rows
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, NotJudged, Severity, Verdicts
from sdpo_conformance.audit.metrics import FIELDS, RunMetrics, Step, labelled_steps

_RELATIVE = 1e-5
#: A bfloat16 exp near 1 is off by up to 2^-9 per token; a mean over tokens by less than this.
_HALF_KL_ROUNDING = 1e-3
_LARGE_KL = 1.0
_SHOWN = 5
_FEW_OVERFLOWS = 2
_HUGE_NORM = 1e4
#: What a loss scaler lets overflow without harm.
_OVERFLOWING = {"grad_norm", "learning_rate"}


def metrics_nonfinite(evidence: Evidence) -> Verdicts:
    """NaN or infinity in the metrics, however the file spells it (null counts)."""
    if evidence.metrics is None:
        return
    rows = list(labelled_steps(evidence.metrics))
    if dead := dead_rows(evidence.metrics):  # dead-run speaks of those, and of the NaN that they come from
        rows = rows[: len(rows) - dead]
        while rows and not math.isfinite(rows[-1][1].values.get("grad_norm", 0.0)):
            rows = rows[:-1]
    broken = [
        (name, f"{label}: {name} is {step.values[name]}")
        for label, step in rows
        for name in FIELDS
        if name in step.values and not math.isfinite(step.values[name])
    ]
    broken += [
        (name, f"{label}, sample {sample}: {name} is {values[name]}")
        for label, step in rows
        for sample, values in step.samples.items()
        for name in FIELDS
        if name in values and not math.isfinite(values[name]) and math.isfinite(step.values.get(name, 0.0))
    ]
    if not broken:
        return
    names = sorted({name for name, _ in broken}, key=FIELDS.index)
    overflow_only = set(names) <= _OVERFLOWING
    # A loss scaler finds its scale by overflowing: a few skipped steps in a run that goes on are no fault.
    few = len(broken) <= max(_FEW_OVERFLOWS, len(rows) // 20) and math.isfinite(
        rows[-1][1].values.get("grad_norm", math.nan)
    )
    yield Finding(
        id="metrics-nonfinite",
        severity=_severity(evidence.metrics, set(names), rows, few),
        statement=(f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not finite at {len(broken)} place(s)"),
        evidence=tuple(text for _, text in broken[:_SHOWN]),
        cause=(
            "a gradient overflow, which a loss scaler skips"
            if overflow_only
            else (
                "0 log 0 where a probability underflows, a -inf logit inside the support, or a NaN at a masked position"
            )
        ),
        next_step="find the first step concerned and run the suite against the loss",
        data={"fields": names, "count": len(broken)},
    )


def _severity(metrics: RunMetrics, names: set[str], rows: Sequence[tuple[str, Step]], few: bool) -> Severity:
    """A loss that is no number is an error, in another tool's log as far as it did not come back to numbers."""
    if names <= _OVERFLOWING:
        return Severity.NOTE if few else Severity.WARNING
    if metrics.native:
        return Severity.ERROR
    came_back = bool(rows) and math.isfinite(rows[-1][1].values.get("total_loss", math.nan))
    return Severity.WARNING if came_back or "total_loss" not in names else Severity.ERROR


def metrics_incomplete(evidence: Evidence) -> Verdicts:
    """Faults of the record: lists of different length, missing fields, totals that contradict the steps."""
    metrics = evidence.metrics
    if metrics is None:
        return
    problems = list(dict.fromkeys(metrics.problems))
    declared = evidence.request.training.steps_per_batch
    if declared is not None and metrics.batching != "unknown" and metrics.native:
        odd = [len(batch.steps) for batch in metrics.batches if len(batch.steps) not in (1, declared)]
        if odd:
            problems.append(f"the settings say {declared} steps per batch and the metrics have {odd[0]}")
    if problems:
        yield Finding(
            id="metrics-incomplete",
            severity=Severity.WARNING,
            statement="the metrics contradict themselves or have gaps",
            evidence=tuple(problems[:_SHOWN]),
            cause=("a run that was cut short, files of different runs, or metrics collected in more than one place"),
            next_step="take the metrics from the trainer's own response, whole",
        )


def kl_negative(evidence: Evidence) -> Verdicts:
    """kl_reg below 0, which the k3 estimator cannot be."""
    metrics = evidence.metrics
    if metrics is None:
        return
    negative = [
        (value, label)
        for label, step in labelled_steps(metrics)
        if math.isfinite(value := step.values.get("kl_reg", 0.0)) and value < -1e-6
    ]
    if not negative:
        return
    negative.sort()
    least = negative[0][0]
    rounding = least >= -_HALF_KL_ROUNDING
    another = not metrics.native  # other tools' kl may be k1, which is negative as often as not
    yield Finding(
        id="kl-negative",
        severity=Severity.NOTE if rounding or another else Severity.ERROR,
        statement=f"kl_reg is negative ({least:.3g} at {negative[0][1]}); k3 = exp(d) - 1 - d never is",
        evidence=tuple(f"{label}: kl_reg {value:.6g}" for value, label in negative[:_SHOWN]),
        cause=(
            "rounding in half precision" if rounding else "another estimator: k1 (-d, or d) is negative as often as not"
        ),
        next_step=("compute k3 in float32" if rounding else "use exp(d) - 1 - d with d = clamp(l[y] - base, -20, 20)"),
        data={"least": least},
    )


def kl_growing(evidence: Evidence) -> Verdicts:
    """kl_reg large and growing, or growing against an anchor that has weight."""
    metrics = evidence.metrics
    if metrics is None:
        return
    series = [(label, step.values["kl_reg"]) for label, step in labelled_steps(metrics) if "kl_reg" in step.values]
    series = [(label, value) for label, value in series if math.isfinite(value)]
    if len(series) < 2:
        return
    values = [value for _, value in series]
    weight = evidence.request.training.kl_reg_weight
    last, start = values[-1], values[0]
    first_positive = next((value for value in values if value > 0), 0.0)
    far = last >= _LARGE_KL and last >= 2 * start
    monotone = len(values) >= 3 and all(a <= b for a, b in pairwise(values))
    unheld = bool(weight) and monotone and last >= 0.5 and last >= 5 * first_positive
    if not far and not unheld:
        return
    yield Finding(
        id="kl-growing",
        severity=Severity.WARNING if metrics.native else Severity.NOTE,
        statement=f"kl_reg grows from {start:.3g} to {last:.3g}: the adapter leaves the base policy",
        evidence=(
            f"kl_reg from {series[0][0]} to {series[-1][0]}: " + ", ".join(f"{value:.4g}" for value in values[:12]),
            f"kl_reg_weight {weight:g}" if weight is not None else "kl_reg_weight unknown",
        ),
        cause=(
            "an anchor with the wrong sign or the wrong reference pushes away from the base"
            if weight
            else (
                "nothing holds the adapter (kl_reg_weight 0), the learning rate is too high, or the steps are"
                " off-policy"
            )
        ),
        next_step="check the anchor; lower the learning rate or give the anchor weight",
        data={"start": start, "last": last},
    )


def distill_range(evidence: Evidence) -> Verdicts:
    """distill_loss outside what a generalised Jensen-Shannon divergence can be, or 0 throughout."""
    metrics = evidence.metrics
    if metrics is None:
        return
    rows = [(label, step.values) for label, step in labelled_steps(metrics) if "distill_loss" in step.values]
    rows = [(label, values) for label, values in rows if math.isfinite(values["distill_loss"])]
    if not metrics.native:
        return  # another loss under the same word, or 0 where a batch had nothing to distil
    alpha = evidence.request.training.alpha
    if rows and all(values["distill_loss"] == 0 for _, values in rows):
        if alpha == 0:  # the divergence is 0 by its definition
            yield Finding(
                id="distill-range",
                severity=Severity.NOTE,
                statement="alpha is 0, where distill_loss is 0 by its definition: the anchor alone was trained",
                evidence=(f"distill_loss is 0 at each of {len(rows)} step(s)",),
                cause="alpha = 0 in the settings: no gradient comes from the teacher",
                next_step="set alpha above 0 to distil (up to 1, the reverse KL divergence)",
            )
            return
        yield Finding(
            id="distill-range",
            severity=Severity.WARNING,
            statement="distill_loss is exactly 0 at every step: nothing was distilled",
            evidence=(f"{len(rows)} step(s)",),
            cause="a support of one token, an all-zero mask, or a teacher that is the student"
            + ("" if alpha else "; or alpha = 0"),
            next_step="check alpha, teacher_top_k, the response mask and the teacher's prompt",
        )
        return
    if alpha is None:
        if rows:
            yield NotJudged("distill-range", "alpha is unknown; name the settings with --config")
        return
    if not 0 <= alpha < 1:
        return  # the reverse-KL surrogate has no such range
    entropy = -sum(p * math.log(p) for p in (alpha, 1 - alpha) if p > 0)
    outside = []
    for label, values in rows:
        value, ratio = values["distill_loss"], values.get("mean_is_ratio", math.nan)
        if value < -1e-6:
            outside.append(f"{label}: distill_loss {value:.6g} is negative")
        elif math.isfinite(ratio) and value > entropy * ratio * (1 + 1e-3) + 1e-6:
            outside.append(f"{label}: distill_loss {value:.6g} > {entropy:.4g} * mean_is_ratio {ratio:.4g}")
    if outside:
        yield Finding(
            id="distill-range",
            severity=Severity.ERROR,
            statement=f"distill_loss lies outside [0, H(alpha) * mean_is_ratio] for alpha = {alpha:g}",
            evidence=tuple(outside[:_SHOWN]),
            cause=(
                "not the divergence of two distributions: no renormalisation over the support, or another objective"
            ),
            next_step="check the divergence: a support renormalised on both sides, weighed by alpha",
        )


def grad_norm(evidence: Evidence) -> Verdicts:
    """A gradient norm that explodes, or is 0 while the loss is not."""
    metrics = evidence.metrics
    if metrics is None:
        return
    series = [(step.values.get("grad_norm", math.nan), label) for label, step in labelled_steps(metrics)]
    series = [(value, label) for value, label in series if math.isfinite(value)]
    if not series:
        return
    values = sorted(value for value, _ in series)
    # The first step may lie where the gradient is steep (DeLoRA divides by the norm of its zeros): no explosion.
    largest, label = max(series[1:] if len(series) > 2 else series)
    median = values[(len(values) - 1) // 2]
    # Another tool may sum where this algorithm takes the mean.
    huge = largest > _HUGE_NORM and metrics.native
    if huge or (len(values) >= 3 and largest > 10 and largest >= 100 * median):
        yield Finding(
            id="grad-norm",
            severity=Severity.WARNING if metrics.native else Severity.NOTE,
            statement=f"grad_norm explodes: {largest:.3g} at {label}",
            evidence=(f"median {median:.3g} over {len(values)} step(s)",),
            cause="stale behaviour log-probs amplify the gradient up to is_clip-fold; k3 grows with exp(d)",
            next_step="look at that step's mean_is_ratio and kl_reg",
            data={"largest": largest, "median": median},
        )
    if values[-1] == 0:
        yield Finding(
            id="grad-norm",
            severity=Severity.WARNING,
            statement="grad_norm is 0 at every step: no gradient reached the adapter",
            evidence=(f"{len(values)} step(s)",),
            cause="a loss computed on detached tensors, alpha = 0, or an all-zero mask",
            next_step="check that the loss has a gradient, and that the adapter requires one",
        )


CHECKS = (
    Check("metrics-nonfinite", "NaN, infinity or null in the metrics", metrics_nonfinite),
    Check("metrics-incomplete", "metrics with gaps or contradictions", metrics_incomplete),
    Check("kl-negative", "kl_reg below 0", kl_negative),
    Check("kl-growing", "kl_reg large and growing", kl_growing),
    Check("distill-range", "distill_loss outside the divergence's range, or 0 throughout", distill_range),
    Check("grad-norm", "an exploding or vanished gradient norm", grad_norm),
)
