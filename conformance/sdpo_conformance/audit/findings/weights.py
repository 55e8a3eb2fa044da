"""The adapter's tensors: what changed, what did not, and what cannot be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from sdpo_conformance.audit.adapter_change import AdapterChange, ModuleChange, TensorChange
from sdpo_conformance.audit.errors import shown
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, NotJudged, Severity, Verdicts
from sdpo_conformance.audit.header import ITEM_BYTES
from sdpo_conformance.audit.metrics import CONTINUOUS_FIELDS, RunMetrics
from sdpo_conformance.audit.names import place_of

_SHOWN = 5
#: Adam moves no element by more than lr (1 - beta1) / sqrt(1 - beta2) in a step (Kingma & Ba 2015, section
#: 2.1).
_ADAM_STEP = (1 - 0.9) / math.sqrt(1 - 0.999)
_SLACK = 1.1
_HALF_ULP = 2.0**-8
_FACTOR_GROWTH = 5.0
_LARGE_RMS = 0.5


def weights_unchanged(evidence: Evidence) -> Verdicts:
    """Not one tensor changed."""
    change, metrics = evidence.change, evidence.metrics
    if change is None or not change.compared:
        yield NotJudged("weights-unchanged", _lacking(change))
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
        next_step="check STEP-10 (the final adapter), and that the optimizer got the adapter's parameters",
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
        next_step="throw this adapter away; find the first non-finite step metric and check NUM-3 to NUM-5",
        data={"tensors_after": len(after), "tensors_before": len(before)},
    )


def tensor_mismatch(evidence: Evidence) -> Verdicts:
    """Keys or shapes that differ between before and after."""
    change = evidence.change
    if change is None or change.after.empty or (change.before is not None and change.before.empty):
        return
    told = [
        *_some("only before", change.only_before),
        *_some("only after", change.only_after),
        *_some("another shape", change.shape_mismatch),
    ]
    if not told:
        return
    parts = _shard_of(change)
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


def _shard_of(change: AdapterChange) -> int:
    """How many ranks the tensors were cut over, where every other shape is a tensor's before, cut along one axis."""
    if change.before is None or not change.shape_mismatch or change.only_before or change.only_after:
        return 0
    found = set()
    for key in change.shape_mismatch:
        old, new = change.before.tensors[key].shape, change.after.tensors[key].shape
        if len(old) != len(new):
            return 0
        cut = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
        if len(cut) != 1 or not cut[0][1] or cut[0][0] <= cut[0][1] or cut[0][0] % cut[0][1]:
            return 0
        found.add(cut[0][0] // cut[0][1])
    # A smaller rank changes both lora_A and lora_B of a module; a shard leaves one of the two whole.
    both = {place_of(key).module for key in change.shape_mismatch if place_of(key).part == "A"}
    both &= {place_of(key).module for key in change.shape_mismatch if place_of(key).part == "B"}
    return found.pop() if len(found) == 1 and not both else 0


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


def lora_b_zero(evidence: Evidence) -> Verdicts:
    """What an untrained adapter has at zero is still zero: everywhere, or in all experts held together."""
    change = evidence.change
    if change is None or change.after.empty:
        return
    able = [m for m in change.modules if any(t.place.starts_at_zero for t in m.tensors)]
    dead = [m for m in able if m.dead]
    parts = sorted({t.place.part for m in dead for t in m.tensors if t.place.starts_at_zero and t.zero_after})
    name = "lora_B" if parts == ["B"] else " and ".join("lora_B" if part == "B" else part for part in parts)
    if dead and len(dead) == len(able):
        yield Finding(
            id="lora-b-zero",
            severity=Severity.ERROR,
            statement=f"all {len(dead)} {shown(name)} are still zero: the adapter changes nothing",
            evidence=(f"{change.moved} of {len(change.compared)} tensors changed, no {shown(name)} among them",),
            cause=f"no gradient reached {shown(name)}; moving lora_A can be weight decay alone",
            next_step=(
                "check that the loss has a gradient (GJS-9) and that the step runs with the adapter enabled (STEP-9)"
            ),
        )
        return
    experts = [m for m in dead if _all_experts_at_once(m)]
    if not experts:
        return
    kinds = _count(m.place.kind for m in experts)
    yield Finding(
        id="lora-b-zero",
        severity=Severity.ERROR,
        statement=f"the lora_B of the experts is still zero in {len(experts)} module(s): expert LoRA was never trained",
        evidence=tuple(f"{shown(kind)}: {n} of {_total(change, kind)} modules" for kind, n in kinds[:_SHOWN]),
        cause=(
            "the grouped experts' tensors get no gradient: every token goes to some expert, so that zeros for all of"
            " them at once are no matter of routing"
        ),
        next_step="check that the experts' kernel is differentiated with respect to its LoRA tensors, and train again",
        data={"modules": len(experts)},
    )


def _all_experts_at_once(module: ModuleChange) -> bool:
    """One tensor for every expert of a layer: "no token was routed" cannot explain zeros in the whole of it."""
    if module.place.grouped:
        return "expert" in module.place.module
    path = module.place.module.split(".")
    held = any(part in ("experts", "expert") for part in path) and not any(part.isdigit() for part in _tail(path))
    return held


def _base_weight(module: ModuleChange, saved: object) -> bool:
    """A weight of the base model, which PEFT saves along where an embedding is adapted: it is frozen."""
    if not all(t.place.part in ("weight", "bias") for t in module.tensors):
        return False
    names = saved if isinstance(saved, list | tuple) else ()
    return not any(str(name) in module.place.module.split(".") for name in names)


def _tail(path: Sequence[str]) -> Sequence[str]:
    start = next((i for i, part in enumerate(path) if part in ("experts", "expert")), len(path))
    return path[start + 1 :]


def modules_untouched(evidence: Evidence) -> Verdicts:
    """Modules that did not change while others did."""
    change = evidence.change
    if change is None or not change.modules:
        return
    # Untouched experts held in one tensor are lora-b-zero's where they are zeros; VeRA's frozen A and B are no module.
    idle = [m for m in change.modules if _idle(m) and not (m.dead and _all_experts_at_once(m))]
    saved = change.after.config.get("modules_to_save") or ()
    idle = [m for m in idle if not all(t.place.frozen for t in m.tensors) and not _base_weight(m, saved)]
    if change.after.empty or not idle or len(idle) == len(change.modules):
        return  # none, or all: weights-unchanged and lora-b-zero say so
    required = [m for m in idle if not m.place.optional or _all_experts_at_once(m)]
    concerned = required or idle
    kinds = _count(m.place.kind for m in concerned)
    still = [
        layer for layer in _layers(change.modules) if layer not in _layers(m for m in change.modules if not _idle(m))
    ]
    told = ["by kind: " + ", ".join(f"{shown(k)} {n} of {_total(change, k)}" for k, n in kinds[:8])]
    if still:
        told.append(f"whole layers: {', '.join(still[:12])}" + (", …" if len(still) > 12 else ""))
    yield Finding(
        id="modules-untouched",
        severity=Severity.WARNING if required else Severity.NOTE,
        statement=f"{len(concerned)} of {len(change.modules)} adapted modules did not change",
        evidence=tuple(told),
        cause=(
            "no gradient reached them: not in the optimizer, frozen, or bypassed in the forward that the loss sees"
            if required
            else "no token was routed to these experts, or the batch had no input for this tower"
        ),
        next_step=(
            "compare the optimizer's parameters with the adapter's" if required else "nothing, where that is so"
        ),
        data={"untouched": len(concerned), "modules": len(change.modules), "optional": not required},
    )


def step_too_large(evidence: Evidence) -> Verdicts:
    """An element that moved further than AdamW can move it at this learning rate."""
    change, metrics = evidence.change, evidence.metrics
    if change is None or not change.compared or not change.moved:
        return
    rates = [evidence.request.training.learning_rate or 0.0]
    steps = evidence.request.training.steps_per_batch or 0
    if metrics is not None:
        rates += [s.values["learning_rate"] for s in metrics.steps if s.values.get("learning_rate", 0) > 0]
        steps = len(metrics.steps)
        if metrics.batching == "unknown":
            steps = max(step.number for step in metrics.steps)  # a log may leave steps out
    rate = max(rates)
    if not rate > 0 or steps < 1:
        yield NotJudged("step-too-large", "the learning rate or the number of steps is unknown; --config can name them")
        return
    furthest, excess = None, 1.0
    for tensor in change.compared:
        stored = change.after.tensors[tensor.key].dtype
        rounding = 0.0 if stored in ("F32", "F64") else _HALF_ULP * tensor.max_abs_after
        bound = _SLACK * steps * (rate * _ADAM_STEP + rounding + rate * 0.01 * tensor.max_abs_after)
        if (tensor.max_abs_delta or 0.0) > excess * bound:
            furthest, excess = tensor, (tensor.max_abs_delta or 0.0) / bound
    if furthest is None:
        return
    yield Finding(
        id="step-too-large",
        severity=Severity.WARNING,
        statement=(f"an element moved by {furthest.max_abs_delta:.3g}, {excess:.3g} times as far as AdamW can move it"),
        evidence=(
            f"{shown(furthest.key)}: max |delta| {furthest.max_abs_delta:.4g}",
            (f"{steps} step(s) at learning rate {rate:g} bound it by {(furthest.max_abs_delta or 0.0) / excess:.3g}"),
        ),
        cause=(
            "more steps were taken than reported, at a higher rate, with another optimizer, or 'before' is"
            " not the start"
        ),
        next_step=("count the optimizer's steps and check its learning rate; name the right start with --before"),
        data={
            "max_abs_delta": furthest.max_abs_delta,
            "excess": excess,
            "steps": steps,
            "learning_rate": rate,
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
        next_step="check STEP-8 (clipping), the learning rate, and the ratio over the steps",
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


def _idle(module: ModuleChange) -> bool:
    """Unchanged where that can be seen; a lora_B of zeros does nothing whatever its lora_A did."""
    if any(t.place.starts_at_zero and t.zero_after and not t.moved for t in module.tensors):
        return True
    compared = [t for t in module.tensors if t.changed is not None]
    return bool(compared) and len(compared) == len(module.tensors) and not module.moved


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


def _count(names: Iterable[str]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return sorted(counts.items(), key=lambda item: -item[1])


def _layers(modules: Iterable[ModuleChange]) -> list[str]:
    """Every layer that one of the modules is in, once."""
    places = [m.place for m in modules if m.place.layer is not None]
    return list(dict.fromkeys(f"{shown(place.stack)}.{place.layer}" for place in places))


def _total(change: AdapterChange, kind: str) -> int:
    return sum(module.place.kind == kind for module in change.modules)


CHECKS = (
    Check("weights-unchanged", "no tensor changed", weights_unchanged),
    Check("tensor-nonfinite", "NaN or infinity in the adapter", tensor_nonfinite),
    Check("tensor-mismatch", "other keys or shapes after than before", tensor_mismatch),
    Check("dtype-changed", "another dtype after than before", dtype_changed),
    Check("lora-b-zero", "every lora_B is still zero", lora_b_zero),
    Check("modules-untouched", "modules that did not change while others did", modules_untouched),
    Check("step-too-large", "an element moved further than AdamW can move it", step_too_large),
    Check("norm-explosion", "tensors that grew out of proportion", norm_explosion),
)
