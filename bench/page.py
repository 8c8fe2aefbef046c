"""The results in docs/benchmarks.md: where they come from, pictures, findings and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.findings import noise, undecided, where_others_win
from bench.matrix import matrix
from bench.plots import Plot, plots_of
from bench.report import COLUMNS, Report, by_level, replace_between, rows

START, END = "<!-- bench:start -->", "<!-- bench:end -->"

__all__ = ["write_docs"]


def write_docs(report: Report, page: Path) -> list[Path]:
    """Put the results between the two markers of the page, and their pictures into a folder of its
    name beside it; the paths that were written. matplotlib must be there.

    :raises ValueError: the page has no such markers.
    """
    folder = page.with_suffix("")
    plots = plots_of(report.figures)
    lines = [f"- {line}" for line in report.heading()]
    for plot in plots:
        lines += ["", f"![{plot.alt}]({folder.name}/{plot.name}.svg)"]
    if report.unquiet:
        lines.insert(0, f"**Beware: {report.unquiet}.**\n")
    circumstances = report.circumstances
    load, stolen = circumstances["load_before"], circumstances.get("stolen")
    lines += ["", "### Where others win", "", *where_others_win(report.figures)]
    lines += ["", "### What the run does not decide", "", *undecided(report.figures)]
    if beside := matrix(report):
        lines += ["", "### Peer by peer", "", *beside]
    lines += ["", "### How noisy it was", "", *noise(report.figures, load=load, stolen=stolen)]
    lines += ["", "### All figures", *tables(report)]
    replace_between(page, START, END, lines)
    return [page, *draw_all(plots, folder)]


def draw_all(plots: Sequence[Plot], folder: Path) -> list[Path]:
    """And no picture of an earlier run is left."""
    from bench import pictures

    folder.mkdir(exist_ok=True)
    paths = [folder / f"{plot.name}.svg" for plot in plots]
    for plot, path in zip(plots, paths, strict=True):
        pictures.draw(plot, path)
    for path in set(folder.glob("*.svg")) - set(paths):
        path.unlink()
    return paths


def tables(report: Report) -> list[str]:
    lines = []
    for level, figures in by_level(report.figures).items():
        lines += ["", *([f"#### {level}", ""] if level else [])]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows(figures, judge=True)]
    lines += [f"\n`{each.name}`: {each.remark}." for each in report.figures if each.remark]
    lines += [f"\n`{each.name}` is void: {each.void}." for each in report.figures if each.void]
    lines += [f"\n`{name}` was skipped: {reason}." for name, reason in report.skipped.items()]
    lines += [f"\n{name} was left out: {reason}." for name, reason in report.left_out.items()]
    return lines
