"""The saved optimizer state against the adapter it was saved with."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

from sdpo_conformance.audit.adapter_change import AdapterChange
from sdpo_conformance.audit.errors import shown
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, NotJudged, Severity, Verdicts

_ITEM_SIZES = (2, 4, 8)
_RESUME = "resume_from_checkpoint"
#: Words of runs that clear the optimizer on purpose.
_FRESH_ON_PURPOSE = r"relora|reset_optim|optimizer_reset|reset_lora|ignore_optim|load_optimizer\W+false"
#: A loss scaler skips a few updates, never as large a part of them as is left here.
_PART = 0.5


def optimizer_mismatch(evidence: Evidence) -> Verdicts:
    """State of other tensors than the adapter's, state that stood still, or counters that disagree."""
    before, after, change = evidence.optimizer_before, evidence.optimizer_after, evidence.change
    if after is None:
        yield NotJudged("optimizer-mismatch", "no optimizer state beside the finished adapter that can be looked at")
        return
    told: list[str] = []
    if change is not None:
        allowed: Counter[int] = Counter()
        for tensor in change.tensors:
            for size in _ITEM_SIZES:
                allowed[tensor.numel * size] += 2  # AdamW keeps exp_avg and exp_avg_sq
        foreign = {size: n - allowed[size] for size, n in after.sizes.items() if n > allowed[size]}
        others = sum(number for size, number in foreign.items() if size in _others(change))
        if foreign and 2 * others >= sum(foreign.values()):
            yield NotJudged("optimizer-mismatch", "the state is not laid out as AdamW's (8-bit, factored): not read")
            return
        if foreign:
            size, number = next(iter(foreign.items()))
            told.append(
                f"{sum(foreign.values())} stored tensors fit no tensor of the adapter ({number} of {size} bytes)"
            )
    kept = before is not None and bool(after.checksums)  # plain SGD keeps nothing
    if before is not None and kept and change is not None and change.moved and before.checksums == after.checksums:
        told.append("the state is the same before and after although the adapter changed")
    if before is not None and before.steps and after.steps and evidence.metrics is not None:
        taken = max(after.steps) - max(before.steps)
        reported = len(evidence.metrics.steps)
        # Between checkpoints fewer steps were taken than the log counts.
        last = max(step.number for step in evidence.metrics.steps)
        counted = not evidence.metrics.native and max(after.steps) == last
        known = evidence.metrics.batching != "unknown" and not counted
        if known and taken != reported and before.checksums != after.checksums:
            told.append(
                f"its step counter went from {max(before.steps):g} to {max(after.steps):g}; {reported} steps reported"
            )
    if after.steps and evidence.metrics is not None and evidence.metrics.batching != "unknown":
        reported = len(evidence.metrics.steps)
        if max(after.steps) < reported:
            told.append(f"its step counter stands at {max(after.steps):g}; {reported} steps reported")
    if told:
        yield Finding(
            id="optimizer-mismatch",
            severity=Severity.WARNING,
            statement="the optimizer state is out of step with the adapter",
            evidence=tuple(told),
            cause="saved at another time than the adapter, or left over from another one",
            next_step="continue training from a matching pair; otherwise start the optimizer afresh",
        )


def optimizer_restarted(evidence: Evidence) -> Verdicts:
    """A step counter that falls from one checkpoint to a later one, or is far below the trainer's own count."""
    counters, settings = evidence.counters, evidence.settings
    if not counters or settings.says(_FRESH_ON_PURPOSE) or settings.true("resume_only_model"):
        return
    fell = [(a, b) for a, b in pairwise(counters) if b.counter < a.counter and b.global_step > a.global_step]
    last = counters[-1]
    if not fell and last.counter > _PART * last.global_step:
        return
    resumed = bool(settings.words(_RESUME)) or settings.true(_RESUME)
    place = fell[0][1] if fell else last
    yield Finding(
        id="optimizer-restarted",
        severity=Severity.ERROR if fell and resumed else Severity.WARNING,
        statement=(
            f"AdamW's state was begun anew before {shown(place.checkpoint)}: it has counted {place.counter} of"
            f" {place.global_step} updates"
        ),
        evidence=(
            *(
                f"{shown(c.checkpoint)}: {c.counter} updates in the state, global_step {c.global_step}"
                for c in counters[-8:]
            ),
            *(("the settings resume from a checkpoint",) if resumed else ()),
        ),
        cause="weights and step were restored on resuming, the optimizer's state (and often its schedule) was not",
        next_step="resume from a checkpoint that holds optimizer.pt and scheduler.pt; look at the first rate after it",
        data={"counter": place.counter, "global_step": place.global_step},
    )


def _others(change: AdapterChange) -> set[int]:
    """Sizes that other optimizers keep: bitsandbytes a byte per element, a map of 256 values and a scale per block;
    Adafactor a row and a column.
    """
    shapes = [entry.shape for entry in change.after.tensors.values()]
    numels = {math.prod(shape) for shape in shapes}
    scales = {4 * math.ceil(numel / block) for numel in numels for block in (256, 2048)}
    return {4 * 256} | numels | scales | {4 * size for shape in shapes for size in shape}


CHECKS = (
    Check("optimizer-mismatch", "optimizer state out of step with the adapter", optimizer_mismatch),
    Check("optimizer-restarted", "optimizer state begun anew in the course of the run", optimizer_restarted),
)
