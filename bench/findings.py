"""What a run says in sentences, made from its figures alone: who wins, how noisy it was."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.figures import Figure, write

WIDEST = 5
# How a ratio is said.
COMPARED = {
    "s": "the time of",
    "B": "the memory of",
    "/s": "the rate of",
    "B/s": "the rate of",
}

__all__ = ["COMPARED", "noise", "undecided", "where_others_win"]


def where_others_win(figures: Sequence[Figure]) -> list[str]:
    """Lines of Markdown: each figure that is on the losing side in every round, or by a tail."""
    compared = [figure for figure in figures if figure.is_compared]
    if not compared:
        return ["Nothing that others have made was measured in this run."]
    lost = [figure for figure in compared if figure.other_wins]
    said = (
        f"{len(compared)} figures stand beside the work of others. On the losing side, in every "
        f"round: {len(lost)}{':' if lost else '.'}"
    )
    lines = [said, "", *map(_compared, lost)]
    tails = [f"- {f.work}: {said}" for f in compared if not f.other_wins and (said := _tail(f))]
    if tails:
        lines += ["", "And these do not, but are slower among the slowest:", "", *tails]
    return lines


def undecided(figures: Sequence[Figure]) -> list[str]:
    """Lines of Markdown: each figure whose rounds are on both sides of the other's."""
    found = [figure for figure in figures if figure.is_undecided]
    worse = sum(figure.is_lost_at(statistics.median(figure.ratios)) for figure in found)
    said = "Figures that are better than the other's in some rounds, and not in others: "
    if not found:
        return [f"{said}0."]
    return [
        f"{said}{len(found)}, of which {worse} are worse by the median:",
        "",
        *map(_compared, found),
    ]


def _compared(figure: Figure) -> str:
    return f"- {figure.work}: {figure.ratio()} {COMPARED[figure.unit]} {figure.anchor}."


def _tail(figure: Figure) -> str:
    """Its p99 and p99.9, as far as they are longer than those of the other."""
    theirs = figure.anchor_columns
    medians = {
        of: (statistics.median(rounds), statistics.median(theirs[of]))
        for of, rounds in figure.columns.items()
        if of != figure.by and of in theirs
    }
    longer = [
        f"{of} {write(ours, 's')}, {figure.anchor} {write(others, 's')}"
        for of, (ours, others) in medians.items()
        if ours > others
    ]
    return f"{'; '.join(longer)}." if longer else ""


def noise(figures: Sequence[Figure], *, load: float, stolen: float | None) -> list[str]:
    """Lines of Markdown.

    :param load: the load average before the run.
    :param stolen: the share of the processors' time that the host kept for others meanwhile.
    """
    hosts = "" if stolen is None else f", and the host kept {stolen:.1%} of the processors' time"
    lines = [f"The load average before the run was {load:.2f}{hosts}."]
    # Ours stands beside each of the peers that it was measured with.
    once = {(figure.work, tuple(figure.judged)): figure for figure in figures}
    repeated = [figure for figure in once.values() if len(figure.judged) > 1]
    if not repeated:
        return [f"{lines[0]} There was one round of each figure: nothing shows how they vary."]
    spans = {id(figure): _span(figure) for figure in repeated}
    widest = sorted(repeated, key=lambda figure: -spans[id(figure)])[:WIDEST]
    lines[0] += (
        " For half of the figures, the highest round is above the lowest by no more than"
        f" {statistics.median(spans.values()):.0%} of the median. The widest are:"
    )
    lines += ["", *[f"- {f.work}: {f.spread()}, {_percent(spans[id(f)])}" for f in widest]]
    return lines


def _span(figure: Figure) -> float:
    """From the lowest to the highest round, as a share of the median."""
    width = max(figure.judged) - min(figure.judged)
    middle = abs(statistics.median(figure.judged))
    if not middle:
        return float("inf") if width else 0.0
    return width / middle


def _percent(span: float) -> str:
    return f"{span:.0%}." if span < float("inf") else "about a median of nothing."
