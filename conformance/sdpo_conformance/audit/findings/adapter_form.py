"""The adapter as an adapter: its tensors against each other, and as names that a loader looks for."""

from __future__ import annotations

from collections.abc import Sequence

from sdpo_conformance.audit.adapter import Adapter
from sdpo_conformance.audit.errors import shown
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, Severity, Verdicts
from sdpo_conformance.audit.header import TensorEntry
from sdpo_conformance.audit.names import WRAPPED_BY, holds_adapter_name, place_of, shared_rank

_SHOWN = 5
#: What PEFT puts before every name of an adapter that it saves.
_PEFT_PREFIX = "base_model."


def tensor_empty(evidence: Evidence) -> Verdicts:
    """Tensors without a single element."""
    change = evidence.change
    if change is None:
        return
    for when, adapter in (("after", change.after), ("before", change.before)):
        if adapter is not None and not adapter.fresh and not adapter.tensors:
            yield Finding(
                id="tensor-empty",
                severity=Severity.ERROR,
                statement=f"the adapter {when} the run holds no tensors at all",
                evidence=(f"{shown(adapter.weights)} is a header without data",),
                cause="the save gathered no state: another rank's, a wrapper's, or names that its filter did not know",
                next_step="save again from the unwrapped PEFT model, with the state gathered; nothing is in this file",
                data={"empty": 0, "when": when},
            )
            return
        if adapter is None or not adapter.empty:
            continue
        yield Finding(
            id="tensor-empty",
            severity=Severity.ERROR,
            statement=f"{len(adapter.empty)} of {len(adapter.tensors)} tensors {when} the run are empty (size 0)",
            evidence=tuple(f"{shown(k)}: shape {list(adapter.tensors[k].shape)}" for k in adapter.empty[:_SHOWN]),
            cause="saved under DeepSpeed ZeRO-3 without gathering: a rank holds size-0 placeholders of parameters",
            next_step=(
                "set stage3_gather_16bit_weights_on_model_save, or save inside"
                " deepspeed.zero.GatheredParameters; the weights are not in this file"
            ),
            data={"empty": len(adapter.empty), "when": when},
        )
        return


def wrapper_prefix(evidence: Evidence) -> Verdicts:
    """Names that carry a wrapper's part, or lost the prefix that they had."""
    change = evidence.change
    if change is None:
        return
    if change.after.wrappers:
        same = change.before is not None and set(change.after.wrappers) <= set(change.before.wrappers)
        names = sorted(change.after.wrappers)
        whose = ", ".join(f"{name} ({WRAPPED_BY[name]})" for name in names)
        example = next(e.name for e in change.after.tensors.values() if any(n in e.name.split(".") for n in names))
        yield Finding(
            id="wrapper-prefix",
            severity=Severity.WARNING if same else Severity.ERROR,
            statement=f"the finished adapter's names carry a wrapper's prefix: {whose}",
            evidence=(f"{sum(change.after.wrappers.values())} names, such as {shown(example)}",),
            cause="the wrapped module's state was saved in place of the model's inside it",
            next_step=(
                "unwrap the model before saving, or take the prefix out of the names: PEFT and vLLM find no module of"
                " this name and load nothing"
            ),
            data={"wrappers": names},
        )
    if change.renamed:
        yield Finding(
            id="wrapper-prefix",
            severity=Severity.WARNING,
            statement=f"the prefix of the adapters' names changed, {shown(change.renamed)}, and nothing else of them",
            evidence=(f"after the run: {shown(next(iter(change.after.tensors.values())).name)}",),
            cause="saved from another level of the model than it was loaded at; a loader may find no module",
            next_step="save under the names that the adapter was loaded with (PEFT: base_model.model.…)",
            data={"prefix": change.renamed},
        )
    elif _lost_prefix(change.before, change.after):
        yield Finding(
            id="wrapper-prefix",
            severity=Severity.WARNING,
            statement=f"the names lack the prefix {_PEFT_PREFIX}model that PEFT gives to every adapter it saves",
            evidence=(f"such as {shown(next(iter(change.after.tensors.values())).name)}",),
            cause="the inner model's state was saved in place of the PEFT model's",
            next_step="save with the PEFT model's save_pretrained: PEFT finds no module of these names, and loads none",
            data={"prefix": _PEFT_PREFIX},
        )


def _lost_prefix(before: Adapter | None, after: Adapter) -> bool:
    """A PEFT config beside LoRA names of PEFT's spelling without PEFT's prefix, and no adapter from before the run
    whose names are the same: one that was loaded under these names can be loaded again.
    """
    if "peft_type" not in after.config or after.wrappers or (before is not None and not before.fresh):
        return False
    names = [entry.name for entry in after.tensors.values()]
    return all(".lora_" in name and not name.startswith(_PEFT_PREFIX) for name in names) and any(
        name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names
    )


def pair_lost(evidence: Evidence) -> Verdicts:
    """A lora_A without its lora_B, or the reverse, and pairs whose ranks do not meet."""
    change = evidence.change
    if change is None:
        return
    for when, adapter in (("after", change.after), ("before", change.before)):
        if adapter is None or adapter.fresh:
            continue
        lonely, unequal = _pairs(adapter)
        if when == "after" and change.shape_mismatch:
            unequal = []  # tensor-mismatch names the shapes that it had before
        if not lonely and not unequal:
            continue
        yield Finding(
            id="pair-lost",
            severity=Severity.ERROR,
            statement=(
                f"{len(lonely)} module(s) {when} the run have one of lora_A and lora_B without the other"
                if lonely
                else f"lora_A and lora_B of {len(unequal)} module(s) {when} the run have no rank in common"
            ),
            evidence=tuple((lonely or unequal)[:_SHOWN]),
            cause=(
                "a save that dropped tensors (a shard, a filter of names), or files of different adapters"
                if lonely
                else "one rank's shard of the adapter, saved without gathering, or files of different adapters"
            ),
            next_step="save again with every tensor; a loader fills the missing one with its start, without a word",
            data={"modules": len(lonely or unequal)},
        )
        return


def _pairs(adapter: Adapter) -> tuple[list[str], list[str]]:
    modules: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in adapter.tensors.items():
        place = place_of(key)
        if place.part in ("A", "B"):
            modules.setdefault(place.module, {})[place.part] = entry
    lonely, unequal = [], []
    for module, parts in modules.items():
        if len(parts) == 1:
            have = next(iter(parts))
            lonely.append(f"{shown(module)}: lora_{have} alone")
            continue
        a, b = parts["A"].shape, parts["B"].shape
        if all(a) and all(b) and not shared_rank(parts["A"].name, a, b):
            unequal.append(f"{shown(module)}: lora_A {list(a)}, lora_B {list(b)}")
    return lonely, unequal


def checkpoints_identical(evidence: Evidence) -> Verdicts:
    """Two checkpoints of one run that are equal to the last bit."""
    pairs: Sequence[tuple[str, str]] = evidence.identical_checkpoints
    if not pairs:
        return
    yield Finding(
        id="checkpoints-identical",
        severity=Severity.ERROR,
        statement=f"the adapters of {shown(pairs[0][0])} and {shown(pairs[0][1])} are bit-identical",
        evidence=tuple(f"{shown(a)} and {shown(b)} hold the same bytes" for a, b in pairs[:_SHOWN]),
        cause=(
            "nothing was trained between them, each save writes the same stale copy of the adapter, or the run began"
            " again from where it had been"
        ),
        next_step="check that the optimizer holds the adapter's parameters and that the save takes the live ones",
        data={"pairs": [list(pair) for pair in pairs[:100]]},
    )


def adapter_name_in_keys(evidence: Evidence) -> Verdicts:
    """Names that hold the adapter's own name, as in memory: PEFT puts it in itself, and finds none of them."""
    change = evidence.change
    if change is None or not change.after.config or "peft_type" not in change.after.config:
        return
    named = [entry.name for entry in change.after.tensors.values() if holds_adapter_name(entry.name)]
    if not named or len(named) != sum(".lora_" in entry.name for entry in change.after.tensors.values()):
        return
    before = change.before.tensors.values() if change.before is not None else ()
    lost = bool(before) and not any(holds_adapter_name(entry.name) for entry in before)
    yield Finding(
        id="adapter-name-in-keys",
        severity=Severity.ERROR if lost else Severity.WARNING,
        statement=f"{len(named)} tensors are saved under the names of the live model, with the adapter's own in them",
        evidence=(shown(named[0]), *(("before the run they were not",) if lost else ())),
        cause="the state dict was saved as it is in memory, not through PEFT's get_peft_model_state_dict",
        next_step="take the adapter's name out of the keys: PEFT adds it when it loads, and only warns of keys missed",
        data={"tensors": len(named)},
    )


CHECKS = (
    Check("adapter-name-in-keys", "names as in memory, which PEFT does not find", adapter_name_in_keys),
    Check("tensor-empty", "tensors without elements", tensor_empty),
    Check("wrapper-prefix", "names that carry a wrapper's prefix, or lost one", wrapper_prefix),
    Check("pair-lost", "lora_A without lora_B, or the reverse", pair_lost),
    Check("checkpoints-identical", "checkpoints equal to the last bit", checkpoints_identical),
)
