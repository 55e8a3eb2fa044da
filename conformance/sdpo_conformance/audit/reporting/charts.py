"""The report's pictures as inline SVG. Colours are CSS variables, so that they follow the page's theme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from sdpo_conformance.audit.adapter_change import AdapterChange, ModuleChange
from sdpo_conformance.audit.errors import shown
from sdpo_conformance.audit.metrics import FIELDS, RunMetrics

_WIDTH, _HEIGHT = 300, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 22
_LARGEST_CELL, _SMALLEST_CELL, _GAP = 18, 9, 2
_MAP_WIDTH = 930
_CHARACTER = 6.7
_MOST_MARKERS = 60


@dataclass(frozen=True)
class Chart:
    """A picture, its heading, and the same in words for those who cannot see it."""

    title: str
    svg: Markup


def metric_charts(metrics: RunMetrics, standstills: Mapping[str, frozenset[int]]) -> list[Chart]:
    """A line chart per reported field. `standstills` names, per field, the steps (indices) to mark as
    identical.
    """
    steps = metrics.steps
    labels = [str(step.number) for step in steps]
    starts, index = [], 0
    for batch in metrics.batches[:-1]:
        index += len(batch.steps)
        starts.append(index)
    charts = []
    for name in FIELDS:
        if not metrics.has(name):
            continue
        values = [step.values.get(name) for step in steps]
        marked = standstills.get(name, frozenset())
        reference = 1.0 if name == "mean_is_ratio" else None
        charts.append(Chart(name, _line_chart(name, values, labels, starts, marked, reference)))
    return charts


def _line_chart(
    name: str,
    values: Sequence[float | None],
    labels: Sequence[str],
    starts: Sequence[int],
    marked: frozenset[int],
    reference: float | None,
) -> Markup:
    finite = [v for v in values if v is not None and math.isfinite(v)]
    low, high = _range([*finite, *([reference] if reference is not None else [])])
    inner_w, inner_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    last = max(1, len(values) - 1)

    def x(index: float) -> float:
        return _LEFT + (inner_w * index / last if len(values) > 1 else inner_w / 2)

    def y(value: float) -> float:
        return _TOP + inner_h * (0.06 + 0.88 * (high - value) / (high - low))

    parts = [
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text class="tick" x="{_LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{_short(v)}</text>'
        for v in (low, (low + high) / 2, high)
    ]
    every = max(1, math.ceil(len(labels) / 8))
    shown_labels = [i for i in range(len(labels)) if i % every == 0]
    parts += [
        f'<text class="tick" x="{x(i):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(labels[i])}</text>'
        for i in shown_labels
    ]
    boundaries = starts if len(starts) <= _MOST_MARKERS else ()
    parts += [
        f'<line class="batch" x1="{x(i - 0.5):.1f}" x2="{x(i - 0.5):.1f}" y1="{_TOP}" y2="{_TOP + inner_h}"/>'
        for i in boundaries
    ]
    if reference is not None:
        parts.append(
            f'<line class="reference" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(reference):.1f}"'
            f' y2="{y(reference):.1f}"/>'
        )
    for run in _runs(values):
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in run)
        parts.append(f'<polyline class="line" points="{points}"/>')
    for i, value in enumerate(values):
        if value is not None and not math.isfinite(value):
            parts.append(f'<text class="broken" x="{x(i):.1f}" y="{_TOP + 12}" text-anchor="middle">✕</text>')
        elif value is not None and (i in marked or len(values) <= _MOST_MARKERS):
            kind, radius = ("still", 5) if i in marked else ("dot", 2.6)
            told = f"step {labels[i]}: {value:.8g}" + (", identical to another step" if i in marked else "")
            parts.append(
                f'<circle class="{kind}" cx="{x(i):.1f}" cy="{y(value):.1f}"'
                f' r="{radius}"><title>{escape(told)}</title></circle>'
            )
    words = f"{name} over {len(values)} steps" + (
        f", from {_short(finite[0])} to {_short(finite[-1])}" if finite else ""
    )
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(words)}">{"".join(parts)}</svg>'
    )


def _runs(values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """Stretches of finite values: the line breaks where there is none."""
    runs: list[list[tuple[int, float]]] = [[]]
    for index, value in enumerate(values):
        if value is None or not math.isfinite(value):
            runs.append([])
        else:
            runs[-1].append((index, value))
    return [run for run in runs if run]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    # Rounding must not be blown up to the full height: 1 and 1 + 1e-8 are drawn as the flat line they are.
    least = max(abs(low), abs(high)) * 1e-3 or 1.0
    if high - low < least:
        low, high = low - least, high + least
    return low, high


def heat_maps(change: AdapterChange) -> list[Chart]:
    """Where the adapter changed: a map per stack of layers, modules by layers, shaded by log max |delta|."""
    if not change.compared:
        return []
    stacks: dict[str, list[ModuleChange]] = {}
    for module in sorted(change.modules, key=lambda m: m.place.stack == ""):  # the layers first
        stacks.setdefault(module.place.stack, []).append(module)
    deltas = [m.max_abs_delta for m in change.modules if m.max_abs_delta]
    scale = shade_range(deltas)
    return [
        Chart(shown(stack) if stack else "outside the layers", _heat_map(modules, scale))
        for stack, modules in stacks.items()
    ]


def shade_range(deltas: Sequence[float]) -> tuple[float, float]:
    """What the palest and the fullest shade stand for: at least a decade, so that even changes look even."""
    return (min(min(deltas), max(deltas) / 10), max(deltas)) if deltas else (1.0, 1.0)


def _heat_map(modules: Sequence[ModuleChange], scale: tuple[float, float]) -> Markup:
    kinds = list(dict.fromkeys(m.place.kind for m in modules))
    layers = sorted({m.place.layer for m in modules}, key=lambda layer: -1 if layer is None else layer)
    cells: dict[tuple[str, int | None], list[ModuleChange]] = {}
    for module in modules:
        cells.setdefault((module.place.kind, module.place.layer), []).append(module)
    left = 12 + _CHARACTER * min(40, max(len(kind) for kind in kinds))
    fitting = int((_MAP_WIDTH - left) / len(layers)) - _GAP
    cell = max(_SMALLEST_CELL, min(_LARGEST_CELL, fitting))
    width = left + len(layers) * (cell + _GAP) + 12
    height = len(kinds) * (_LARGEST_CELL + _GAP) + (20 if layers != [None] else 0)
    parts = []
    for row, kind in enumerate(kinds):
        top = row * (_LARGEST_CELL + _GAP)
        label = kind if len(kind) <= 40 else "…" + kind[-39:]
        parts.append(
            f'<text class="tick" x="{left - 8:.0f}" y="{top + 13}" text-anchor="end">{escape(shown(label))}</text>'
        )
        for column, layer in enumerate(layers):
            group = cells.get((kind, layer))
            if group:
                parts.append(_cell(left + column * (cell + _GAP), top, cell, group, scale))
    every = 1 if len(layers) <= 12 else 4
    parts += [
        f'<text class="tick" x="{left + i * (cell + _GAP) + cell / 2:.0f}" y="{height - 5}"'
        f' text-anchor="middle">{layer}</text>'
        for i, layer in enumerate(layers)
        if layer is not None and i % every == 0
    ]
    words = f"{len(kinds)} kinds of modules by {len(layers)} layers, shaded by the largest change"
    return Markup(
        f'<svg viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}" role="img" '
        f'aria-label="{escape(words)}">{"".join(parts)}</svg>'
    )


def _cell(x: float, y: float, width: int, group: Sequence[ModuleChange], scale: tuple[float, float]) -> str:
    tensors = [tensor for module in group for tensor in module.tensors]
    changed = sum(tensor.moved for tensor in tensors)
    largest = max((m.max_abs_delta or 0.0 for m in group), default=0.0)
    norms = [m.update_norm for m in group if m.update_norm is not None]
    broken = sum(tensor.nonfinite_after for tensor in tensors)
    told = f"{shown(group[0].place.module)}" + (f" and {len(group) - 1} more" if len(group) > 1 else "")
    told += f": {changed} of {len(tensors)} tensors changed, max |delta| {largest:.3g}"
    told += f", |scale BA| moved by {max(norms):.3g}" if norms else ""
    told += f", {broken} elements not finite" if broken else ""
    title = f"<title>{escape(told)}</title>"
    place = f'x="{x:.0f}" y="{y:.0f}" width="{width}" height="{_LARGEST_CELL}" rx="3"'
    if broken:
        return f'<rect class="cell bad" {place}>{title}</rect>'
    if not changed:
        return f'<rect class="cell idle" {place}>{title}</rect>'
    low, high = scale
    share = (math.log(largest) - math.log(low)) / (math.log(high) - math.log(low)) if high > low else 1.0
    return f'<rect class="cell" {place} fill-opacity="{0.15 + 0.85 * max(0.0, min(1.0, share)):.2f}">{title}</rect>'


def _short(value: float) -> str:
    return f"{value:.3g}"
