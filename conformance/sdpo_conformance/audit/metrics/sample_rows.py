"""Rows that are each of one sample: merged into steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from sdpo_conformance.audit.metrics.metric_names import FIELDS
from sdpo_conformance.audit.metrics.step_record import Batch, Step

#: (step number, sample's name where the row has one, its metrics)
Row = tuple[int, str | None, Step]


def number_samples(read: Sequence[Row]) -> list[Row]:
    """Rows of the same steps without a sample's name, numbered in each step."""
    counts: Counter[int] = Counter()
    numbered: list[Row] = []
    for number, _, step in read:
        counts[number] += 1
        numbered.append((number, str(counts[number]), step))
    return numbered


def merge_samples(read: Sequence[Row]) -> list[Batch]:
    """Rows of one step become one step, the mean over its samples: CLaaS's reduction over samples."""
    merged: dict[int, dict[str, Mapping[str, float]]] = {}
    for number, sample, step in read:
        merged.setdefault(number, {})[sample or "?"] = step.values
    steps = []
    for number in sorted(merged):
        samples = merged[number]
        columns = {name: [v[name] for v in samples.values() if name in v] for name in FIELDS}
        steps.append(Step(number, {name: mean(column) for name, column in columns.items() if column}, samples))
    return [Batch(tuple(steps))]


def mean(values: Sequence[float]) -> float:
    """The mean; infinite, not an exception, where the sum overflows."""
    return sum(values) / len(values)
