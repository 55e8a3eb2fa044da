"""The adapters that each rank of a data-parallel run left behind: they have to be one."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdpo_conformance.audit.adapter import Adapter, open_adapter
from sdpo_conformance.audit.adapter_change import compare_adapters
from sdpo_conformance.audit.checkpoints import folder_of, holds_weights
from sdpo_conformance.audit.errors import AuditError

_RANK = re.compile(r"(?P<head>(?:.*[_.-])?(?:dp_?)?rank[_-]?)(?P<number>\d{1,5})(?:\.safetensors)?")


@dataclass(frozen=True)
class RankCopies:
    """Two ranks' copies of one adapter. `apart` is the largest difference of an element, `share` the norm of the
    difference as a part of lora_B's own. `whole`: the shapes are those of the adapter before the run, so that none is a
    shard's.
    """

    first: str
    second: str
    apart: float
    share: float
    whole: bool


def find_rank_copies(
    run: Path | None, checkpoints: Sequence[Path], before: Adapter | None, after: Adapter | None
) -> RankCopies | None:
    """The two ranks' copies that differ most, where ranks 0 to n - 1 each hold every tensor of the adapter in its
    full shape: what is no shard and no stage of a pipeline. None where no such copies are, or they are equal.
    """
    if run is None or not run.is_dir() or after is None or after.fresh:
        return None
    known = before is not None and not before.fresh
    if before is not None and known and _shapes(before) != _shapes(after):
        return None
    for place in (run, *(folder_of(checkpoint) for checkpoint in checkpoints[-1:])):
        series: dict[str, dict[int, Path]] = defaultdict(dict)
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if (match := _RANK.fullmatch(path.name)) and (path.suffix == ".safetensors" or holds_weights(path)):
                series[match["head"]][int(match["number"])] = path
        for copies in series.values():
            if len(copies) > 1 and sorted(copies) == list(range(len(copies))):
                try:
                    return _furthest([copies[number] for number in sorted(copies)], _shapes(after), known)
                except AuditError:
                    return None
    return None


def _shapes(adapter: Adapter) -> Mapping[str, tuple[int, ...]]:
    return {key: entry.shape for key, entry in adapter.tensors.items()}


def _furthest(paths: Sequence[Path], shapes: Mapping[str, tuple[int, ...]], known: bool) -> RankCopies | None:
    adapters = [open_adapter(path) for path in paths]
    if any(_shapes(one) != shapes for one in adapters):
        return None
    found = []
    for path, other in zip(paths[1:], adapters[1:], strict=True):
        change = compare_adapters(adapters[0], other)
        if change.moved and all(not t.nonfinite_before and not t.nonfinite_after for t in change.compared):
            updates = [t for t in change.compared if t.place.starts_at_zero]
            own = math.fsum(t.norm_after**2 for t in updates)
            apart = math.fsum((t.norm_delta or 0.0) ** 2 for t in updates)
            share = math.sqrt(apart / own) if own else 0.0
            found.append(RankCopies(paths[0].name, path.name, change.max_abs_delta, share, known))
    return max(found, key=lambda copies: copies.share, default=None)
