"""The adapter's config against its own tensors, and against the config from before the run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sdpo_conformance.audit.adapter import Adapter
from sdpo_conformance.audit.errors import shown
from sdpo_conformance.audit.findings.base_model import other_base
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, Severity, Verdicts
from sdpo_conformance.audit.header import TensorEntry
from sdpo_conformance.audit.names import place_of, shared_rank

_SHOWN = 5
#: Modules that come together in every architecture that has one of them under this name.
_SIBLINGS = (frozenset(("q_proj", "k_proj", "v_proj")), frozenset(("gate_proj", "up_proj", "down_proj")))
#: PEFT adds these to modules_to_save for classification, whichever of them the model has.
_HEADS = ("classifier", "score")
#: Of kinds besides LoRA, the part of which one dimension is the rank.
_RANKED = {"LOHA": "hada_w1_b", "VERA": "vera_lambda_d"}


def config_mismatch(evidence: Evidence) -> Verdicts:
    """A config that does not describe the tensors beside it."""
    change = evidence.change
    if change is None or not change.after.config or change.after.empty:
        return
    adapter = change.after
    kind = str(adapter.config.get("peft_type", "LORA")).upper()
    if kind not in ("LORA", *_RANKED):
        return
    ranks = _wrong_ranks(adapter) if kind == "LORA" else _wrong_sizes(adapter, _RANKED[kind])
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
    if kind == "LORA":
        yield from _magnitudes_lost(adapter)
        yield from _not_targeted(change.before, adapter)
    told = [*(_targets(adapter) if kind == "LORA" else ()), *_saved_modules(adapter)]
    if told:
        yield Finding(
            id="config-mismatch",
            severity=Severity.WARNING,
            statement="adapter_config.json names other modules than the tensors beside it",
            evidence=tuple(told[:_SHOWN]),
            cause="tensors lost in saving, or the config of another adapter",
            next_step="compare the config with the one that was trained; a loader fills what is missing with its start",
        )


def _magnitudes_lost(adapter: Adapter) -> Verdicts:
    """DoRA without its magnitudes. PEFT saves a ``lora_magnitude_vector`` for each module that has a pair."""
    parts = [place_of(key).part for key in adapter.tensors]
    pairs = parts.count("B")
    if "peft_type" not in adapter.config or not adapter.config.get("use_dora") or "magnitude" in parts or not pairs:
        return
    yield Finding(
        id="config-mismatch",
        severity=Severity.ERROR,
        statement=f"adapter_config.json says use_dora, and none of {pairs} modules has a magnitude",
        evidence=("no tensor is a lora_magnitude_vector",),
        cause="magnitudes lost in saving, or the config of another adapter",
        next_step="save again from the PEFT model: a loader takes the norms of the base, not what was trained",
        data={"modules": pairs},
    )


def _wrong_ranks(adapter: Adapter) -> list[str]:
    rank = adapter.config.get("r")
    patterns = adapter.config.get("rank_pattern")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        return []
    wrong = []
    modules: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in adapter.tensors.items():
        place = place_of(key)
        if place.part in ("A", "B"):
            modules.setdefault(place.module, {})[place.part] = entry
    for module, parts in modules.items():
        if len(parts) < 2:
            continue
        a, b = parts["A"].shape, parts["B"].shape
        expected = _rank_of(module, rank, patterns)
        common = shared_rank(parts["A"].name, a, b)
        if not common or expected in common:
            continue  # no rank in common: pair-lost says so
        several = "expert" in module or adapter.config.get("target_parameters")
        if several and any(size % expected == 0 for size in common):
            continue  # PEFT holds the experts' matrices of one layer side by side
        wrong.append(f"{shown(module)}: rank {expected} in the config, tensors {list(a)}, {list(b)}")
    return wrong


def _wrong_sizes(adapter: Adapter, part: str) -> list[str]:
    rank = adapter.config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        return []
    found = [(place_of(key), entry.shape) for key, entry in adapter.tensors.items()]
    return [
        f"{shown(place.module)}: rank {expected} in the config, {part} {list(shape)}"
        for place, shape in found
        if place.part == part
        and (expected := _rank_of(place.module, rank, adapter.config.get("rank_pattern"))) not in shape
    ]


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


def _not_targeted(before: Adapter | None, adapter: Adapter) -> Verdicts:
    """Tensors of modules that the config does not target: a loader drops them."""
    targets = adapter.config.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets) or not targets:
        return
    if adapter.config.get("target_parameters") or any("*" in t or "\\" in t or "all-linear" in t for t in targets):
        return
    places = [place_of(key) for key in adapter.tensors]
    modules = {p.module for p in places if p.part in ("A", "B") and not p.grouped}
    left = sorted(m for m in modules if not any(m == t or m.endswith(f".{t}") for t in targets))
    if not left or len(left) == len(modules):
        return  # all of them: names of another kind of model
    old = before.config.get("target_modules") if before is not None else None
    named = isinstance(old, list) and all(any(m.endswith(f".{t}") for t in old) for m in left)
    kinds = sorted({m.rsplit(".", 1)[-1] for m in left})
    yield Finding(
        id="config-mismatch",
        severity=Severity.ERROR if named else Severity.WARNING,
        statement=f"adapter_config.json does not target {len(left)} module(s) of which there are tensors",
        evidence=(f"not in target_modules: {', '.join(map(shown, kinds[:_SHOWN]))}",)
        + (("the config before the run targets them",) if named else ()),
        cause="the config of another adapter, or targets lost in saving: a loader drops what it does not target",
        next_step="put the targets that were trained into adapter_config.json",
        data={"modules": len(left)},
    )


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
    if change.converted and change.before.scale == change.after.scale:
        grave = [text for text in grave if text.split(" ", 1)[0] not in ("lora_alpha", "r")]
    base_severity = other_base(old.get("base_model_name_or_path"), new.get("base_model_name_or_path"))
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


CHECKS = (
    Check("config-mismatch", "a config that does not describe its tensors", config_mismatch),
    Check("config-changed", "another scale or base model after than before", config_changed),
)
