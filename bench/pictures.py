"""Draws plots as SVG, the same bytes for the same plot. It wants matplotlib (extra ``bench``)."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from bench.figures import tick
from bench.plots import (
    MET,
    MISSED,
    OTHER,
    OURS,
    OURS_OTHERWISE,
    UNJUDGED,
    Lines,
    Panels,
    Plot,
    Row,
    Rows,
)

__all__ = ["draw"]

# By Okabe and Ito: those who see no red or no green can tell them apart.
BLUE, ORANGE, VERMILION, SKY = "#0072b2", "#e69f00", "#d55e00", "#56b4e9"
GREEN, PURPLE, GREY = "#009e73", "#cc79a7", "#777777"
COLOURS = {
    OURS: BLUE,
    OURS_OTHERWISE: SKY,
    OTHER: ORANGE,
    MET: BLUE,
    MISSED: VERMILION,
    UNJUDGED: GREY,
}
OF_LINES = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY)
SHAPES = {"median": "o", "p50": "o", "p99": "D", "p99.9": "^"}
OF_POINTS = "osD^vP"

WIDTH, MARGIN, LINE = 10.0, 1.1, 0.19  # inches: of a picture, around its rows, of a line of text
PANEL_WIDTH, PANEL_HEIGHT = 3.6, 3.0
ACROSS = 3  # panels
APART = 0.19  # of an axis: between two numbers below it
WRAPPED = 56  # characters
MOST_TICKS = 7
# Of each decade, or of each power of 1,024; the finest first.
TENTHS: tuple[tuple[float, ...], ...] = ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,))
POWERS_OF_TWO: tuple[tuple[float, ...], ...] = (
    tuple(2.0**power for power in range(10)),
    (1, 4, 16, 64, 256),
    (1, 32),
    (1,),
)

# White behind all of it, in whatever a page is shown. Text stays text, to be searched and read out.
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "white",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial", "sans-serif"],
    "font.size": 9,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "domi_fast",
}
# Neither when it was drawn, nor with which version.
METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def draw(plot: Plot, path: Path) -> None:
    with style.context(["default", STYLE]):
        canvas = Canvas(layout="constrained")
        if isinstance(plot, Rows):
            _rows(plot, canvas)
        else:
            _panels(plot, canvas)
        canvas.suptitle(plot.title, fontsize=12, fontweight="bold")
        canvas.savefig(path, format="svg", metadata={**METADATA, "Title": plot.title})


# -------------------------------------------------------------------------------------------- rows


def _rows(plot: Rows, canvas: Canvas) -> None:
    axes = canvas.subplots()
    labels = [textwrap.fill(row.label, WRAPPED, break_on_hyphens=False) for row in plot.rows]
    everything = [] if plot.base is None else [plot.base]
    for number, row in enumerate(plot.rows):
        if row.kind:
            _row(row, number, plot.base, axes)
            everything += [value for mark in row.marks for value in mark.rounds]
        else:
            _text(row.label, 0.0, number, axes, heavy=True)
            labels[number] = ""
        _text(row.note, 1.0, number, axes, heavy=row.is_bad)
    if plot.base is not None:
        axes.axvline(plot.base, color="black", linewidth=1.0)
    axes.set_xscale("log")
    numbers = round_numbers(min(everything), max(everything), plot.unit)
    axes.set_xticks(numbers, [tick(number, plot.unit) for number in numbers])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(numbers[0], numbers[-1])
    axes.set_xlabel(plot.axis)
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0, pad=7)
    axes.grid(visible=False, axis="y")
    axes.set_ylim(len(labels) - 0.4, -0.6)
    _legend(plot.rows, axes)
    lines = max(label.count("\n") + 1 for label in labels)
    canvas.set_size_inches(WIDTH, MARGIN + len(labels) * lines * LINE)


def _row(row: Row, y: float, base: float | None, axes: Axes) -> None:
    colour = COLOURS[row.kind]
    rounds = [value for mark in row.marks for value in mark.rounds]
    if base is not None:
        (mark,) = row.marks
        axes.barh(y, mark.middle - base, left=base, height=0.6, color=colour, alpha=0.4)
    axes.plot([min(rounds), max(rounds)], [y, y], color=colour, linewidth=1.2)
    axes.plot(rounds, [y] * len(rounds), ".", color=colour, markersize=4, alpha=0.6)
    for mark in row.marks:
        axes.plot(
            [mark.middle], [y], SHAPES[mark.of], color=colour, markersize=6, markeredgecolor="white"
        )


def _text(text: str, x: float, y: float, axes: Axes, *, heavy: bool) -> None:
    """Beside a row: x is a share of the width."""
    axes.annotate(
        text,
        (x, y),
        xycoords=("axes fraction", "data"),
        xytext=(6, 0),
        textcoords="offset points",
        verticalalignment="center_baseline",
        fontweight="bold" if heavy else "normal",
    )


def _legend(rows: Sequence[Row], axes: Axes) -> None:
    """The colours, and the shapes where there are several."""
    kinds = dict.fromkeys(row.kind for row in rows if row.kind)
    shapes = dict.fromkeys(mark.of for row in rows for mark in row.marks)
    handles = [Line2D([], [], color=COLOURS[kind], linewidth=4, label=kind) for kind in kinds]
    handles += [
        Line2D([], [], color="black", linestyle="", marker=SHAPES[shape], markersize=6, label=shape)
        for shape in shapes
    ]
    handles.append(Line2D([], [], color="black", marker=".", markersize=4, label="rounds"))
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=8, borderaxespad=0.2
    )


def round_numbers(low: float, high: float, unit: str) -> list[float]:
    """For a logarithmic axis, from below the lowest value to above the highest: not too many."""
    base, steps_of = (1024.0, POWERS_OF_TWO) if unit == "B" else (10.0, TENTHS)
    first, last = math.floor(math.log(low, base)) - 1, math.ceil(math.log(high, base)) + 1
    chosen: list[float] = []
    for steps in steps_of:
        numbers = [step * base**power for power in range(first, last + 1) for step in steps]
        below = max(number for number in numbers if number < low)
        above = min(number for number in numbers if number > high)
        chosen = [number for number in numbers if below <= number <= above]
        if len(chosen) <= MOST_TICKS:
            break
    return chosen


# ------------------------------------------------------------------------------------------ panels


def _panels(plot: Panels, canvas: Canvas) -> None:
    across = min(len(plot.panels), ACROSS)
    down = math.ceil(len(plot.panels) / across)
    is_alone = len(plot.panels) == 1
    canvas.set_size_inches(WIDTH * 0.75 if is_alone else across * PANEL_WIDTH, down * PANEL_HEIGHT)
    grid = canvas.subplots(down, across, squeeze=False)
    for axes, lines in zip(grid.flat, plot.panels, strict=False):
        _lines(lines, axes)
    for axes in grid.flat[len(plot.panels) :]:
        axes.remove()


def _lines(plot: Lines, axes: Axes) -> None:
    for number, line in enumerate(plot.lines):
        measured = [rounds for _, rounds in line.points]
        below = [statistics.median(rounds) - min(rounds) for rounds in measured]
        above = [max(rounds) - statistics.median(rounds) for rounds in measured]
        axes.errorbar(
            [x for x, _ in line.points],
            [statistics.median(rounds) for rounds in measured],
            yerr=[below, above],
            color=OF_LINES[number % len(OF_LINES)],
            marker=OF_POINTS[number % len(OF_POINTS)],
            capsize=3,
            label=line.label,
        )
    if plot.limit is not None:
        axes.axhline(plot.limit, color="black", linestyle="--", linewidth=1.0, label="target")
    xs = sorted({x for line in plot.lines for x, _ in line.points})
    places = xs
    if xs[0] > 0 and xs[-1] / xs[0] > 20:
        axes.set_xscale("log")
        places = [math.log(x) for x in xs]
    ticks = _apart(xs, places)
    axes.set_xticks(ticks, [f"{x:,g}" for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(textwrap.fill(plot.title, 42), fontsize=9)
    axes.set_xlabel(plot.x_title)
    axes.set_ylabel(plot.y_title)
    highest = max(y for line in plot.lines for _, rounds in line.points for y in rounds)
    axes.set_ylim(0.0, 1.1 * max(highest, plot.limit or 0.0))
    if plot.unit:
        axes.yaxis.set_major_formatter(lambda value, _: tick(value, plot.unit))
    if len(plot.lines) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    elif plot.limit is not None:
        axes.legend(handles=[axes.lines[-1]], loc="lower right")


def _apart(xs: Sequence[float], places: Sequence[float]) -> list[float]:
    """The last, and of the others those that leave room for what is written below the next."""
    least = (places[-1] - places[0]) * APART
    kept = [len(xs) - 1]
    for number in reversed(range(len(xs) - 1)):
        if places[kept[-1]] - places[number] >= least:
            kept.append(number)
    return [xs[number] for number in reversed(kept)]
