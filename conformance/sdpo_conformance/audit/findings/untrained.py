"""Parts of the adapter that were not trained: still at the zeros they start from, or left as they were."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from sdpo_conformance.audit.adapter_change import AdapterChange, ModuleChange
from sdpo_conformance.audit.errors import shown
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, Severity, Verdicts

_SHOWN = 5


def lora_b_zero(evidence: Evidence) -> Verdicts:
    """What an untrained adapter has at zero is still zero: everywhere, or in all experts held together."""
    change = evidence.change
    if change is None or change.after.empty:
        return
    able = [m for m in change.modules if any(t.place.factor for t in m.tensors)]
    dead = [m for m in able if m.dead]
    parts = sorted({t.place.part for m in dead for t in m.tensors if t.place.factor and t.zero_after})
    name = "lora_B" if parts == ["B"] else " and ".join("lora_B" if part == "B" else part for part in parts)
    if dead and len(dead) == len(able):
        yield Finding(
            id="lora-b-zero",
            severity=Severity.ERROR,
            statement=f"all {len(dead)} {shown(name)} are still zero: the adapter changes nothing",
            evidence=(f"{change.moved} of {len(change.compared)} tensors changed, no {shown(name)} among them",),
            cause=f"no gradient reached {shown(name)}; moving lora_A can be weight decay alone",
            next_step=("check that the loss has a gradient and that the step runs with the adapter enabled"),
        )
        return
    experts = [m for m in dead if _all_experts_at_once(m)] or _whole_layers(change.modules, dead)
    if not experts:
        return
    kinds = _count(m.place.kind for m in experts)
    yield Finding(
        id="lora-b-zero",
        severity=Severity.ERROR,
        statement=f"the lora_B of the experts is still zero in {len(experts)} module(s): expert LoRA was never trained",
        evidence=tuple(f"{shown(kind)}: {n} of {_total(change, kind)} modules" for kind, n in kinds[:_SHOWN]),
        cause=(
            "the experts' tensors get no gradient: every token goes to some expert, so that zeros for all of a layer's"
            " at once are no matter of routing"
        ),
        next_step="check that the experts' kernel is differentiated with respect to its LoRA tensors, and train again",
        data={"modules": len(experts)},
    )


def _all_experts_at_once(module: ModuleChange) -> bool:
    """One tensor for every expert of a layer: "no token was routed" cannot explain zeros in the whole of it."""
    if module.place.tower:
        return False
    if module.place.grouped:
        return "expert" in module.place.module
    path = module.place.module.split(".")
    return any(part in ("experts", "expert") for part in path) and not any(part.isdigit() for part in _tail(path))


def _whole_layers(modules: Sequence[ModuleChange], idle: Sequence[ModuleChange]) -> list[ModuleChange]:
    """Idle experts in tensors of their own, where not one expert of their layer moved: each token goes to some."""
    all_of: dict[tuple[str, int | None, str], int] = defaultdict(int)
    idle_of: dict[tuple[str, int | None, str], list[ModuleChange]] = defaultdict(list)
    for module in modules:
        if module.place.expert and not module.place.tower:
            all_of[module.place.stack, module.place.layer, module.place.kind] += 1
    for module in idle:
        if module.place.expert and not module.place.tower:
            idle_of[module.place.stack, module.place.layer, module.place.kind].append(module)
    return [m for where, found in idle_of.items() if len(found) == all_of[where] > 1 for m in found]


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
    # Untouched experts of a whole layer are lora-b-zero's where they are zeros; VeRA's frozen A and B are no module.
    saved = change.after.config.get("modules_to_save") or ()
    # A module that AdaLoRA has pruned to rank 0 has nothing that could move.
    held = [m for m in change.modules if any(t.numel for t in m.tensors)]
    able = [m for m in held if not all(t.place.frozen for t in m.tensors) and not _base_weight(m, saved)]
    idle = [m for m in able if _idle(m)]
    whole = {m.place.module for m in _whole_layers(able, idle)}
    whole |= {m.place.module for m in idle if _all_experts_at_once(m)}
    idle = [m for m in idle if not (m.dead and m.place.module in whole)]
    if change.after.empty or not idle or len(idle) == len(able):
        return  # none, or all: weights-unchanged and lora-b-zero say so
    required = [m for m in idle if not m.place.optional or m.place.module in whole]
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


def _idle(module: ModuleChange) -> bool:
    """Unchanged where that can be seen; a lora_B of zeros does nothing whatever its lora_A did."""
    if any(t.place.factor and t.zero_after and not t.moved for t in module.tensors):
        return True
    compared = [t for t in module.tensors if t.changed is not None]
    return bool(compared) and len(compared) == len(module.tensors) and not module.moved


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
    Check("lora-b-zero", "every lora_B is still zero", lora_b_zero),
    Check("modules-untouched", "modules that did not change while others did", modules_untouched),
)
