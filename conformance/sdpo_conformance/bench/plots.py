"""Time and memory against the number of tokens, one figure a task, as SVG and PNG."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from sdpo_conformance.bench.bench_results import BenchRow, Group, bytes_of_logits, groups_of, rows_of
from sdpo_conformance.bench.workloads import Direction
from sdpo_conformance.files import whole

FEWEST_POINTS = 3
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#8A6D3B")
"""Okabe and Ito's palette, told apart by colour-blind readers too; by order of the implementations."""

INK, FAINT = "#1a1a1a", "#6b6b6b"
MIB = 2**20

TITLES = {
    Direction.FORWARD: "SDPO loss, forward",
    Direction.BOTH: "SDPO loss, forward and backward",
    Direction.LOGPROBS: "Response log-probs",
    Direction.TOPK: "Teacher top-k",
    Direction.STEP: "A distill call of two steps",
}


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
        written += draw(groups, targets, "time", device, folder / f"time-{slug}")
        written += draw(groups, targets, "memory", device, folder / f"memory-{slug}")
    return written


def draw(groups: Sequence[Group], targets: Sequence[str], kind: str, device: str, stem: Path) -> list[Path]:
    """One figure: a line an implementation, labelled at its end, and the limit dashed."""
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
        limit = [limit_of(group, kind) for group in groups]
        axes.plot(tokens, limit, color=INK, linestyle=(0, (5, 3)), linewidth=1.8, zorder=2)
        ends.append((tokens[-1], limit[-1], LIMITS[kind], INK))
        for target, points in lines(groups, targets, kind):
            colour = COLOURS[targets.index(target) % len(COLOURS)]
            last = points[-1][1]
            axes.plot(
                [x for x, _, _ in points],
                [y for _, _, y in points],
                color=colour,
                marker="o",
                markersize=6,
                linewidth=1.6 if last.other else 2.4,
                linestyle=(0, (1, 1.6)) if last.other else "-",
                markerfacecolor="white" if last.other or any(row.bad for _, row, _ in points) else colour,
                zorder=3,
            )
            ends.append((points[-1][0], points[-1][2], end_label(points, groups[-1], kind), colour))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(tokens)
        axes.set_xlim(tokens[0] / 1.06, tokens[-1] * 1.03)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}".replace(",", "\u2009")))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("response tokens", color=FAINT)
        axes.grid(True, which="major", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=FAINT, length=0, which="both")
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_visible(False)
        place_labels(figure, axes, ends)
        work = groups[0].work
        figure.text(0.03, 0.945, f"{TITLES[work.direction]}: {QUANTITIES[kind]}", fontsize=17, weight="bold", color=INK)
        details = [f"{work.head.model} head, {work.head.hidden} × {work.head.vocabulary}", work.objective]
        details += [work.dtype, device, "log scales"]
        figure.text(0.03, 0.895, " · ".join(part for part in details if part), fontsize=11.5, color=FAINT)
        paths = [stem.with_name(stem.name + suffix) for suffix in (".svg", ".png")]
        for path in paths:
            undated = {"Date": None} if path.suffix == ".svg" else None
            with whole(path) as partial:
                figure.savefig(partial, format=path.suffix[1:], metadata=undated)
        pyplot.close(figure)
    return paths


LIMITS = {"time": "h @ Wᵀ alone, the limit  1×", "memory": "the logits alone  1×"}
QUANTITIES = {"time": "milliseconds", "memory": "peak memory, MiB"}


def limit_of(group: Group, kind: str) -> float:
    """The bare product's time, or what it writes."""
    return group.limit_ms if kind == "time" else bytes_of_logits(group.work) / MIB


def lines(
    groups: Sequence[Group], targets: Sequence[str], kind: str
) -> Iterator[tuple[str, list[tuple[int, BenchRow, float]]]]:
    """(tokens, row, value) of every implementation that has a value."""
    for target in targets:
        points = []
        for group in groups:
            for row in group.rows:
                value = row.ms if kind == "time" else row.peak_mib
                if row.target == target and value:
                    points.append((group.work.tokens, row, value))
        if points:
            yield target, points


def end_label(points: Sequence[tuple[int, BenchRow, float]], last: Group, kind: str) -> str:
    """Name, the last ratio to the limit, and what to beware of."""
    tokens, row, value = points[-1]
    ratio = row.ratio if kind == "time" else value * MIB / bytes_of_logits(row.work)
    text = f"{row.label}  {ratio_words(ratio)}"
    if any(one.bad for _, one, _ in points):
        text += "\nwrong answer"
    if row.other:
        text += "\nanother objective"
    if tokens != last.work.tokens:
        text += "\nno further: failed or not run"
    return text


def ratio_words(ratio: float) -> str:
    """Two or three digits."""
    if ratio >= 99.5:
        return f"{ratio:.0f}×"
    return f"{ratio:.1f}×" if ratio >= 0.95 else f"{ratio:.2g}×"


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
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.6, "shrinkA": 1, "shrinkB": 5}
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
            color=colour,
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
    return f"{value:g}" if value < 10000 else f"{value:,.0f}".replace(",", "\u2009")
