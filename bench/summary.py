"""What a run comes to in a few lines: the table in README.md."""

from __future__ import annotations

import statistics
from pathlib import Path

from bench.figures import write
from bench.findings import COMPARED
from bench.report import Report, replace_between

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
COLUMNS = ("", "median", "that is")
# What is said of each, its figure, and the figures of the peers whom it stands beside too.
ROWS = (
    ("An awaited request, both processes on one core", "round-trip-one-core", ()),
    ("The same with a core for each, both polling", "busy-round-trip", ()),
    ("256 awaited requests in flight", "requests-256", ("nats", "grpc")),
    ("A call and its reply, by handlers in Python", "call-reply", ("pyzmq",)),
    ("The same by verbs and handlers of lists", "call-reply-lists", ()),
    ("16 bytes one way", "notify-16B", ("pyzmq",)),
    ("1 MiB one way", "notify-1MiB", ("pyzmq",)),
    ("A publish to 1,000 sessions, sends", "fan-out", ()),
    ("Memory of an idle session", "idle-session", ()),
)

__all__ = ["rows", "write_readme"]


def rows(report: Report) -> list[tuple[str, str, str]]:
    """Of what the run has measured: what, its median, and the medians of its ratios to others."""
    figures = {figure.name: figure for figure in report.figures}
    found = []
    for what, name, peers in ROWS:
        if name in figures:
            figure = figures[name]
            beside = [figure, *(figures.get(f"{name}-vs-{peer}", figure) for peer in peers)]
            ratios = {
                each.anchor: write(statistics.median(each.ratios), "×")
                for each in beside
                if each.ratios
            }
            of = COMPARED[figure.unit]
            said = ", ".join(f"{ratio} {of} {anchor}" for anchor, ratio in ratios.items())
            found.append((what, write(statistics.median(figure.judged), figure.unit), said))
    return found


def write_readme(report: Report, path: Path) -> None:
    """Put them between the two markers of the page."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(report)]
    machine, run = report.machine, report.circumstances
    lines += ["", f"{machine['cpu']}, {run['when']}; the page has the whole run."]
    replace_between(path, START, END, lines)
