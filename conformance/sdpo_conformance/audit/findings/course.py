"""Whether training goes where it should: down on its own batch, seen by the evaluation, with answers that end."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from itertools import pairwise

from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, Severity, Verdicts

_FEWEST_MOVES = 12
_FEWEST_STEPS = 8
#: How far a norm may lie from a straight line through 0, and how long that line has to be.
_STRAIGHT = 0.1
_LENGTH = 8.0
_FEWEST_EVALUATIONS = 3
_DIGITS = 6
_CUT = 0.99
_MOSTLY_WHOLE = 0.5
_PARTLY_WHOLE = 0.9
_FEWEST_ROWS = 12


def loss_uphill(evidence: Evidence) -> Verdicts:
    """distill_loss that rises in every move from a step to the next on the very same batch."""
    metrics, alpha = evidence.metrics, evidence.request.training.alpha
    if metrics is None or not metrics.native or metrics.batching != "explicit":
        return
    if alpha is None or not 0 < alpha < 1:
        return  # the surrogate of alpha = 1 is no objective that has to fall
    moves = [
        (a.values.get("distill_loss", math.nan), b.values.get("distill_loss", math.nan))
        for batch in metrics.batches
        if batch.steps
        for a, b in pairwise(batch.steps[1:] if _off_policy(batch.steps[0].values) else batch.steps)
        if b.values.get("learning_rate", 1.0) > 0
    ]
    if len(moves) < _FEWEST_MOVES or not all(a < b < math.inf for a, b in moves):
        return
    yield Finding(
        id="loss-uphill",
        severity=Severity.WARNING,
        statement=f"distill_loss rises on its own batch in each of {len(moves)} moves from one step to the next",
        evidence=(f"from {moves[0][0]:.4g} to {moves[-1][1]:.4g} over the run",),
        cause="the sign of the loss or of the gradient, or a learning rate at which every step overshoots",
        next_step="take one step at a small rate: the loss of the same batch has to fall",
        data={"moves": len(moves)},
    )


def _off_policy(first: Mapping[str, float]) -> bool:
    """Whether the first step's loss is weighed by another ratio than the later ones'."""
    return not abs(first.get("mean_is_ratio", 1.0) - 1) <= 1e-3


def gradients_accumulate(evidence: Evidence) -> Verdicts:
    """A gradient norm in proportion to the number of steps taken."""
    metrics = evidence.metrics
    if metrics is None or not metrics.native or metrics.averaged_over > 1:
        return
    norms = [step.values.get("grad_norm", math.nan) for step in metrics.steps]
    if len(norms) < _FEWEST_STEPS or not all(0 < norm < math.inf for norm in norms):
        return
    slope = statistics.median(norm / count for count, norm in enumerate(norms, start=1))
    straight = all(abs(norm / (slope * count) - 1) <= _STRAIGHT for count, norm in enumerate(norms, start=1))
    if not straight or norms[-1] < _LENGTH * norms[0] * (1 - _STRAIGHT):
        return
    yield Finding(
        id="grad-accumulates",
        severity=Severity.WARNING,
        statement=f"grad_norm grows in proportion to the number of steps: {slope:.3g} a step, over {len(norms)} steps",
        evidence=(f"first {norms[0]:.4g}, last {norms[-1]:.4g}",),
        cause="gradients are not cleared between the steps: each adds to those before",
        next_step="call optimizer.zero_grad() after each step",
        data={"slope": slope, "steps": len(norms)},
    )


def evaluation_frozen(evidence: Evidence) -> Verdicts:
    """eval_loss that is the same to the last of many digits while the training loss moves."""
    metrics = evidence.metrics
    if metrics is None:
        return
    values = [value for _, value in metrics.evaluations]
    finite = [step.values.get("total_loss", math.nan) for step in metrics.steps]
    moving = len({value for value in finite if math.isfinite(value)}) > 1
    rates = [step.values["learning_rate"] for step in metrics.steps if "learning_rate" in step.values]
    if len(values) < _FEWEST_EVALUATIONS or len(set(values)) > 1 or not moving or (rates and not any(rates)):
        return
    if not math.isfinite(values[0]) or len(_digits(values[0])) < _DIGITS:
        return
    yield Finding(
        id="eval-frozen",
        severity=Severity.WARNING,
        statement=f"eval_loss is {values[0]!r} in each of {len(values)} evaluations, while the training loss moves",
        evidence=(f"steps {', '.join(str(number) for number, _ in metrics.evaluations[:8])}",),
        cause="the evaluation runs without the adapter, on another copy of the model, or its number is kept",
        next_step="evaluate once with the adapter disabled: if the number is the same, it was never on",
        data={"evaluations": len(values)},
    )


def _digits(value: float) -> str:
    """Its significant digits."""
    return repr(abs(value)).partition("e")[0].replace(".", "").lstrip("0")


def completions_cut(evidence: Evidence) -> Verdicts:
    """Completions that ended by themselves at the start, and all run to the limit at the end: for the last quarter
    after a start where half did not, or for the second half after a start where a tenth did not.
    """
    metrics = evidence.metrics
    if metrics is None:
        return
    values = [value for step in metrics.steps if math.isfinite(value := step.values.get("completions_cut", math.nan))]
    if len(values) < _FEWEST_ROWS:
        return
    quarter, half, tenth = (len(values) // part for part in (4, 2, 10))
    slow = statistics.median(values[:quarter]) <= _MOSTLY_WHOLE and min(values[-quarter:]) >= _CUT
    fast = half >= _FEWEST_ROWS and statistics.fmean(values[:tenth]) <= _PARTLY_WHOLE
    if not slow and not (fast and statistics.fmean(values[-half:]) >= _CUT):
        return
    rows = quarter if slow else half
    start = statistics.median(values[:quarter]) if slow else statistics.fmean(values[:tenth])
    end = statistics.fmean(values[-rows:])
    yield Finding(
        id="completions-cut",
        severity=Severity.WARNING,
        statement=f"{start:.0%} of the completions ran to the limit at the start, {end:.3g} of all at the end",
        evidence=(f"the last {rows} of {len(values)} rows: from {min(values[-rows:]):.3g} on",),
        cause="the policy has lost its end token, or grows its answers past the limit",
        next_step="read a few completions; --model measures with the adapter before and after how many end",
        data={"start": start, "end": end},
    )


CHECKS = (
    Check("loss-uphill", "a loss that rises on its own batch at every step", loss_uphill),
    Check("grad-accumulates", "a gradient norm in proportion to the steps", gradients_accumulate),
    Check("eval-frozen", "an evaluation that nothing changes", evaluation_frozen),
    Check("completions-cut", "completions that no longer end", completions_cut),
)
