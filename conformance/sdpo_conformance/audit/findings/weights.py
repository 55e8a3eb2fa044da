"""The adapter's tensors: what changed, what cannot be, and what is no second state of the same adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sdpo_conformance.audit.adapter_change import AdapterChange
from sdpo_conformance.audit.errors import shown
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, NotJudged, Severity, Verdicts
from sdpo_conformance.audit.findings.shards import shard_of
from sdpo_conformance.audit.header import ITEM_BYTES
from sdpo_conformance.audit.metrics import CONTINUOUS_FIELDS, RunMetrics

_SHOWN = 5


def weights_unchanged(evidence: Evidence) -> Verdicts:
    """Not one tensor changed."""
    change, metrics = evidence.change, evidence.metrics
    if change is None or not change.compared:
        yield NotJudged("weights-unchanged", evidence.adapter_refused or _lacking(change))
        return
    if len(change.after.empty) == len(change.after.tensors):
        yield NotJudged("weights-unchanged", "the finished adapter has no elements")
        return
    if change.moved:
        return
    moving = metrics is not None and _moves(metrics)
    yield Finding(
        id="weights-unchanged",
        severity=Severity.ERROR,
        statement=f"none of {len(change.compared)} tensors changed" + (" while the metrics moved" if moving else ""),
        evidence=(f"{_path(change.before)} and {_path(change.after)} hold equal tensors",),
        cause=(
            "what was trained is not what was saved: saved before the update, from another adapter, or the"
            " same file twice"
            if moving
            else ("the optimizer has no parameters of the adapter, its learning rate is 0, or no gradient arrives")
        ),
        next_step="check when the finished adapter is saved, and that the optimizer got the adapter's parameters",
    )


def tensor_nonfinite(evidence: Evidence) -> Verdicts:
    """NaN or infinity in a tensor."""
    change = evidence.change
    if change is None:
        return
    after = [t for t in change.tensors if t.nonfinite_after]
    before = [t for t in change.tensors if t.nonfinite_before]
    if not after and not before:
        return
    broken = after or before
    when = "after the run" if after else "before the run"
    yield Finding(
        id="tensor-nonfinite",
        severity=Severity.ERROR,
        statement=f"{len(broken)} of {len(change.tensors)} tensors hold NaN or infinity {when}",
        evidence=tuple(
            f"{shown(t.key)}: {t.nonfinite_after or t.nonfinite_before} of {t.numel} elements" for t in broken[:_SHOWN]
        ),
        cause="they were there before the run" if before else "a non-finite gradient reached the optimizer",
        next_step="throw this adapter away; find the first non-finite step metric",
        data={"tensors_after": len(after), "tensors_before": len(before)},
    )


def tensor_mismatch(evidence: Evidence) -> Verdicts:
    """Keys or shapes that differ between before and after."""
    change = evidence.change
    if change is None or change.after.empty or not change.after.tensors:
        return
    if change.before is not None and (change.before.empty or not change.before.tensors) and not change.before.fresh:
        return
    told = [
        *_some("only before", change.only_before),
        *_some("only after", change.only_after),
        *(() if change.converted else _some("another shape", change.shape_mismatch)),
    ]
    if change.converted:
        yield Finding(
            id="tensor-mismatch",
            severity=Severity.NOTE,
            statement="the adapter after the run holds its start with the sign turned: twice the rank",
            evidence=(f"{len(change.shape_mismatch)} tensors of twice the rank",),
            cause="PEFT's conversion to plain LoRA (path_initial_model_for_weight_conversion), as for PiSSA",
            next_step="load it on the unchanged base model",
        )
    if not told:
        return
    parts = shard_of(change)
    if parts:
        told.append(
            f"each is 1/{parts} of its tensor before: {shown(change.shape_mismatch[0])}"
            f" {list(change.after.tensors[change.shape_mismatch[0]].shape)}"
        )
    yield Finding(
        id="tensor-mismatch",
        severity=Severity.ERROR,
        statement=(
            f"the adapter after the run is one rank's shard: {len(change.shape_mismatch)} tensors have 1/{parts} of"
            " their rows or columns"
            if parts
            else "the adapters before and after do not hold the same tensors"
        ),
        evidence=tuple(told),
        cause=(
            "tensor or fully sharded parallelism, saved from one rank without gathering"
            if parts
            else "another rank or other target modules: these are not two states of one adapter"
        ),
        next_step=(
            "gather the shards before saving; the other ranks' parts are not in this file"
            if parts
            else "name the adapter that the run started from with --before"
        ),
        data={
            "only_before": len(change.only_before),
            "only_after": len(change.only_after),
            "shape": len(change.shape_mismatch),
        },
    )


def dtype_changed(evidence: Evidence) -> Verdicts:
    """Tensors saved in another dtype than they were read in."""
    change = evidence.change
    if change is None or not change.dtype_changes:
        return
    narrowed = [d for d in change.dtype_changes if ITEM_BYTES[d.split(" to ")[1]] < ITEM_BYTES[d.split(" to ")[0]]]
    yield Finding(
        id="dtype-changed",
        severity=Severity.WARNING if narrowed else Severity.NOTE,
        statement="tensors changed their dtype: " + ", ".join(f"{n} {d}" for d, n in change.dtype_changes.items()),
        evidence=("the comparison is made on the upcast values",),
        cause=(
            "the adapter is saved in less precision than it had: small updates are rounded away"
            if narrowed
            else (
                "the trainer holds the adapter in more precision than it was saved in (PEFT does so for half precision)"
            )
        ),
        next_step=("save in the dtype that was trained" if narrowed else "nothing, unless the file's size matters"),
        data=dict(change.dtype_changes),
    )


def _moves(metrics: RunMetrics) -> bool:
    for name in CONTINUOUS_FIELDS:
        values = [step.values[name] for step in metrics.steps if name in step.values]
        if len({value for value in values if math.isfinite(value)}) > 1:
            return True
    return False


def _lacking(change: AdapterChange | None) -> str:
    if change is None:
        return "no finished adapter"
    return "no tensor of the finished adapter has a counterpart" if change.before else "no adapter from before the run"


def _path(adapter: object) -> str:
    return shown(getattr(adapter, "path", "–"))


def _some(what: str, keys: Sequence[str]) -> list[str]:
    if not keys:
        return []
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return [f"{what}: {', '.join(shown(key) for key in keys[:3])}{more}"]


CHECKS = (
    Check("weights-unchanged", "no tensor changed", weights_unchanged),
    Check("tensor-nonfinite", "NaN or infinity in the adapter", tensor_nonfinite),
    Check("tensor-mismatch", "other keys or shapes after than before", tensor_mismatch),
    Check("dtype-changed", "another dtype after than before", dtype_changed),
)
