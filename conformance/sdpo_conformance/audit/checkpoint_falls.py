"""Checkpoints in which the adapter is suddenly smaller than in the one before: it went back to where it came from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from sdpo_conformance.audit.adapter import Adapter, TensorReader, blocks, open_adapter
from sdpo_conformance.audit.adapter_change import AdapterChange, compare_adapters
from sdpo_conformance.audit.checkpoints import name_of, number_of, series_of
from sdpo_conformance.audit.errors import AuditError
from sdpo_conformance.audit.names import place_of

#: lora_B's norm of the later checkpoint, as a part of the earlier one's.
_FALLEN = 1 / 3
#: How many times as long as the fall the way up has to have taken.
_LONGER = 4
_BY_EPOCH = {"epoch_#", "epoch#", "epoch_#_step_#", "epoch_#-step_#"}


@dataclass(frozen=True)
class Fall:
    """From checkpoint `first` to `second`, `steps` later by their numbers, lora_B's norm fell to `left` of what it was.
    `begin` and `end` are the two numbers.
    """

    first: str
    second: str
    begin: int
    end: int
    left: float
    change: AdapterChange


def find_fall(checkpoints: Sequence[Path]) -> Fall | None:
    """The first fall between neighbouring checkpoints that are numbered by steps; None where there is none."""
    numbered = [(n, path) for path in checkpoints if (n := number_of(path)) is not None]
    series = {series_of(name_of(path)) for _, path in numbered}
    if len(numbered) < 2 or len(series) > 1 or series & _BY_EPOCH:
        return None
    try:
        adapters = [open_adapter(path) for _, path in numbered]
        norms = [_update_norm(adapter) for adapter in adapters]
        rows = [(number, name_of(path), a, n) for (number, path), a, n in zip(numbered, adapters, norms, strict=True)]
        for (begin, first, old, high), (end, second, new, low) in pairwise(rows):
            if 0 < low <= _FALLEN * high < math.inf and begin >= _LONGER * (end - begin):
                return Fall(first, second, begin, end, low / high, compare_adapters(old, new))
    except AuditError:
        pass
    return None


def _update_norm(adapter: Adapter) -> float:
    """The norm of all factors that start at zero; NaN and infinity count as infinite."""
    if adapter.fresh:
        return 0.0
    reader, squares = TensorReader(adapter), 0.0
    try:
        for key, entry in adapter.tensors.items():
            if place_of(key).starts_at_zero:
                for where in blocks(entry.shape):
                    squares += float(reader.block(key, where).double().square().sum())
    finally:
        reader.close()
    return math.sqrt(squares) if math.isfinite(squares) else math.inf
