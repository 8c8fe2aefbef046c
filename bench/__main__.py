"""Measures domi_fast, each figure beside an anchor that was measured in turn with it."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console

from bench import report, scaling, summary
from bench.child import OUT, ROOT, BenchError
from bench.figures import Figure
from bench.machine import machine, processor_time
from bench.page import write_docs
from bench.peers.peer import PEERS
from bench.settings import Settings, Skip, choose_cpus
from bench.suite import BENCHMARKS, Benchmark
from bench.targets import TARGETS

PAGE = ROOT / "docs" / "benchmarks.md"
SCALING = ROOT / "docs" / "scaling.md"
README = ROOT / "README.md"
EXAMPLES = """\
examples:
  python -m bench                               everything, some fourteen minutes
  python -m bench --only call-reply --rounds 15
  python -m bench --only round-trip --only flood
  python -m bench --check                       exit code 1 also for a target that was missed or
                                                not measured, what was skipped, and more than
                                                15 minutes
  python -m bench --smoke                       only that the benchmarks run; seconds
  python -m bench --write-docs                  everything, into docs/ and README.md
  python -m bench --write-docs --from bench/out/latest.json

benchmarks:
"""


def arguments() -> argparse.ArgumentParser:
    listed = "".join(f"  {each.name:22}{each.title}\n" for each in BENCHMARKS)
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=(__doc__ or "").splitlines()[0],
        epilog=EXAMPLES + listed,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--smoke", action="store_true", help="see that all of it runs; no judgement"
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="benchmarks whose name has NAME in it"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="instead of bench/out/...json")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each (7)")
    parser.add_argument(
        "--cpus", metavar="A,B", help="the processors for servers and clients; chosen otherwise"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail when a target was missed or not measured, something skipped, or 15 minutes"
        " exceeded",
    )
    parser.add_argument(
        "--write-docs",
        action="store_true",
        help="put the results into the docs, with pictures (needs matplotlib)",
    )
    parser.add_argument(
        "--from", type=Path, dest="source", metavar="FILE", help="show this run; measure nothing"
    )
    return parser


def settings_of(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Settings:
    usable = os.sched_getaffinity(0)
    cpus = choose_cpus()
    if given.cpus:
        try:
            cpus = tuple(int(cpu) for cpu in given.cpus.split(","))
        except ValueError:
            parser.error(f"--cpus {given.cpus}: one or two numbers are allowed, for example 2,3")
        if not 1 <= len(cpus) <= 2 or len(set(cpus)) != len(cpus) or not usable.issuperset(cpus):
            parser.error(f"--cpus {given.cpus}: one or two of {sorted(usable)} are allowed")
    rounds = given.rounds if given.rounds is not None else 1 if given.smoke else report.ROUNDS
    if rounds < 1:
        parser.error(f"--rounds {rounds}: at least 1")
    return Settings(rounds, given.smoke, cpus)


def chosen(parser: argparse.ArgumentParser, only: list[str] | None) -> list[Benchmark]:
    for name in only or ():
        if not any(name in each.name for each in BENCHMARKS):
            names = ", ".join(each.name for each in BENCHMARKS)
            parser.error(f"--only {name}: there are {names}")
    return [each for each in BENCHMARKS if not only or any(name in each.name for name in only)]


def measure(benchmarks: Sequence[Benchmark], settings: Settings) -> report.Report:
    """Run them one after the other; what breaks does not hold up the rest."""
    began = time.monotonic()
    stolen_before, ticks_before = processor_time()
    found = report.Report(
        machine(),
        {
            "when": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "benchmarks": [each.name for each in benchmarks],
            "rounds": settings.rounds,
            "smoke": settings.smoke,
            "cpus": list(settings.cpus),
            "load_before": os.getloadavg()[0],
            "seconds_of_each": {},
        },
    )
    absent = {peer.title: peer.missing() for each in benchmarks for peer in each.peers}
    found.left_out = {title: reason for title, reason in absent.items() if reason}
    console = Console(stderr=True, highlight=False)
    for number, each in enumerate(benchmarks, 1):
        console.print(f"[{number}/{len(benchmarks)}] {each.name}", style="dim", markup=False)
        figures: list[Figure] = []
        began_one = time.monotonic()
        try:
            figures = each.run(settings)
        except Skip as reason:
            found.skipped[each.name] = str(reason)
        except BenchError as error:
            found.broken[each.name] = str(error)
            figures = list(error.figures)
        except Exception:
            found.broken[each.name] = traceback.format_exc()
        for figure in figures:
            figure.level = each.level
            figure.target = TARGETS.get(figure.name)
        found.figures += figures
        taken = round(time.monotonic() - began_one, 1)
        found.circumstances["seconds_of_each"][each.name] = taken
    stolen, ticks = processor_time()
    found.circumstances |= {
        "seconds": round(time.monotonic() - began, 1),
        "stolen": (stolen - stolen_before) / max(1, ticks - ticks_before),
    }
    return found


def terminated(number: int, frame: FrameType | None) -> None:
    # So that the workers are ended by those who started them.
    sys.exit(128 + number)


def stored(parser: argparse.ArgumentParser, source: Path) -> report.Report:
    """The run that ``--from`` names."""
    allowed = "a file that a run has written is allowed, for example bench/out/latest.json"
    try:
        return report.read(source)
    except OSError as error:
        parser.error(f"--from {source}: {error.strerror}; {allowed}")
    except ValueError as error:
        parser.error(f"--from {source}: {error}; {allowed}")


def refuse_place(parser: argparse.ArgumentParser, path: Path) -> None:
    """Before anything is measured, say why the results could not be written there."""
    is_there = os.path.lexists(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        parser.error(
            f"the results cannot be written to {path} ({error.strerror}: {error.filename}); "
            "--json FILE names another place, for example --json /tmp/run.json"
        )
    if not is_there:
        path.unlink()


def refuse_docs(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Before anything is measured, say what would keep the results out of the docs."""
    if importlib.util.find_spec("matplotlib") is None:
        parser.error(
            "--write-docs draws with matplotlib, which is not installed: "
            "pip install matplotlib (the extra [bench] has it)"
        )
    if not given.source and (given.smoke or given.only):
        parser.error("--write-docs wants a whole run: neither --smoke nor --only")


def refuse_part(parser: argparse.ArgumentParser, found: report.Report, source: Path) -> None:
    """The page is of whole runs."""
    run = found.circumstances
    if run["smoke"]:
        parser.error(f"--write-docs: {source} is of a smoke test, whose figures mean nothing")
    if lacking := lacking_in(found):
        parser.error(f"--write-docs wants a whole run; {source} does not have {', '.join(lacking)}")


def lacking_in(found: report.Report) -> list[str]:
    """The benchmarks that were not run."""
    measured = found.circumstances.get("benchmarks", ())
    return [each.name for each in BENCHMARKS if each.name not in measured]


def complaints_of(found: report.Report) -> list[str]:
    """What keeps the run from being one in which all was measured, in time, and met."""
    beside = {name.rpartition("-vs-")[2] for name in TARGETS}
    needed = {peer.title for peer in PEERS if peer.name in beside}
    said = [
        f"left out: {title}, {reason}"
        for title, reason in found.left_out.items()
        if title in needed
    ]
    if not lacking_in(found):
        measured = {figure.name for figure in found.figures}
        said += [f"target not measured: {name}" for name in TARGETS if name not in measured]
    return found.complaints + said


def main() -> int:
    parser = arguments()
    given = parser.parse_args()
    if given.write_docs:
        refuse_docs(parser, given)
    if given.source:
        found = stored(parser, given.source)
        if given.write_docs:
            refuse_part(parser, found, given.source)
    else:
        signal.signal(signal.SIGTERM, terminated)
        settings = settings_of(parser, given)
        benchmarks = chosen(parser, given.only)
        path = given.json or OUT / ("smoke.json" if given.smoke else "latest.json")
        refuse_place(parser, path)
        found = measure(benchmarks, settings)
        report.save(found, path)
        print(f"{found.circumstances['seconds']:g} s; {path}")
    smoke = bool(found.circumstances["smoke"])
    report.show(found, judge=not smoke)
    if found.broken:
        if given.write_docs:
            print("not written into the docs: a benchmark broke", file=sys.stderr)
        return 1
    if given.write_docs:
        if found.unquiet:
            print(found.unquiet, file=sys.stderr)
        scaling.write_docs(found, SCALING)
        summary.write_readme(found, README)
        for path in [README, SCALING, *write_docs(found, PAGE)]:
            print(f"wrote {os.path.relpath(path)}")
    complaints = complaints_of(found) if given.check and not smoke else []
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return int(bool(complaints))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
