"""Counts the instructions of the hottest paths, and fails when one has grown by more than 5 %."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.child import BenchError
from bench.guard import measure, stored
from bench.guard.paths import PATHS
from bench.guard.stored import GREW, MISSING, SHRANK, Comparison, Figure

GROWN, FAILED, NOT_COMPARED = 1, 2, 3
AGAIN = 2  # how often what seems to have grown is counted once more
EXAMPLES = """\
examples:
  python -m bench.guard                    all paths, half a minute
  python -m bench.guard --only request --keep build/guard
                                           and where its instructions are: then
                                           callgrind_annotate build/guard/request.callgrind
  python -m bench.guard --store "requests carry a trace context, 40 instructions each"
                                           those that have left the tolerance, or have no figure yet
  python -m bench.guard --only request --store "..."
                                           these, in any case

exit codes:
  0  no path has grown by more than 5 %
  1  one has
  2  nothing could be counted, for instance because valgrind is not installed, or a stored figure
     was changed without its reason
  3  not compared: there are no figures for this compiler, Python and processor

paths:
"""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.guard",
        description=(__doc__ or "").splitlines()[0],
        epilog=(EXAMPLES + "".join(f"  {each.name:12}{each.title}\n" for each in PATHS.values())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", action="append", choices=PATHS, metavar="NAME", help="this path; may be repeated"
    )
    parser.add_argument(
        "--store", metavar="REASON", help="store the figures, and the reason why they may change"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="leave callgrind's files there, for annotation"
    )
    return parser


def number(count: float) -> str:
    return f"{count:,.1f}"


def change(comparison: Comparison, which: int) -> str:
    return f"{comparison.changes[which]:+.1%}" if comparison.changes else ""


def show(compared: list[Comparison]) -> None:
    """Print the table."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    table = Table()
    table.add_column("an operation of")
    for column in ("instructions of the core", "stored", "", "calls out of it", "stored", ""):
        table.add_column(column, justify="right")
    table.add_column("of all: instructions", justify="right")
    table.add_column("")
    for each in compared:
        figure = each.stored
        table.add_row(
            each.name,
            number(each.now.instructions),
            number(figure.instructions) if figure else "",
            change(each, 0),
            number(each.now.calls),
            number(figure.calls) if figure else "",
            change(each, 1),
            number(each.now.total),
            each.verdict,
            style="red" if each.verdict == GREW else None,
        )
    console.print(table)


def advice(compared: list[Comparison], here: str, places: list[str]) -> list[str]:
    """What is to be done about it, a line each."""
    by = {
        verdict: [each for each in compared if each.verdict == verdict]
        for verdict in (GREW, SHRANK, MISSING)
    }
    lines = []
    for each in by[GREW]:
        assert each.stored is not None
        lines.append(
            f"{each.name} has grown: {number(each.stored.instructions)} -> "
            f"{number(each.now.instructions)} instructions, {number(each.stored.calls)} -> "
            f"{number(each.now.calls)} calls. Make it cheaper; or, if it is worth that, store it "
            f'and say why: python -m bench.guard --only {each.name} --store "..."'
        )
        if each.stored.cython != stored.cython():
            lines.append(
                f"  its figure was stored with Cython {each.stored.cython}; this is "
                f"{stored.cython()}"
            )
    lines += [
        f"{each.name} has become cheaper: store it, or it may grow again unseen: "
        f'python -m bench.guard --only {each.name} --store "..."'
        for each in by[SHRANK]
    ]
    if by[MISSING]:
        names = ", ".join(each.name for each in by[MISSING])
        of = "\n".join(f"  {place}" for place in places) or "  (none)"
        lines.append(
            f"NOT COMPARED: {names}. There are stored figures of\n{of}\nand this is\n  {here}\n"
            "Whether a path has grown is to be seen there alone."
        )
    return lines


def compare(name: str, keep: Path | None, figure: Figure | None) -> Comparison:
    """Count a path. One that seems to have grown is counted again, and the least counts: what else
    the machine does meanwhile may add to it, as where the clock cuts a batch, and takes nothing
    away."""
    least = measure.count(name, keep)
    for _ in range(AGAIN):
        if Comparison(name, least, figure).verdict != GREW:
            break
        again = measure.count(name, keep)
        least = measure.Count(
            min(least.instructions, again.instructions),
            min(least.calls, again.calls),
            min(least.total, again.total),
        )
    return Comparison(name, least, figure)


def result(compared: list[Comparison]) -> int:
    """The exit code."""
    verdicts = {each.verdict for each in compared}
    if GREW in verdicts:
        return GROWN
    return NOT_COMPARED if MISSING in verdicts else 0


def main(words: list[str] | None = None) -> int:
    parser = arguments()
    given = parser.parse_args(words)
    reason = None if given.store is None else given.store.strip()
    if reason == "":
        parser.error("--store: say why the figures change")
    here = stored.environment(measure.core_file())
    names = given.only or list(PATHS)
    try:
        found = stored.read(stored.FILE, [(here, name) for name in names if reason is not None])
    except stored.Edited as error:
        print(f"bench.guard: {error}", file=sys.stderr)
        return FAILED
    figures, mine = found.figures, found.figures.get(here, {})
    compared = []
    try:
        for name in names:
            print(f"counting {name}", file=sys.stderr)
            compared.append(compare(name, given.keep, mine.get(name)))
    except BenchError as error:
        print(f"bench.guard: {error}", file=sys.stderr)
        return FAILED
    print(here)
    show(compared)
    if reason is not None:
        reasons = found.reasons(here)
        figures[here] = stored.updated(mine, compared, reason, every=bool(given.only))
        changed = [name for name, figure in figures[here].items() if figure != mine.get(name)]
        same = [name for name in changed if reasons.get(name) == reason]
        if same:
            parser.error(f"--store: that is the reason of the old figure of {', '.join(same)}")
        stored.write(figures, stored.FILE)
        print(f"stored: {', '.join(changed) or 'nothing, all are within the tolerance'}")
        return 0
    for line in advice(compared, here, list(figures)):
        print(line)
    return result(compared)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
