"""What the pictures of a run show: values in rows, or lines; nothing of how they are drawn."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.figures import Figure, write

OURS, OURS_OTHERWISE, OTHER = "domi_fast", "domi_fast, otherwise", "others"
MET, MISSED, UNJUDGED = "met", "missed", "not judged"
VERDICTS = {True: MET, False: MISSED, None: UNJUDGED}
FARTHEST = 100.0  # times better or worse than a target: what is farther is drawn there
# The name and the title of what compares figures of a unit.
COMPARED = {
    "/s": ("rates", "Rates"),
    "B/s": ("bytes", "Bytes a second"),
    "s": ("times", "Times"),
    "B": ("memory", "Memory"),
}

__all__ = ["Line", "Lines", "Mark", "Panels", "Plot", "Row", "Rows", "plots_of"]


@dataclass(frozen=True)
class Mark:
    """A value.

    :ivar of: what the legend calls its shape.
    :ivar middle: the median of the rounds, or what follows from it.
    """

    of: str
    rounds: Sequence[float]
    middle: float


@dataclass(frozen=True)
class Row:
    """
    :ivar kind: gives it its colour; a row of none is the heading of those below.
    :ivar note: stands at the end of the row, heavy if it is bad news.
    """

    label: str
    kind: str = ""
    marks: Sequence[Mark] = ()
    note: str = ""
    is_bad: bool = False


@dataclass(frozen=True)
class Rows:
    """Values on a logarithmic axis.

    :ivar name: of its file.
    :ivar alt: what it says, for those who do not see it.
    :ivar unit: of the axis, one of the figures' units or ``×``.
    :ivar base: what bars begin at, if there are to be bars.
    """

    name: str
    title: str
    alt: str
    axis: str
    unit: str
    rows: Sequence[Row]
    base: float | None = None


@dataclass(frozen=True)
class Line:
    """
    :ivar points: x, and the rounds of y.
    """

    label: str
    points: Sequence[tuple[float, Sequence[float]]]


@dataclass(frozen=True)
class Lines:
    """Values over a number of something, from zero.

    :ivar unit: of y, or empty where the title of the axis says it.
    :ivar limit: what y is to stay below, if that was said.
    """

    title: str
    x_title: str
    y_title: str
    unit: str
    lines: Sequence[Line]
    limit: float | None = None


@dataclass(frozen=True)
class Panels:
    """Several of them in one picture."""

    name: str
    title: str
    alt: str
    panels: Sequence[Lines]


Plot = Rows | Panels


def plots_of(figures: Sequence[Figure]) -> list[Plot]:
    """Those for which there are figures."""
    found: list[Plot] = [*targets(figures)]
    for who, title, of_these in (
        ("peers", "beside other libraries", [f for f in figures if is_of_peer(f)]),
        ("anchors", "beside the anchors", [f for f in figures if not is_of_peer(f)]),
    ):
        with_tails = [figure for figure in of_these if figure.unit == "s" and figure.p99]
        found += comparison(f"{who}-latency", f"Latency {title}", with_tails)
        for unit, (name, what) in COMPARED.items():
            compared = [f for f in of_these if f.is_compared and f.unit == unit and not f.p99]
            found += comparison(f"{who}-{name}", f"{what} {title}", compared)
    return [*found, *fan_out(figures), *growth(figures)]


def is_of_peer(figure: Figure) -> bool:
    """Beside the same work done with another library."""
    return "-vs-" in figure.name


# ----------------------------------------------------------------------------------------- targets


def targets(figures: Sequence[Figure]) -> list[Plot]:
    """How many times better than its target each figure is: 1 is just met."""
    judged = [f for f in figures if f.target is not None and f.target.judged(f)]
    if not judged:
        return []
    titles: dict[str, list[str]] = {MET: [], MISSED: [], UNJUDGED: []}
    for figure in judged:
        titles[VERDICTS[figure.is_met]].append(figure.title)
    said = [f"{len(those)} {verdict}" for verdict, those in titles.items() if those]
    missed = f"; missed: {'; '.join(titles[MISSED])}" if titles[MISSED] else ""
    return [
        Rows(
            "targets",
            "How far each figure is from its target",
            f"Of {len(judged)} targets: {', '.join(said)}{missed}.",
            "times better than the target; left of 1 it is missed",
            "×",
            [target_row(figure) for figure in judged],
            base=1.0,
        )
    ]


def target_row(figure: Figure) -> Row:
    target = figure.target
    assert target is not None
    judged = target.judged(figure)

    def margin(measured: float) -> float:
        if target.at_most:
            times = target.bound / measured if measured > 0.0 else FARTHEST
        else:
            times = measured / target.bound
        return min(max(times, 1.0 / FARTHEST), FARTHEST)

    middle = statistics.median(judged)
    verdict = VERDICTS[figure.is_met]
    mark = Mark("median", [margin(measured) for measured in judged], margin(middle))
    measured = write(middle, figure.unit if target.of == "value" else "×")
    note = f"{measured}, wanted {figure.wanted()}" + (", void" if figure.void else "")
    return Row(figure.title, verdict, [mark], note, verdict == MISSED)


# ---------------------------------------------------------------------------------- beside others


def comparison(name: str, title: str, figures: Sequence[Figure]) -> list[Plot]:
    """What is compared in a heading; below it ours and the others."""
    # A logarithmic axis has no place for less.
    figures = [f for f in figures if min([*f.values, *f.anchor_values], default=0.0) > 0.0]
    if not figures:
        return []
    works: dict[str, list[Figure]] = {}
    for figure in figures:
        key = figure.name.partition("-vs-")[0] if is_of_peer(figure) else figure.title
        works.setdefault(key, []).append(figure)
    lost = [f"{figure.work} ({figure.anchor})" for figure in figures if figure.other_wins]
    losses = f"others win in {len(lost)} of {len(figures)}{': ' * bool(lost)}{'; '.join(lost)}"
    better = "less" if figures[0].less_is_better else "more"
    return [
        Rows(
            name,
            title,
            f"{title}; {losses}.",
            f"{better} is better",
            figures[0].unit,
            [row for of_one in works.values() for row in work_rows(of_one)],
        )
    ]


def work_rows(figures: Sequence[Figure]) -> list[Row]:
    """The same work: ours once, unless it was measured again with another."""
    rows = [Row(figures[0].work)]
    values: list[float] = []
    for figure in figures:
        if figure.values != values:
            rows.append(Row(OURS, OURS, _marks(figure.columns)))
            values = figure.values
        if figure.ratios:
            kind = OURS_OTHERWISE if figure.anchor_is_ours else OTHER
            note = write(statistics.median(figure.ratios), "×")
            note += ", the other wins" if figure.other_wins else ""
            note += ", not decided" if figure.is_undecided else ""
            marks = _marks(figure.anchor_columns)
            rows.append(Row(figure.anchor, kind, marks, note, figure.other_wins))
    return rows


def _marks(columns: Mapping[str, Sequence[float]]) -> list[Mark]:
    """Where there are no percentiles, a round's only value has no name of its own."""
    names = {"p50": "median"} if len(columns) == 1 else {}
    return [
        Mark(names.get(of, of), rounds, statistics.median(rounds)) for of, rounds in columns.items()
    ]


# ------------------------------------------------------------------------------------------- lines


def fan_out(figures: Sequence[Figure]) -> list[Plot]:
    """Deliveries a second over the number of subscribers: ``publish-10``, ``publish-10-vs-...``."""
    # Ours stands beside each of those that it was measured with, and is drawn once.
    runs = dict.fromkeys(
        (label, float(counted[1]), tuple(rounds))
        for figure in figures
        if figure.unit == "/s" and (counted := re.match(r"publish-(\d+)\b", figure.name))
        for label, rounds in ((OURS, figure.values), (figure.anchor, figure.anchor_values))
        if rounds
    )
    if not runs:
        return []
    found: dict[str, dict[float, list[float]]] = {}
    for label, subscribers, rounds in runs:
        found.setdefault(label, {}).setdefault(subscribers, []).extend(rounds)
    lines = [Line(label, sorted(points.items())) for label, points in found.items()]
    said = "; ".join(f"{line.label} {_ends(line, '/s')}" for line in lines)
    title = "Deliveries of a publish over the number of subscribers"
    return [
        Panels(
            "publish",
            title,
            f"{title}, a second: {said}.",
            [Lines("", "subscribers", "deliveries", "/s", lines)],
        )
    ]


def growth(figures: Sequence[Figure]) -> list[Plot]:
    """The curves of the figures that have one; those with the same axes in one panel."""
    by_axes: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        if curve := figure.detail.get("curve"):
            by_axes.setdefault((curve["x_title"], curve["y_title"]), []).append(figure)
    if not by_axes:
        return []
    panels = [panel(*axes, of_these) for axes, of_these in by_axes.items()]
    said = [
        f"{each.title} over {each.x_title}: {'; '.join(_ends(a, each.unit) for a in each.lines)}"
        for each in panels
    ]
    return [Panels("growth", "How cost grows", f"How cost grows. {'. '.join(said)}.", panels)]


def panel(x_title: str, y_title: str, figures: Iterable[Figure]) -> Lines:
    """A title of y that ends with the figures' unit has its numbers in that."""
    lines: dict[tuple[tuple[float, float], ...], Line] = {}
    limit = None
    unit = ""
    for figure in figures:
        curve = figure.detail["curve"]
        points = tuple(zip(curve["x"], curve["y"], strict=True))
        # Figures of several sizes may have one curve.
        lines[points] = Line(figure.title, [(x, [y]) for x, y in points])
        target = figure.target
        if target is not None and target.of == "ratio" and target.at_most:
            limit = target.bound * points[0][1]
        if y_title.endswith(f", {figure.unit}"):
            unit = figure.unit
    title = y_title.removesuffix(f", {unit}") if unit else y_title
    return Lines(title, x_title, "", unit, list(lines.values()), limit)


def _ends(line: Line, unit: str) -> str:
    (first, low), (last, high) = line.points[0], line.points[-1]
    written: Callable[[float], str] = (lambda y: write(y, unit)) if unit else "{:.3g}".format
    return (
        f"{written(statistics.median(low))} at {first:,g}, "
        f"{written(statistics.median(high))} at {last:,g}"
    )
