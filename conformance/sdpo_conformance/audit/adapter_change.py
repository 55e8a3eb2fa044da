"""What changed between two adapters, tensor by tensor and module by module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sdpo_conformance.audit.adapter import Adapter, TensorReader, blocks
from sdpo_conformance.audit.names import TensorPlace, place_of

if TYPE_CHECKING:
    import torch

#: A LoRA matrix larger than this is not multiplied out; no adapter in use comes near it.
_LARGEST_FACTOR = 2**24
_LARGEST_RANK = 1024


@dataclass(frozen=True)
class TensorChange:
    """One tensor before and after. Norms are Frobenius norms over finite elements, in float64.

    `changed`, `max_abs_delta` and `norm_delta` are None where there is no tensor before to compare with.
    """

    key: str
    place: TensorPlace
    numel: int
    changed: int | None
    max_abs_delta: float | None
    max_abs_after: float
    norm_before: float | None
    norm_after: float
    norm_delta: float | None
    nonfinite_before: int
    nonfinite_after: int

    @property
    def moved(self) -> bool:
        """Whether any element differs."""
        return bool(self.changed)

    @property
    def zero_after(self) -> bool:
        """Whether every element is 0 after the run."""
        return self.norm_after == 0 and self.nonfinite_after == 0


@dataclass(frozen=True)
class ModuleChange:
    """One adapted module: its tensors, and the Frobenius norm of the change of (scaled) B A where it has
    both.
    """

    place: TensorPlace
    tensors: tuple[TensorChange, ...]
    update_norm: float | None

    @property
    def moved(self) -> bool:
        """Whether any of its tensors differs."""
        return any(tensor.moved for tensor in self.tensors)

    @property
    def dead(self) -> bool:
        """Whether a factor of its update is zero after the run: the module does nothing."""
        return any(t.place.factor and t.numel and t.zero_after for t in self.tensors)

    @property
    def max_abs_delta(self) -> float | None:
        """The largest change of any element."""
        deltas = [tensor.max_abs_delta for tensor in self.tensors if tensor.max_abs_delta is not None]
        return max(deltas, default=None)


@dataclass(frozen=True)
class AdapterChange:
    """The whole comparison. `before` is None where only the finished adapter is there. `converted`: every pair holds
    the start with its sign turned beside what was trained, as PEFT saves PiSSA, OLoRA and CorDA as plain LoRA.
    """

    before: Adapter | None
    after: Adapter
    modules: tuple[ModuleChange, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    shape_mismatch: tuple[str, ...]
    dtype_changes: Mapping[str, int]
    scale: float | None
    renamed: str = ""
    converted: bool = False

    @property
    def tensors(self) -> tuple[TensorChange, ...]:
        """Every tensor of the adapter after the run."""
        return tuple(tensor for module in self.modules for tensor in module.tensors)

    @property
    def compared(self) -> tuple[TensorChange, ...]:
        """The tensors that could be compared."""
        return tuple(tensor for tensor in self.tensors if tensor.changed is not None)

    @property
    def moved(self) -> int:
        """Number of tensors that changed."""
        return sum(tensor.moved for tensor in self.tensors)

    @property
    def max_abs_delta(self) -> float:
        """The largest change of any element of any tensor."""
        return max((t.max_abs_delta or 0.0 for t in self.compared), default=0.0)

    @property
    def matters(self) -> bool:
        """Whether what changed can change the model: a moved lora_A times a lora_B of zeros cannot.

        AdamW's weight decay alone moves lora_A, so that its moving is no sign of training.
        """
        return any(module.moved and not module.dead for module in self.modules)


def compare_adapters(before: Adapter | None, after: Adapter) -> AdapterChange:
    """Compare two adapters, or describe the finished one alone.

    Memory is bounded by a few blocks of 2^22 elements and by one module's LoRA matrices. Against a fresh
    `before` (a config without weights) lora_B is compared with zeros and lora_A is not compared.
    """
    before, renamed = _rekeyed(before, after)
    compared = before if before is not None and not before.fresh else None
    shared = [k for k in after.tensors if compared and k in compared.tensors]
    mismatch = tuple(k for k in shared if compared and compared.tensors[k].shape != after.tensors[k].shape)
    dtype_changes: dict[str, int] = {}
    for key in shared:
        assert compared is not None
        old, new = compared.tensors[key].dtype, after.tensors[key].dtype
        if old != new:
            dtype_changes[f"{old} to {new}"] = dtype_changes.get(f"{old} to {new}", 0) + 1
    by_module: dict[str, list[str]] = {}
    for key in after.tensors:
        by_module.setdefault(place_of(key).module, []).append(key)
    scale = after.scale
    new_reader = TensorReader(after)
    old_reader = TensorReader(compared) if compared else None
    try:
        modules = tuple(
            _module(keys, before, after, old_reader, new_reader, set(mismatch), 1.0 if scale is None else scale)
            for keys in by_module.values()
        )
        converted = compared is not None and _converted(mismatch, compared, after, old_reader, new_reader)
    finally:
        new_reader.close()
        if old_reader:
            old_reader.close()
    return AdapterChange(
        before=before,
        after=after,
        modules=tuple(sorted(modules, key=lambda m: (m.place.stack, m.place.layer or 0, m.place.kind))),
        only_before=tuple(k for k in compared.tensors if k not in after.tensors) if compared else (),
        only_after=tuple(k for k in after.tensors if k not in compared.tensors) if compared else (),
        shape_mismatch=tuple(k for k in mismatch if not (compared and _pruned(k, compared, after))),
        dtype_changes=dtype_changes,
        scale=scale,
        renamed=renamed,
        converted=converted,
    )


def _pruned(key: str, before: Adapter, after: Adapter) -> bool:
    """Whether AdaLoRA has taken ranks away: lora_A and lora_E have fewer rows, lora_B fewer columns."""
    axis = {"A": 0, "lora_E": 0, "B": 1}.get(place_of(key).part)
    was, now = before.tensors[key].shape, after.tensors[key].shape
    if after.config.get("peft_type") != "ADALORA" or axis is None or len(was) != 2 or len(now) != 2:
        return False
    return now[axis] <= was[axis] and now[1 - axis] == was[1 - axis]


def _converted(
    mismatch: tuple[str, ...], before: Adapter, after: Adapter, old: TensorReader | None, new: TensorReader
) -> bool:
    """Whether each lora_A of another shape ends in that of the start, and each lora_B in the start's, negated."""
    import torch

    for key in mismatch:
        part, was, now = place_of(key).part, before.tensors[key].shape, after.tensors[key].shape
        axis = 0 if part == "A" else 1
        if old is None or part not in ("A", "B") or len(was) != 2 or len(now) != 2 or now[axis] != 2 * was[axis]:
            return False
        if now[1 - axis] != was[1 - axis] or after.tensors[key].numel > _LARGEST_FACTOR:
            return False
        start = old.whole(key).double() * (1 if part == "A" else -1)
        kept = new.whole(key).double().narrow(axis, was[axis], was[axis])
        if not torch.allclose(kept, start, rtol=2**-7, atol=0.0):
            return False
    return bool(mismatch)


def _rekeyed(before: Adapter | None, after: Adapter) -> tuple[Adapter | None, str]:
    """`before` under the names of `after`, where the two differ in what stands before the layers; and how they do."""
    if before is None or before.fresh or not before.tensors or set(before.tensors) == set(after.tensors):
        return before, ""
    old, new = ({_within(key): key for key in adapter.tensors} for adapter in (before, after))
    if set(old) != set(new) or len(old) != len(before.tensors) or len(new) != len(after.tensors):
        return before, ""
    names = {old[inner]: new[inner] for inner in old}
    first = next(inner for inner in old if old[inner] != new[inner])
    told = f"{_head(old[first], first)} to {_head(new[first], first)}"
    tensors = {names[key]: entry for key, entry in before.tensors.items()}
    files = {names[key]: place for key, place in before.files.items()}
    return replace(before, tensors=tensors, files=files), told


def _within(key: str) -> str:
    """The name from the word before the first number on (`layers.0. ...`); its last two parts where there is none."""
    parts = key.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if first is None:
        return ".".join([part for part in parts if part not in ("base_model", "model")][-2:])
    return ".".join(parts[max(0, first - 1) :])


def _head(key: str, inner: str) -> str:
    return repr(key.removesuffix(inner)) if key != inner else "none"


def _module(
    keys: list[str],
    before: Adapter | None,
    after: Adapter,
    old: TensorReader | None,
    new: TensorReader,
    mismatch: set[str],
    scale: float,
) -> ModuleChange:
    tensors = []
    for key in keys:
        place = place_of(key)
        compare_with = None
        from_zero = before is not None and before.fresh and place.starts_at_zero
        if old is not None and before is not None and key in before.tensors and key not in mismatch:
            compare_with = old
        tensors.append(_tensor(key, place, after, compare_with, new, from_zero))
    place = place_of(keys[0])
    return ModuleChange(place, tuple(tensors), _update_norm(keys, tensors, before, after, old, new, scale))


def _tensor(
    key: str, place: TensorPlace, after: Adapter, old: TensorReader | None, new: TensorReader, from_zero: bool
) -> TensorChange:
    import torch

    compare = old is not None or from_zero
    changed, largest, largest_after = 0, 0.0, 0.0
    squares = {"before": 0.0, "after": 0.0, "delta": 0.0}
    broken = {"before": 0, "after": 0}
    entry = after.tensors[key]
    for where in blocks(entry.shape):
        now = new.block(key, where).to(torch.float64, copy=True)
        was = old.block(key, where).to(torch.float64, copy=True) if old is not None else torch.zeros_like(now)
        if compare:
            changed += int(torch.count_nonzero((now != was) & ~(now.isnan() & was.isnan())))
        delta = now - was
        after_square, after_broken = _square(now)
        squares["after"] += after_square
        broken["after"] += after_broken
        largest_after = max(largest_after, float(now.abs().max()))
        if compare:
            before_square, before_broken = _square(was)
            squares["before"] += before_square
            broken["before"] += before_broken
            squares["delta"] += _square(delta)[0]
            largest = max(largest, float(delta.abs().max()))
    return TensorChange(
        key=key,
        place=place,
        numel=entry.numel,
        changed=changed if compare else None,
        max_abs_delta=largest if compare else None,
        max_abs_after=largest_after,
        norm_before=math.sqrt(squares["before"]) if compare else None,
        norm_after=math.sqrt(squares["after"]),
        norm_delta=math.sqrt(squares["delta"]) if compare else None,
        nonfinite_before=broken["before"],
        nonfinite_after=broken["after"],
    )


def _square(values: torch.Tensor) -> tuple[float, int]:
    """The sum of squares, and how many elements were not finite: those are set to 0 in place."""
    import torch

    flat = values.reshape(-1)
    square = float(flat @ flat)
    if math.isfinite(square):
        return square, 0
    unusable = ~torch.isfinite(flat)
    flat = values.masked_fill_(unusable.reshape(values.shape), 0.0).reshape(-1)
    return float(flat @ flat), int(unusable.sum())


def _update_norm(
    keys: list[str],
    tensors: list[TensorChange],
    before: Adapter | None,
    after: Adapter,
    old: TensorReader | None,
    new: TensorReader,
    scale: float,
) -> float | None:
    """|scale (B' A' - B A)|_F through the r x r Gram matrices: the out x in product is never formed."""
    import torch

    by_part = {tensor.place.part: tensor.key for tensor in tensors}
    if before is None or "A" not in by_part or "B" not in by_part:
        return None
    a_key, b_key = by_part["A"], by_part["B"]
    a_shape, b_shape = after.tensors[a_key].shape, after.tensors[b_key].shape
    if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[0] != b_shape[1] or a_shape[0] > _LARGEST_RANK:
        return None
    if max(after.tensors[a_key].numel, after.tensors[b_key].numel) > _LARGEST_FACTOR:
        return None
    if any(t.nonfinite_after or t.nonfinite_before for t in tensors):
        return None
    left, right = [new.whole(b_key).double()], [new.whole(a_key).double()]
    if old is not None:
        assert not before.fresh
        if any(k not in before.tensors or before.tensors[k].shape != after.tensors[k].shape for k in (a_key, b_key)):
            return None
        left.append(-old.whole(b_key).double())
        right.append(old.whole(a_key).double())
    b, a = torch.cat(left, dim=1), torch.cat(right, dim=0)
    square = float(((b.T @ b) * (a @ a.T)).sum())
    return scale * math.sqrt(max(square, 0.0))
