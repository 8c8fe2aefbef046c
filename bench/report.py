"""What a run is written as: tables on the terminal, and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.figures import Figure

COLUMNS = (
    "",
    "p50 / p99 / p99.9, or rate",
    "lowest–median–highest",
    "anchor",
    "ratio",
    "target",
    "met",
)

ROUNDS = 7  # of each benchmark, unless it is told otherwise
MOST_SECONDS = 900.0  # that a run of no more rounds may take
MOST_LOAD = 0.3  # the load average before a run on a machine that is quiet

__all__ = [
    "COLUMNS",
    "ROUNDS",
    "Report",
    "by_level",
    "read",
    "replace_between",
    "rows",
    "save",
    "show",
]


@dataclass
class Report:
    """One run.

    :ivar circumstances: when, which benchmarks, with which settings, and how busy the machine was.
    :ivar broken: benchmarks that failed, with the reason.
    :ivar skipped: benchmarks that this machine cannot run, with the reason.
    :ivar left_out: peers that are not measured because they are not installed, and what is missing.
    """

    machine: dict[str, Any]
    circumstances: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def missed(self) -> list[Figure]:
        """With a target that was not met, or could not be judged."""
        return [figure for figure in self.figures if figure.target and not figure.is_met]

    @property
    def complaints(self) -> list[str]:
        """Targets that were missed, benchmarks that were skipped, and that it took too long."""
        run = self.circumstances
        found = [f"target missed: {figure.title}" for figure in self.missed]
        found += [f"not measured: {name}, {reason}" for name, reason in self.skipped.items()]
        if run["seconds"] > MOST_SECONDS and run["rounds"] <= ROUNDS:
            found.append(f"too slow: {run['seconds']:.0f} s, {MOST_SECONDS:.0f} s at most")
        return found

    @property
    def unquiet(self) -> str:
        """That something else may have run beside it, if so."""
        load = self.circumstances["load_before"]
        if load <= MOST_LOAD:
            return ""
        return (
            f"the machine was not quiet: load {load:.2f} before the run; "
            f"the figures want {MOST_LOAD} at most"
        )

    def heading(self) -> list[str]:
        """Where the figures come from: a line for the machine, the versions, the run."""
        machine, run = self.machine, self.circumstances
        commit = machine["commit"] or "no commit"
        dirty = ", with changes" if machine["dirty"] else ""
        load = run["load_before"]
        where = (
            f"{machine['cpu']}, {machine['cpus_usable']} CPUs, {machine['memory_mib']} MiB, "
            f"{machine['system']} {machine['kernel']} {machine['architecture']}, "
            f"TCP {machine.get('congestion_control') or 'unknown'}"
        )
        what = (
            f"{machine['implementation']} {machine['python']}, domi_fast {machine['domi_fast']}, "
            f"uvloop {machine['uvloop']}, Cython {machine['cython']}, {machine['compiler']}"
        )
        how = (
            f"commit {commit[:12]}{dirty}; {run['when']}; {run['rounds']} rounds on CPUs "
            f"{', '.join(map(str, run['cpus']))}; {_minutes(run['seconds'])} in all; "
            f"load before {load:.2f}"
        )
        lines = [where, what, how]
        if any("-vs-" in figure.name for figure in self.figures):
            peers = machine.get("peers", {}).items()
            lines.insert(2, "beside " + ", ".join(f"{name} {version}" for name, version in peers))
        return lines


def by_level(figures: Sequence[Figure]) -> dict[str, list[Figure]]:
    found: dict[str, list[Figure]] = {}
    for figure in figures:
        found.setdefault(figure.level, []).append(figure)
    return found


def rows(figures: Sequence[Figure], *, judge: bool) -> list[tuple[str, ...]]:
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
        for figure in figures
    ]


def show(report: Report, *, judge: bool) -> None:
    """Print a table for each level."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    for line in report.heading():
        console.print(line, style="dim", markup=False)
    for level, figures in by_level(report.figures).items():
        table = Table(title=level or None, title_justify="left")
        for number, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if number in (0, 3) else "right")
        for row in rows(figures, judge=judge):
            style = "red" if row[-1] in ("no", "void") else None
            table.add_row(*row, style=style)
        console.print(table)
    for figure in report.figures:
        if figure.remark:
            console.print(f"{figure.name}: {figure.remark}", markup=False)
        if figure.void:
            console.print(f"{figure.name}: void, {figure.void}", style="red", markup=False)
    for name, reason in report.skipped.items():
        console.print(f"{name}: skipped, {reason}", markup=False)
    for name, reason in report.left_out.items():
        console.print(f"{name}: left out, {reason}", markup=False)
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
        "left_out": report.left_out,
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Report:
    """What :func:`save` wrote.

    :raises OSError: it cannot be read.
    :raises ValueError: it is something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = Report(
            machine=document["machine"],
            circumstances=document["circumstances"],
            figures=[Figure.from_json(figure) for figure in document["figures"]],
            broken=document["broken"],
            skipped=document["skipped"],
            left_out=document.get("left_out", {}),
        )
        found.heading()
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON, {error}") from None
    except UnicodeDecodeError:
        raise ValueError("no JSON, nor any text") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError("JSON, but not of a run of the benchmarks") from None
    return found


def replace_between(path: Path, start: str, end: str, lines: list[str]) -> None:
    """Put these lines between the two markers of a page, which must be there."""
    page = path.read_text(encoding="utf-8")
    before, found_start, rest = page.partition(start)
    _, found_end, after = rest.partition(end)
    if not found_start or not found_end:
        raise ValueError(f"{path} has no {start} and {end}")
    text = "\n".join(lines)
    path.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.1f} minutes"
