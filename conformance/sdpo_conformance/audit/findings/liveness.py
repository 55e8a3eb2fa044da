"""Whether the run trained at all, and what of its log could not be read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from sdpo_conformance.audit.errors import shown
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, NotJudged, Severity, Verdicts
from sdpo_conformance.audit.metrics import RunMetrics, Step

_FEWEST_ROWS = 2
_FEWEST_ZEROS = 3
#: A loss that is logged to four decimals and converges passes through values below this before it reads 0.
_SUDDEN = 0.01
_SHOWN_NAMES = 8
#: A sampler in half precision keeps the mean ratio of a batch within a few percent of 1.
_RATIO_OFF = 0.05
_RATIO_SPREAD = 1 / 3
#: Mean |difference| of log-probs (nats) and of probabilities that no two engines' rounding reaches.
_GAPS = {"sampler_gap": 0.1, "sampler_gap_probability": 0.05}
_GAP_GROWTH = 5.0
#: The same of a KL divergence, in nats: a gap of 0.1 a token is one of about 0.01. Kernels differ by 0.001 or so.
_FAR_APART = 0.02
_KL_GROWTH = 20.0
_STEADY = 0.8
_FEWEST_CLIMBING = 16


def dead_rows(metrics: RunMetrics) -> int:
    """How many rows at the end have a gradient norm that is no number, and a loss of exactly 0 or none; 0 for one."""
    dead = 0
    for step in reversed(_reporting(metrics)):
        loss, norm = step.values.get("total_loss", 0.0), step.values.get("grad_norm")
        if norm is None or math.isfinite(norm) or (math.isfinite(loss) and loss != 0):
            break
        dead += 1
    return dead if dead >= _FEWEST_ROWS else 0


def _reporting(metrics: RunMetrics) -> list[Step]:
    return [step for step in metrics.steps if "total_loss" in step.values or "grad_norm" in step.values]


def dead_run(evidence: Evidence) -> Verdicts:
    """From some step to the end: a gradient norm that is no number, and a loss of exactly 0 or none."""
    metrics = evidence.metrics
    if metrics is None:
        return
    steps = _reporting(metrics)
    dead = dead_rows(metrics)
    if not dead:
        yield from _nothing_left(steps)
        return
    first = steps[len(steps) - dead]
    zero = first.values.get("total_loss") == 0 or steps[-1].values.get("total_loss") == 0
    yield Finding(
        id="dead-run",
        severity=Severity.ERROR,
        statement=(
            f"the run is dead from step {first.number} on: grad_norm is not a number and the loss is "
            + ("exactly 0" if zero else "none")
        ),
        evidence=(f"{dead} of {len(steps)} rows, to the last",),
        cause=(
            "a loss of NaN: transformers' logging_nan_inf_filter (on by default) hides it and logs 0 in its place;"
            " every parameter that was updated with it is NaN"
            if zero
            else "a NaN in the forward or the gradient that every later step inherits"
        ),
        next_step=(
            "throw the weights away from that step on; set logging_nan_inf_filter=False and look for the first NaN"
        ),
        data={"first_step": first.number, "rows": dead},
    )


def _nothing_left(steps: Sequence[Step]) -> Verdicts:
    """A loss that is suddenly exactly 0, without a gradient or word of one, and stays so: that is no convergence."""
    dead = 0
    for step in reversed(steps):
        if step.values.get("total_loss") != 0 or step.values.get("grad_norm", 0.0) != 0:
            break
        dead += 1
    if dead < _FEWEST_ZEROS or dead == len(steps) or 4 * dead < len(steps):
        return
    before = steps[len(steps) - dead - 1].values.get("total_loss", 0.0)
    if not abs(before) >= _SUDDEN:
        return
    first = steps[len(steps) - dead]
    yield Finding(
        id="dead-run",
        severity=Severity.WARNING,
        statement=f"the loss falls from {before:.4g} to exactly 0 at step {first.number} and stays there",
        evidence=(f"{dead} of {len(steps)} rows, to the last",),
        cause=(
            "a loss of NaN that the logger replaces by 0 (transformers' logging_nan_inf_filter), or batches in which"
            " no token counts"
        ),
        next_step="log grad_norm, set logging_nan_inf_filter=False, and count the tokens of those batches",
        data={"first_step": first.number, "rows": dead},
    )


def sampler_ratio(evidence: Evidence) -> Verdicts:
    """The ratio of trainer to sampler away from 1 by the same factor in every batch."""
    metrics = evidence.metrics
    if metrics is None:
        return
    if metrics.has("sampler_ratio"):
        name = "sampler_ratio"
        values = [step.values[name] for step in metrics.steps if name in step.values]
    elif metrics.native and (metrics.batching == "explicit" or len(metrics.batches) > 2):
        firsts = [batch.steps[0].values.get("mean_is_ratio", math.nan) for batch in metrics.batches if batch.steps]
        name, values = "mean_is_ratio", firsts
        if len(values) < 3:
            return  # one batch's mean says little about a factor
    else:
        return
    values = [value for value in values if math.isfinite(value)]
    if len(values) < 3:
        return
    middle = statistics.median(values)
    spread = statistics.pstdev(values)
    one_sided = len({value > 1 for value in values}) == 1
    if abs(middle - 1) <= _RATIO_OFF or not one_sided or spread > _RATIO_SPREAD * abs(middle - 1):
        return
    yield Finding(
        id="sampler-ratio",
        severity=Severity.WARNING,
        statement=f"the ratio of trainer to sampler is {middle:.4g} in every batch, not 1: off by a constant",
        evidence=(f"{name} of {len(values)} batches: median {middle:.4g}, standard deviation {spread:.2g}",),
        cause=(
            "the recorded log-probs are not of the distribution that the trainer scores: taken before or after the"
            " temperature or top-p, from another adapter, or from the base model"
        ),
        next_step="give --model and the samples: the audit then says which of these fits the recorded log-probs",
        data={"ratio": middle, "spread": spread},
    )


def sampler_gap(evidence: Evidence) -> Verdicts:
    """The distance of sampler and trainer grows with training: the sampler does not get the weights."""
    if evidence.metrics is not None:
        found = list(_gap(evidence.metrics))
        yield from found or _divergence(evidence.metrics)


def _gap(metrics: RunMetrics) -> Verdicts:
    """The mean difference of the two's log-probs, or probabilities, grows."""
    name = next((n for n in _GAPS if metrics.has(n)), None)
    if name is None:
        return
    values = [value for step in metrics.steps if math.isfinite(value := step.values.get(name, math.nan))]
    quarter = len(values) // 4
    if quarter < 2:
        return
    start, end = statistics.median(values[:quarter]), statistics.median(values[-quarter:])
    middle = statistics.median(values[quarter:-quarter])
    if not (end >= _GAPS[name] and end >= _GAP_GROWTH * start and start <= middle <= end):
        return
    yield Finding(
        id="sampler-gap",
        severity=Severity.WARNING,
        statement=f"sampler and trainer drift apart: their mean |difference| grows from {start:.3g} to {end:.3g}",
        evidence=(f"medians of the first and the last {quarter} of {len(values)} rows, {middle:.3g} between them",),
        cause=(
            "the engine does not get the trained adapter (never delivered, or its requests do not name it), so that the"
            " gap grows as the adapter does; or the policy collapses"
        ),
        next_step="give --model and the samples: the audit then says whose log-probs were recorded",
        data={"start": start, "end": end},
    )


def _divergence(metrics: RunMetrics) -> Verdicts:
    """The divergence of sampler and trainer climbs from nothing, step by step, at a rate that does not grow."""
    if metrics.has("sampler_gap"):
        return  # the same, measured better
    steps = [s for s in metrics.steps if math.isfinite(s.values.get("sampler_kl", math.nan))]
    values = [step.values["sampler_kl"] for step in steps]
    rates = [step.values["learning_rate"] for step in steps if "learning_rate" in step.values]
    quarter = len(values) // 4
    if len(values) < _FEWEST_CLIMBING or len(rates) < len(steps) or not rates[quarter] >= rates[-1] > 0:
        return  # in a warmup a sampler that is some steps behind falls behind further
    start, middle, end = (
        statistics.median(part) for part in (values[:quarter], values[quarter:-quarter], values[-quarter:])
    )
    climbing = _rank_correlation(values)
    if not (end >= _FAR_APART and end >= _KL_GROWTH * max(start, 0.0) and start <= middle <= end):
        return
    if climbing < _STEADY:
        return
    yield Finding(
        id="sampler-gap",
        severity=Severity.WARNING,
        statement=f"sampler and trainer drift apart: their KL divergence climbs from {start:.3g} to {end:.3g}",
        evidence=(
            f"medians of the first and the last {quarter} of {len(values)} rows, {middle:.3g} between them",
            f"rank correlation with the step {climbing:.2f}, learning rate {rates[quarter]:g} to {rates[-1]:g}",
        ),
        cause="the engine does not get the trained adapter: the distance to the policy at the start grows as it trains",
        next_step="compare the sampler's log-probs with the trainer's right after a synchronisation",
        data={"start": start, "end": end},
    )


def _rank_correlation(values: Sequence[float]) -> float:
    """Spearman's, of the values with their place."""
    ranks = [0.0] * len(values)
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        ranks[place] = float(rank)
    return statistics.correlation(ranks, range(len(values)))


def fields_not_understood(evidence: Evidence) -> Verdicts:
    """What the log holds and the audit cannot read."""
    metrics = evidence.metrics
    if evidence.metrics_refused:
        yield NotJudged("metrics-fields", evidence.metrics_refused)
    if metrics is None:
        return
    for note in metrics.notes:
        yield NotJudged("metrics-fields", note)
    if metrics.unknown_fields:
        names = metrics.unknown_fields
        told = ", ".join(shown(n) for n in names[:_SHOWN_NAMES]) + (", …" if len(names) > _SHOWN_NAMES else "")
        yield NotJudged("metrics-fields", f"{len(names)} field(s) not understood: {told}")


CHECKS = (
    Check("dead-run", "no number for a gradient from some step to the end", dead_run),
    Check("sampler-ratio", "trainer and sampler apart by the same factor in every batch", sampler_ratio),
    Check("sampler-gap", "trainer and sampler drift apart as the run goes on", sampler_gap),
    Check("metrics-fields", "fields that no known tool writes", fields_not_understood),
)
