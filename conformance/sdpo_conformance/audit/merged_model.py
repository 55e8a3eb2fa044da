"""A merged model beside its base and the adapter: how often the adapter went into it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdpo_conformance.audit.adapter import Adapter, TensorReader, blocks, open_adapter
from sdpo_conformance.audit.checkpoints import holds_weights
from sdpo_conformance.audit.errors import AuditError
from sdpo_conformance.audit.header import SPACING, TensorEntry
from sdpo_conformance.audit.names import place_of

if TYPE_CHECKING:
    import torch

_MERGED = re.compile(r"(.*[_-])?(merged|export|exported|fused)([_-].*)?", re.IGNORECASE)
_BASE = re.compile(r"(.*[_-])?(base|base_model|pretrained)", re.IGNORECASE)
#: A LoRA matrix larger than this is not multiplied out.
_LARGEST_FACTOR = 2**24
#: Modules that are looked at, spread over the model.
_MOST_MODULES = 8


@dataclass(frozen=True)
class MergedModel:
    """merged - base, as `factor` times B A by least squares, over `modules` modules. `update` is the norm of B A,
    `aside` that of what is no multiple of it, and `rounding` what the merged model's dtype may add.
    """

    merged: str
    base: str
    modules: int
    factor: float
    update: float
    aside: float
    rounding: float
    equal: bool


def find_merged(run: Path | None, adapter: Adapter | None) -> MergedModel | None:
    """Compare the one merged model in a run's folder with the one base model there; None where there is no such pair,
    or nothing of the adapter is a plain LoRA pair on a weight that both have in floating point.
    """
    if run is None or not run.is_dir() or adapter is None or adapter.fresh:
        return None
    models = [entry for entry in sorted(run.iterdir()) if entry.is_dir() and _is_model(entry)]
    merged = [entry for entry in models if _MERGED.fullmatch(entry.name)]
    named = str(adapter.config.get("base_model_name_or_path") or "").rstrip("/").rsplit("/", 1)[-1]
    base = [entry for entry in models if entry.name == named] or [e for e in models if _BASE.fullmatch(e.name)]
    if len(merged) != 1 or len(base) != 1 or merged == base:
        return None
    try:
        return _compare(open_adapter(merged[0]), open_adapter(base[0]), adapter)
    except AuditError:
        return None


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not holds_weights(folder) and any(folder.glob("*.safetensors"))


def _compare(merged: Adapter, base: Adapter, adapter: Adapter) -> MergedModel | None:
    """Both models are read as adapters are: a folder's .safetensors, block by block."""
    pairs = [pair for pair in _pairs(adapter) if _weight(pair[0], merged, base, adapter.tensors, pair[1:])]
    pairs = pairs[:: max(1, len(pairs) // _MOST_MODULES)][:_MOST_MODULES]
    if not pairs:
        return None
    readers = [TensorReader(one) for one in (merged, base, adapter)]
    along = update = whole = rounding = 0.0
    try:
        for module, a_key, b_key in pairs:
            key = f"{module}.weight"
            a, b = readers[2].whole(a_key).double(), readers[2].whole(b_key).double()
            spacing = SPACING[merged.tensors[key].dtype]
            for rows, columns in blocks(merged.tensors[key].shape):
                now: torch.Tensor = readers[0].block(key, (rows, columns)).double()
                delta = now - readers[1].block(key, (rows, columns)).double()
                product = b[rows] @ a[:, columns]
                along += float((delta * product).sum())
                update += float(product.square().sum())
                whole += float(delta.square().sum())
                rounding += float((spacing * now).square().sum()) / 4
    finally:
        for reader in readers:
            reader.close()
    if not update > 0 or not math.isfinite(along + update + whole + rounding):
        return None
    aside = math.sqrt(max(whole - along**2 / update, 0.0))
    return MergedModel(
        merged=merged.path.name,
        base=base.path.name,
        modules=len(pairs),
        factor=along / update,
        update=math.sqrt(update),
        aside=aside,
        rounding=math.sqrt(rounding),
        equal=whole == 0,
    )


def _pairs(adapter: Adapter) -> list[tuple[str, str, str]]:
    """Each module with the keys of its lora_A and lora_B."""
    parts: dict[str, dict[str, str]] = {}
    for key in adapter.tensors:
        place = place_of(key)
        parts.setdefault(place.module, {})[place.part] = key
    return [(module, found["A"], found["B"]) for module, found in parts.items() if set(found) == {"A", "B"}]


def _weight(
    module: str, merged: Adapter, base: Adapter, pair: Mapping[str, TensorEntry], keys: tuple[str, ...]
) -> bool:
    """Whether both models have the module's weight in floating point, [out, in] of a pair [r, in] and [out, r]."""
    one, two = merged.tensors.get(f"{module}.weight"), base.tensors.get(f"{module}.weight")
    a, b = (pair[key].shape for key in keys)
    if one is None or two is None or one.shape != two.shape or one.dtype not in SPACING or two.dtype not in SPACING:
        return False
    if max(pair[key].numel for key in keys) > _LARGEST_FACTOR:
        return False
    return len(a) == len(b) == 2 and a[0] == b[1] and one.shape == (b[0], a[1])
