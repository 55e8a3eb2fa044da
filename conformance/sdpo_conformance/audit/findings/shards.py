"""Whether tensors of another shape are one rank's part of the tensors from before."""

from __future__ import annotations

import math

from sdpo_conformance.audit.adapter_change import AdapterChange
from sdpo_conformance.audit.names import place_of

Shape = tuple[int, ...]


def shard_of(change: AdapterChange) -> int:
    """How many ranks the tensors were cut over, where every other shape is a part of the tensor before; else 0.

    A part is a tensor cut along one axis (tensor parallelism, FSDP2's dim 0), or a flat stretch of it (FSDP1's flat
    parameters, ZeRO). A smaller rank cuts lora_A and lora_B of a module along the axis that they share.
    """
    before = change.before
    if before is None or not change.shape_mismatch or change.only_before or change.only_after:
        return 0
    found: set[int] = set()
    axes: dict[str, dict[str, int | None]] = {}
    for key in change.shape_mismatch:
        old, new = before.tensors[key].shape, change.after.tensors[key].shape
        cut = _flat(old, new) or _along(old, new)
        if cut is None:
            return 0
        parts, axis = cut
        found.add(parts)
        place = place_of(key)
        axes.setdefault(place.module, {})[place.part] = axis
    lower_rank = any(
        parts.get("A") is not None and parts.get("B") is not None and parts["A"] != parts["B"]
        for parts in axes.values()
    )
    return found.pop() if len(found) == 1 and not lower_rank else 0


def _flat(old: Shape, new: Shape) -> tuple[int, None] | None:
    """(number of parts, no axis) where the tensor was flattened before it was cut."""
    if len(new) != 1 or len(old) < 2 or not new[0] or math.prod(old) % new[0] or math.prod(old) == new[0]:
        return None
    return math.prod(old) // new[0], None


def _along(old: Shape, new: Shape) -> tuple[int, int] | None:
    """(number of parts, axis) where the tensor was cut along one axis."""
    if len(old) != len(new):
        return None
    cut = [(axis, a, b) for axis, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    if len(cut) != 1:
        return None
    axis, whole, part = cut[0]
    return (whole // part, axis) if part and whole > part and whole % part == 0 else None
