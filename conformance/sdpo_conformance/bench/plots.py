"""Time and memory against the number of tokens, one figure a task, as SVG and PNG.

Times are shown as multiples of the bare product, each round's beside its own: over a factor of 32 in tokens, two lines
in milliseconds that are 30 % apart cannot be told apart. Whole steps, for which the product is no limit, are in
milliseconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sdpo_conformance.bench.bench_results import BenchRow, Group, bytes_of_logits, groups_of, rows_of
from sdpo_conformance.bench.workloads import Direction
from sdpo_conformance.files import whole

FEWEST_POINTS = 3
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#8A6D3B")
"""Okabe and Ito's palette, told apart by colour-blind readers too; by order of the implementations."""

MARKERS = "os^DvPX*"
INK, FAINT = "#1a1a1a", "#6b6b6b"
MIB = 2**20

DODGE = 0.07
"""Octaves between neighbouring implementations' points: two that are equally fast lie side by side."""

NOISY = 0.05
"""Half the interquartile range, as a share of the median, from which a point is called noisy."""

WIDE = 6.0
"""The largest value over the smallest from which an axis is logarithmic."""

TITLES = {
    Direction.FORWARD: "SDPO loss, forward",
    Direction.BOTH: "SDPO loss, forward and backward",
    Direction.LOGPROBS: "Response log-probs",
    Direction.TOPK: "Teacher top-k",
    Direction.STEP: "A distill call of two steps",
}


@dataclass(frozen=True)
class Quantity:
    """What a figure's upright axis shows: ``words`` with the unit, ``limit``: what the dashed line is."""

    name: str
    words: str
    limit: str
    unit: str

    def of(self, row: BenchRow) -> tuple[float, float, float] | None:
        """(value, lower, upper quartile) of a row, None where it has none."""
        if self.name == "ratio":
            found = (row.ratio, row.ratio_q1, row.ratio_q3) if row.ms is not None else None
        elif self.name == "ms":
            found = (row.ms, row.q1_ms, row.q3_ms) if row.ms is not None else None
        else:
            found = (row.peak_mib, row.peak_mib, row.peak_mib) if row.peak_mib else None
        return found if found is not None and math.isfinite(found[0]) else None

    def limit_of(self, group: Group) -> float:
        """Where the dashed line is."""
        if self.name == "ratio":
            return 1.0
        return group.limit_ms if self.name == "ms" else bytes_of_logits(group.work) / MIB


RATIO = Quantity("ratio", "time, multiples of the bare product h @ Wᵀ", "h @ Wᵀ alone, the limit", "×")
MILLISECONDS = Quantity("ms", "time, milliseconds", "h @ Wᵀ of the responses once, for scale", " ms")
MEMORY = Quantity("memory", "peak memory, MiB", "the logits alone", " MiB")


def write_plots(document: Mapping[str, Any], targets: Sequence[str], folder: Path) -> list[Path]:
    """One figure of times and one of peaks per task that has enough points; the files written."""
    tasks: dict[str, list[Group]] = {}
    for group in groups_of(rows_of(document), targets):
        if group.measured:
            tasks.setdefault(group.work.task, []).append(group)
    written: list[Path] = []
    for task, groups in tasks.items():
        groups = sorted(groups, key=lambda group: group.work.tokens)
        if len(groups) < FEWEST_POINTS:
            continue
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", task).strip("-")
        device = document["machine_info"].get("device", "")
        times = MILLISECONDS if groups[0].work.direction is Direction.STEP else RATIO
        written += draw(groups, targets, times, device, folder / f"time-{slug}")
        written += draw(groups, targets, MEMORY, device, folder / f"memory-{slug}")
    return written


def draw(groups: Sequence[Group], targets: Sequence[str], quantity: Quantity, device: str, stem: Path) -> list[Path]:
    """One figure: a line an implementation with the quartiles of its rounds, labelled at its end; the limit dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    style: Any = {"font.family": "DejaVu Sans", "font.size": 12, "svg.fonttype": "none", "svg.hashsalt": "sdpo"}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(10.5, 6.2), dpi=160)
        figure.subplots_adjust(left=0.085, right=0.70, top=0.83, bottom=0.12)
        tokens = [group.work.tokens for group in groups]
        ends: list[tuple[float, float, str, str]] = []
        limit = [quantity.limit_of(group) for group in groups]
        axes.plot(tokens, limit, color=INK, linestyle=(0, (5, 3)), linewidth=1.8, zorder=2)
        ends.append((tokens[-1], limit[-1], f"{quantity.limit}  {amount(limit[-1], quantity.unit)}", INK))
        drawn = list(lines(groups, targets, quantity))
        for number, (target, points) in enumerate(drawn):
            index = targets.index(target)
            colour = COLOURS[index % len(COLOURS)]
            last = points[-1][1]
            beside = 2 ** (DODGE * (number - (len(drawn) - 1) / 2))
            x = [place * beside for place, _, _ in points]
            y = [value for _, _, (value, _, _) in points]
            axes.errorbar(
                x,
                y,
                yerr=[
                    [max(v - low, 0) for _, _, (v, low, _) in points],
                    [max(up - v, 0) for _, _, (v, _, up) in points],
                ],
                color=colour,
                ecolor=colour,
                capsize=3,
                elinewidth=1.1,
                marker=MARKERS[index % len(MARKERS)],
                markersize=6,
                linewidth=max(3.4 - 0.5 * number, 1.2),  # what lies below stays seen
                linestyle=(0, (1, 1.6)) if last.other else "-",
                markerfacecolor="white" if last.other or any(row.bad for _, row, _ in points) else colour,
                zorder=3,
            )
            ends.append((x[-1], y[-1], end_label(points, groups[-1], quantity), colour))
        values = [*limit, *(value for _, points in drawn for _, _, (value, _, _) in points)]
        logarithmic = max(values) > WIDE * min(values)
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens)
        margin = 2 ** (0.12 + DODGE * len(drawn) / 2)
        axes.set_xlim(tokens[0] / margin, tokens[-1] * margin)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}".replace(",", "\u2009")))
        axes.xaxis.set_minor_locator(NullLocator())
        if logarithmic:
            axes.set_yscale("log")
            axes.set_yticks(ticks(min(values), max(values)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(0, 1.08 * max(values))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
        axes.set_xlabel("response tokens", color=FAINT)
        axes.grid(True, which="major", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=FAINT, length=0, which="both")
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_visible(False)
        place_labels(figure, axes, ends)
        work = groups[0].work
        figure.text(0.03, 0.945, TITLES[work.direction], fontsize=17, weight="bold", color=INK)
        details = [f"{work.head.model} head, {work.head.hidden} × {work.head.vocabulary}", work.objective, work.dtype]
        figure.text(0.03, 0.905, " · ".join(part for part in [*details, device] if part), fontsize=11.5, color=FAINT)
        scale = f"{quantity.words}{', log scale' if logarithmic else ''}"
        bars = "" if quantity is MEMORY else "; bars: quartiles of the rounds"
        figure.text(0.03, 0.865, f"{scale}{bars}", fontsize=11.5, color=FAINT)
        paths = [stem.with_name(stem.name + suffix) for suffix in (".svg", ".png")]
        for path in paths:
            undated = {"Date": None} if path.suffix == ".svg" else None
            with whole(path) as partial:
                figure.savefig(partial, format=path.suffix[1:], metadata=undated)
        pyplot.close(figure)
    return paths


Point = tuple[int, BenchRow, tuple[float, float, float]]
"""Tokens, the row, and its value between its quartiles."""


def lines(groups: Sequence[Group], targets: Sequence[str], quantity: Quantity) -> Iterator[tuple[str, list[Point]]]:
    """The points of every implementation that has a value."""
    for target in targets:
        points: list[Point] = []
        for group in groups:
            for row in group.rows:
                if row.target == target and (value := quantity.of(row)) is not None:
                    points.append((group.work.tokens, row, value))
        if points:
            yield target, points


def end_label(points: Sequence[Point], last: Group, quantity: Quantity) -> str:
    """Name, the last value, and what to beware of."""
    tokens, row, (value, _, _) = points[-1]
    text = f"{row.label}  {amount(value, quantity.unit)}"
    noise = max((up - low) / 2 / value for _, _, (value, low, up) in points)
    if noise > NOISY:
        text += f"\nnoisy, up to ± {noise:.0%}"
    if any(one.bad for _, one, _ in points):
        text += "\nwrong answer"
    if row.other:
        text += "\nanother objective"
    if tokens != last.work.tokens:
        text += "\nno further: failed or not run"
    return text


def amount(value: float, unit: str) -> str:
    """Three digits, or all before the point, and the unit."""
    return f"{plain(round(value)) if value >= 99.5 else f'{value:.3g}'}{unit}"


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten around a range; powers alone where that would be more than ten."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [digit * 10.0**power for power in powers for digit in digits]
        within = [one for one in found if low / 1.5 <= one <= high * 1.5]
        if len(within) <= 10:
            break
    return within


def place_labels(figure: Any, axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Right of the axes, level with the line's end, moved apart where they would overlap."""
    figure.canvas.draw()
    box = axes.get_window_extent()
    wanted = []
    for x, y, text, colour in ends:
        level = (axes.transData.transform((x, y))[1] - box.y0) / box.height
        extra = text.count("\n")
        wanted.append((level, 0.048 + 0.042 * extra, x, y, text, colour))
    wanted.sort(key=lambda one: one[0])
    centres = spread_out([one[0] for one in wanted], [one[1] for one in wanted])
    for (_, _, x, y, text, colour), centre in zip(wanted, centres, strict=True):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 1.4, "shrinkA": 1, "shrinkB": 5}
        axes.annotate(
            text,
            xy=(x, y),
            xytext=(1.035, centre),
            xycoords="data",
            textcoords="axes fraction",
            va="center",
            ha="left",
            fontsize=11,
            linespacing=1.15,
            color=INK,
            arrowprops=line,
            annotation_clip=False,
        )


def spread_out(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Centres near ``wanted`` (ascending), at least half the heights of neighbours apart, the whole within
    [0, 1] where it fits."""
    centres = list(wanted)
    apart = [(one + other) / 2 for one, other in pairwise(heights)]
    for _ in range(200):
        for index, gap in enumerate(apart):
            missing = gap - (centres[index + 1] - centres[index])
            if missing > 0:
                centres[index] -= missing / 2
                centres[index + 1] += missing / 2
    centres[0] = max(centres[0], heights[0] / 2)
    for index, gap in enumerate(apart):
        centres[index + 1] = max(centres[index + 1], centres[index] + gap)
    centres[-1] = min(centres[-1], 1 - heights[-1] / 2)
    for index in reversed(range(len(apart))):
        centres[index] = min(centres[index], centres[index + 1] - apart[index])
    return centres


def plain(value: float) -> str:
    """A tick without exponents."""
    return f"{value:g}" if value < 1000 else f"{value:,.0f}".replace(",", "\u2009")
