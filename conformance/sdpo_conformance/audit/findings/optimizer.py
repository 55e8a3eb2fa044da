"""The saved optimizer state against the adapter it was saved with."""

from __future__ import annotations

import math
from collections import Counter

from sdpo_conformance.audit.adapter_change import AdapterChange
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, NotJudged, Severity, Verdicts

_ITEM_SIZES = (2, 4, 8)


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
    if before is not None and change is not None and change.moved and before.checksums == after.checksums:
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


def _others(change: AdapterChange) -> set[int]:
    """Sizes that other optimizers keep: bitsandbytes a byte per element, a map of 256 values and a scale per block;
    Adafactor a row and a column.
    """
    shapes = [entry.shape for entry in change.after.tensors.values()]
    numels = {math.prod(shape) for shape in shapes}
    scales = {4 * math.ceil(numel / block) for numel in numels for block in (256, 2048)}
    return {4 * 256} | numels | scales | {4 * size for shape in shapes for size in shape}


CHECKS = (Check("optimizer-mismatch", "optimizer state out of step with the adapter", optimizer_mismatch),)
