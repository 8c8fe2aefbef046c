"""What a run is written as: a table on the terminal, JSON, and a section of the documentation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.figures import Figure

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
COLUMNS = (
    "",
    "p50 / p99 / p99.9, or rate",
    "lowest–median–highest",
    "anchor",
    "ratio",
    "target",
    "met",
)

__all__ = ["Report", "read", "save", "show", "write_docs"]


@dataclass
class Report:
    """One run.

    :ivar circumstances: when, with which settings, and how busy the machine was.
    :ivar broken: benchmarks that failed, with the reason.
    :ivar skipped: benchmarks that this machine cannot run, with the reason.
    """

    machine: dict[str, Any]
    circumstances: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def missed(self) -> list[Figure]:
        """With a target that was not met, or could not be judged."""
        return [figure for figure in self.figures if figure.target and not figure.is_met]

    def heading(self) -> list[str]:
        """Where the figures come from: a line for the machine, the versions, the run."""
        machine, run = self.machine, self.circumstances
        commit = machine["commit"] or "no commit"
        dirty = ", with changes" if machine["dirty"] else ""
        load = run["load_before"]
        where = (
            f"{machine['cpu']}, {machine['cpus_usable']} CPUs, {machine['memory_mib']} MiB, "
            f"{machine['system']} {machine['kernel']} {machine['architecture']}"
        )
        what = (
            f"{machine['implementation']} {machine['python']}, domi_fast {machine['domi_fast']}, "
            f"uvloop {machine['uvloop']}, Cython {machine['cython']}, {machine['compiler']}"
        )
        how = (
            f"commit {commit[:12]}{dirty}; {run['when']}; {run['rounds']} rounds on CPUs "
            f"{', '.join(map(str, run['cpus']))}; load before {load:.2f}"
        )
        return [where, what, how]


def rows(report: Report, *, judge: bool) -> list[tuple[str, ...]]:
    words = {True: "yes", False: "no", None: ""}
    return [
        (
            figure.title,
            figure.measured(),
            figure.spread(),
            figure.anchored(),
            figure.ratio(),
            figure.wanted(),
            (figure.void and "void") or words[figure.is_met] if judge else "",
        )
        for figure in report.figures
    ]


def show(report: Report, *, judge: bool) -> None:
    """Print the table."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    for line in report.heading():
        console.print(line, style="dim", markup=False)
    table = Table()
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number in (0, 3) else "right")
    for row in rows(report, judge=judge):
        style = "red" if row[-1] in ("no", "void") else None
        table.add_row(*row, style=style)
    console.print(table)
    for figure in report.figures:
        if figure.name == "flood":
            detail = figure.detail
            console.print(
                f"flood: {detail['flood_per_s'] / 1e6:.2f} M/s ({detail['priority_of_the_flood']}),"
                f" the server's core {detail['share_of_the_servers_core']:.0%} busy",
                markup=False,
            )
        if figure.void:
            console.print(f"{figure.name}: void, {figure.void}", style="red", markup=False)
    for name, reason in report.skipped.items():
        console.print(f"{name}: skipped, {reason}", markup=False)
    for name, reason in report.broken.items():
        console.print(f"{name}: {reason}", style="red", markup=False)


def save(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "format": 1,
        "machine": report.machine,
        "circumstances": report.circumstances,
        "figures": [figure.to_json() for figure in report.figures],
        "broken": report.broken,
        "skipped": report.skipped,
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Report:
    """What :func:`save` wrote."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return Report(
        machine=document["machine"],
        circumstances=document["circumstances"],
        figures=[Figure.from_json(figure) for figure in document["figures"]],
        broken=document["broken"],
        skipped=document["skipped"],
    )


def write_docs(report: Report, path: Path) -> None:
    """Put the results between the two markers of the page."""
    lines = ["", *[f"- {line}" for line in report.heading()], ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(report, judge=True)]
    lines += [f"\n`{each.name}` is void: {each.void}." for each in report.figures if each.void]
    lines += [f"\n`{name}` was skipped: {reason}." for name, reason in report.skipped.items()]
    page = path.read_text(encoding="utf-8")
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{path} has no {START} and {END}")
    path.write_text(f"{before}{START}\n" + "\n".join(lines) + f"\n\n{END}{after}", encoding="utf-8")
