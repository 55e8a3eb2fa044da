"""The adapter as an adapter: its tensors against its own config, against each other, and as names to load."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sdpo_conformance.audit.adapter import Adapter
from sdpo_conformance.audit.errors import shown
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, Severity, Verdicts
from sdpo_conformance.audit.names import WRAPPED_BY, TensorPlace, place_of

_SHOWN = 5
#: Modules that come together in every architecture that has one of them under this name.
_SIBLINGS = (frozenset(("q_proj", "k_proj", "v_proj")), frozenset(("gate_proj", "up_proj", "down_proj")))
#: PEFT adds these to modules_to_save for classification, whichever of them the model has.
_HEADS = ("classifier", "score")


def tensor_empty(evidence: Evidence) -> Verdicts:
    """Tensors without a single element."""
    change = evidence.change
    if change is None:
        return
    for when, adapter in (("after", change.after), ("before", change.before)):
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
            statement=f"the adapters' names differ by the prefix {shown(change.renamed)!r}, and by nothing else",
            evidence=(f"after the run: {shown(next(iter(change.after.tensors.values())).name)}",),
            cause="saved from another level of the model than it was loaded at; a loader may find no module",
            next_step="save under the names that the adapter was loaded with (PEFT: base_model.model.…)",
            data={"prefix": change.renamed},
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
            cause="a save that dropped tensors (a shard, a filter of names), or files of different adapters",
            next_step="save again with every tensor; a loader fills the missing one with its start, without a word",
            data={"modules": len(lonely or unequal)},
        )
        return


def _pairs(adapter: Adapter) -> tuple[list[str], list[str]]:
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, entry in adapter.tensors.items():
        place = place_of(key)
        if place.part in ("A", "B"):
            modules.setdefault(place.module, {})[place.part] = entry.shape
    lonely, unequal = [], []
    for module, parts in modules.items():
        if len(parts) == 1:
            have = next(iter(parts))
            lonely.append(f"{shown(module)}: lora_{have} alone")
        elif all(parts["A"]) and all(parts["B"]) and not set(parts["A"]) & set(parts["B"]):
            unequal.append(f"{shown(module)}: lora_A {list(parts['A'])}, lora_B {list(parts['B'])}")
    return lonely, unequal


def config_mismatch(evidence: Evidence) -> Verdicts:
    """A config that does not describe the tensors beside it."""
    change = evidence.change
    if change is None or not change.after.config or change.after.empty:
        return
    adapter = change.after
    if str(adapter.config.get("peft_type", "LORA")).upper() != "LORA":
        return
    ranks = _wrong_ranks(adapter)
    if ranks:
        yield Finding(
            id="config-mismatch",
            severity=Severity.ERROR,
            statement=f"adapter_config.json and the tensors disagree about the rank of {len(ranks)} module(s)",
            evidence=tuple(ranks[:_SHOWN]),
            cause="the config of another adapter, or a rank that was changed in one place only",
            next_step="put the config that was trained with beside the tensors: alpha / r scales every update",
            data={"modules": len(ranks)},
        )
    told = [*_targets(adapter), *_saved_modules(adapter)]
    if told:
        yield Finding(
            id="config-mismatch",
            severity=Severity.WARNING,
            statement="adapter_config.json names other modules than the tensors beside it",
            evidence=tuple(told[:_SHOWN]),
            cause="tensors lost in saving, or the config of another adapter",
            next_step="compare the config with the one that was trained; a loader fills what is missing with its start",
        )


def _wrong_ranks(adapter: Adapter) -> list[str]:
    rank = adapter.config.get("r")
    patterns = adapter.config.get("rank_pattern")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        return []
    wrong = []
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    places: dict[str, TensorPlace] = {}
    for key, entry in adapter.tensors.items():
        place = place_of(key)
        if place.part in ("A", "B"):
            modules.setdefault(place.module, {})[place.part] = entry.shape
            places[place.module] = place
    for module, parts in modules.items():
        if len(parts) < 2 or min(map(len, parts.values())) < 2:
            continue
        expected = _rank_of(module, rank, patterns)
        common = set(parts["A"]) & set(parts["B"])
        if not common or expected in common:
            continue
        several = "expert" in module or adapter.config.get("target_parameters")
        if several and any(size % expected == 0 for size in common):
            continue  # PEFT holds the experts' matrices of one layer side by side
        wrong.append(f"{shown(module)}: rank {expected} in the config, tensors {list(parts['A'])}, {list(parts['B'])}")
    return wrong


def _rank_of(module: str, rank: int, patterns: Any) -> int:
    """The rank that PEFT takes for a module: the first pattern that matches its whole name or its end."""
    if isinstance(patterns, Mapping):
        for pattern, value in patterns.items():
            if isinstance(value, int) and value > 0 and _ends_with(module, str(pattern)):
                return value
    return rank


def _ends_with(module: str, pattern: str) -> bool:
    if module == pattern or module.endswith(f".{pattern}"):
        return True
    if len(pattern) > 200 or re.search(r"[)\]*+?}][*+?{]", pattern):
        return False  # nested repeats can take for ever on a name
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except re.error:
        return False


def _targets(adapter: Adapter) -> list[str]:
    targets = adapter.config.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        return []
    places = [place_of(key) for key in adapter.tensors]
    have = {p.module.rsplit(".", 1)[-1] for p in places if p.part in ("A", "B")}
    lost = sorted(
        {t for t in targets for group in _SIBLINGS if t in group and t not in have and have & group and "." not in t}
    )
    return [f"target_modules names {shown(name)}, of which there is no tensor" for name in lost]


def _saved_modules(adapter: Adapter) -> list[str]:
    names = adapter.config.get("modules_to_save")
    if not isinstance(names, list):
        return []
    keys = [entry.name for entry in adapter.tensors.values()]
    return [
        f"modules_to_save names {shown(name)}, of which there is no tensor"
        for name in names
        if isinstance(name, str) and name not in _HEADS and not any(f".{name}." in f".{key}" for key in keys)
    ]


def config_changed(evidence: Evidence) -> Verdicts:
    """A config after the run that scales or places the adapter otherwise than the one before it."""
    change = evidence.change
    if change is None or change.before is None or not change.before.config or not change.after.config:
        return
    old, new = change.before.config, change.after.config
    grave = [
        _said(name, old, new)
        for name in ("lora_alpha", "use_rslora", "use_dora", "peft_type", "fan_in_fan_out", "alpha_pattern")
        if _differs(old.get(name), new.get(name), name)
    ]
    if _differs(old.get("r"), new.get("r"), "r"):
        grave.append(_said("r", old, new))
    base_severity = _other_base(old.get("base_model_name_or_path"), new.get("base_model_name_or_path"))
    if grave:
        scales = [s for s in (change.before.scale, change.after.scale) if s is not None]
        yield Finding(
            id="config-changed",
            severity=Severity.ERROR,
            statement="adapter_config.json changed over the run: " + "; ".join(grave),
            evidence=(f"B A is scaled by {scales[0]:.4g} before, {scales[1]:.4g} after",) if len(scales) == 2 else (),
            cause="the finished adapter was saved with another config than it was trained with",
            next_step="put the config from before the run beside the finished tensors, or train with the new one",
            data={"fields": [text.split(" ", 1)[0] for text in grave]},
        )
    if base_severity is not None:
        yield Finding(
            id="config-changed",
            severity=base_severity,
            statement=f"another base model after the run: {_said('base_model_name_or_path', old, new)}",
            evidence=(),
            cause="the adapter was trained on one model and is labelled for another",
            next_step="check which model the run trained on; an adapter fits its own base alone",
        )


def _differs(old: Any, new: Any, name: str) -> bool:
    """Whether both say something and not the same. A switch that one config leaves out is off."""
    if name in ("use_rslora", "use_dora", "fan_in_fan_out"):
        return bool(old) != bool(new)
    if name == "alpha_pattern":
        return bool(old or {}) != bool(new or {}) or (old or {}) != (new or {})
    return old is not None and new is not None and old != new


def _said(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    return f"{name} {shown(repr(old.get(name)))} to {shown(repr(new.get(name)))}"


def _other_base(old: Any, new: Any) -> Severity | None:
    """How sure it is that two names are of different models: a path and a hub's name may be the same one."""
    if not isinstance(old, str) or not isinstance(new, str) or not old or not new:
        return None
    one, two = (text.rstrip("/").replace("\\", "/").rsplit("/", 1)[-1].lower() for text in (old, new))
    if one == two or one.startswith(two) or two.startswith(one):
        return None
    if any("snapshots/" in text or re.fullmatch(r"[0-9a-f]{12,}", text.rsplit("/", 1)[-1]) for text in (old, new)):
        return None
    local = [text.startswith(("/", ".", "~")) or text.count("/") > 1 for text in (old, new)]
    return Severity.WARNING if any(local) else Severity.ERROR


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
        cause="nothing was trained between them, or each save writes the same stale copy of the adapter",
        next_step="check that the optimizer holds the adapter's parameters and that the save takes the live ones",
        data={"pairs": [list(pair) for pair in pairs[:100]]},
    )


CHECKS = (
    Check("tensor-empty", "tensors without elements", tensor_empty),
    Check("wrapper-prefix", "names that carry a wrapper's prefix, or lost one", wrapper_prefix),
    Check("pair-lost", "lora_A without lora_B, or the reverse", pair_lost),
    Check("config-mismatch", "a config that does not describe its tensors", config_mismatch),
    Check("config-changed", "another scale or base model after than before", config_changed),
    Check("checkpoints-identical", "checkpoints equal to the last bit", checkpoints_identical),
)
