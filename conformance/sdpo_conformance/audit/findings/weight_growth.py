"""Elements and tensors that moved further than training moves them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sdpo_conformance.audit.adapter_change import AdapterChange, TensorChange
from sdpo_conformance.audit.errors import shown
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, NotJudged, Severity, Verdicts

_SHOWN = 5
#: Adam moves no element by more than lr (1 - beta1) / sqrt(1 - beta2) in a step (Kingma & Ba 2015, section
#: 2.1).
_ADAM_STEP = (1 - 0.9) / math.sqrt(1 - 0.999)
_SLACK = 1.1
_HALF_ULP = 2.0**-8
_FACTOR_GROWTH = 5.0
_LARGE_RMS = 0.5


@dataclass(frozen=True)
class Furthest:
    """The tensor that went furthest beyond AdamW's bound, and `excess`, how many times as far: 1 within it."""

    tensor: TensorChange | None
    excess: float
    steps: int
    rate: float


def furthest(evidence: Evidence) -> Furthest | None:
    """How far the adapter moved against AdamW's bound; None where nothing says the rate or the number of steps."""
    change, metrics = evidence.change, evidence.metrics
    rates = [evidence.request.training.learning_rate or 0.0]
    steps = evidence.request.training.steps_per_batch or 0
    if metrics is not None:
        rates += [s.values["learning_rate"] for s in metrics.steps if s.values.get("learning_rate", 0) > 0]
        steps = len(metrics.steps)
        if metrics.batching == "unknown":
            steps = max(step.number for step in metrics.steps)  # a log may leave steps out
    rate = max(rates)
    if change is None or not rate > 0 or steps < 1:
        return None
    tensor, excess = beyond_adam(change, rate, steps)
    return Furthest(tensor, excess, steps, rate)


def beyond_adam(change: AdapterChange, rate: float, steps: int) -> tuple[TensorChange | None, float]:
    """The tensor that went furthest beyond what AdamW moves an element in so many updates, and how many times as far;
    None and 1 where all are within it.
    """
    found, excess = None, 1.0
    for tensor in change.compared:
        stored = change.after.tensors[tensor.key].dtype
        rounding = 0.0 if stored in ("F32", "F64") else _HALF_ULP * tensor.max_abs_after
        bound = _SLACK * steps * (rate * _ADAM_STEP + rounding + rate * 0.01 * tensor.max_abs_after)
        if (tensor.max_abs_delta or 0.0) > excess * bound:
            found, excess = tensor, (tensor.max_abs_delta or 0.0) / bound
    return found, excess


def step_too_large(evidence: Evidence) -> Verdicts:
    """An element that moved further than AdamW can move it at this learning rate."""
    change, metrics = evidence.change, evidence.metrics
    if change is None or not change.compared or not change.moved:
        return
    far = furthest(evidence)
    if far is None:
        yield NotJudged("step-too-large", "the learning rate or the number of steps is unknown; --config can name them")
        return
    tensor, excess = far.tensor, far.excess
    if tensor is None:
        return
    # A step of another tool may be several updates (verl's mini-batches), and its optimizer need not be AdamW. Without
    # a log, steps_per_batch says nothing of how many batches there were.
    native = metrics is not None and metrics.native
    yield Finding(
        id="step-too-large",
        severity=Severity.WARNING if native else Severity.NOTE,
        statement=(f"an element moved by {tensor.max_abs_delta:.3g}, {excess:.3g} times as far as AdamW can move it"),
        evidence=(
            f"{shown(tensor.key)}: max |delta| {tensor.max_abs_delta:.4g}",
            f"{far.steps} step(s) at learning rate {far.rate:g} bound it by {(tensor.max_abs_delta or 0) / excess:.3g}",
        ),
        cause=(
            "more steps were taken than reported, at a higher rate, with another optimizer, or 'before' is"
            " not the start"
        ),
        next_step=("count the optimizer's steps and check its learning rate; name the right start with --before"),
        data={
            "max_abs_delta": tensor.max_abs_delta,
            "excess": excess,
            "steps": far.steps,
            "learning_rate": far.rate,
        },
    )


def norm_explosion(evidence: Evidence) -> Verdicts:
    """Tensors that grew out of all proportion. lora_B starts at zero, so it is judged by its size as well."""
    change = evidence.change
    if change is None:
        return
    grown = [t for t in change.compared if _exploded(t)]
    if not grown:
        return
    grown.sort(key=_growth, reverse=True)
    yield Finding(
        id="norm-explosion",
        severity=Severity.WARNING,
        statement=(f"{len(grown)} tensor(s) grew out of proportion, the most by a factor of {_growth(grown[0]):.3g}"),
        evidence=tuple(f"{shown(t.key)}: norm {t.norm_before:.4g} to {t.norm_after:.4g}" for t in grown[:_SHOWN]),
        cause="a learning rate that is too high, unclipped gradients, or off-policy steps in one direction",
        next_step="check the clipping, the learning rate, and the ratio over the steps",
        data={"tensors": len(grown), "factor": min(_growth(grown[0]), 1e300)},
    )


def _exploded(tensor: TensorChange) -> bool:
    if tensor.norm_before is None or not tensor.numel:
        return False
    rms = tensor.norm_after / math.sqrt(tensor.numel)
    if tensor.place.starts_at_zero:
        return rms > _LARGE_RMS and tensor.norm_after > 10 * tensor.norm_before
    return tensor.norm_before > 0 and tensor.norm_after > _FACTOR_GROWTH * tensor.norm_before


def _growth(tensor: TensorChange) -> float:
    return tensor.norm_after / tensor.norm_before if tensor.norm_before else math.inf


CHECKS = (
    Check("step-too-large", "an element moved further than AdamW can move it", step_too_large),
    Check("norm-explosion", "tensors that grew out of proportion", norm_explosion),
)
