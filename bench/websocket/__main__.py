"""Measures WebSocket libraries beside each other, each by a bare server on uvloop.

A round measures every library in turn, in processes of its own; the figures are medians of the
rounds, with the lowest and the highest, and how many times the slowest library's (of memory: what
part of the largest).
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.child import Child
from bench.processor import stay
from bench.websocket.processes import ask, await_clients, compiled, order, started
from bench.websocket.servers import SERVERS
from tests.autobahn import suite

CONNECTIONS = 64  # of the echo
MESSAGE = 125  # bytes
FRAME = 2 + MESSAGE  # bytes, from a server
FEW, MANY = 1_000, 10_000  # clients of a broadcast
DELIVERIES = 200_000  # of one broadcast measurement, each message counted for each client
SECONDS = 2.0  # of the echo
SPARE = 200  # descriptors beside the connections

# The title of each figure, and how many digits behind the point it has.
FIGURES = {
    "echo/s": 0,
    "echo, CPU µs": 1,
    f"to {FEW:,}: deliveries/s": 0,
    f"to {MANY:,}: deliveries/s": 0,
    f"to {MANY:,}: CPU µs": 1,
    f"encoded once, to {MANY:,}: deliveries/s": 0,
    f"encoded once, to {MANY:,}: CPU µs": 1,
    "KiB per idle connection": 1,
}

Figures = dict[str, dict[str, list[float]]]


def broadcast(server: Child, loads: dict[Child, int], *, encoded: bool) -> list[float]:
    """Deliveries in a second, and microseconds of the server's processor for each."""
    clients = sum(loads.values())
    count = DELIVERIES // clients
    before = await_clients(server, clients)["cpu"]
    for load, its in loads.items():
        load.say(f"drain {its * count * FRAME}")
    began = ask(server, order("broadcast", encoded=encoded, count=count, size=MESSAGE))["began"]
    ended = max(load.answer()["ended"] for load in loads)
    cpu = ask(server, order("state"))["cpu"] - before
    return [DELIVERIES / (ended - began), cpu / DELIVERIES * 1e6]


def measure(name: str, load: Path, cpus: list[int]) -> list[float]:
    """One round of one library, in the order of :data:`FIGURES`."""
    command = [str(load)]
    with (
        started(name, cpus[0]) as server,
        Child("load", command) as few,
        Child("load", command) as rest,
    ):
        for each in (few, rest):
            stay(each.pid, cpus[-1])
        port = server.answer()["port"]
        ask(few, f"connect {port} {CONNECTIONS}")
        before = await_clients(server, CONNECTIONS)["cpu"]
        rate = ask(few, f"echo {SECONDS} {MESSAGE}")["rate"]
        cpu = ask(server, order("state"))["cpu"] - before
        ask(few, "close")
        resident = await_clients(server, 0)["resident"]
        ask(few, f"connect {port} {FEW}")
        ask(rest, f"connect {port} {MANY - FEW}")
        memory = (await_clients(server, MANY)["resident"] - resident) / MANY / 1024
        all_of_them = {few: FEW, rest: MANY - FEW}
        to_many = broadcast(server, all_of_them, encoded=False)
        encoded = broadcast(server, all_of_them, encoded=True)
        ask(rest, "close")
        to_few = broadcast(server, {few: FEW}, encoded=False)
        return [rate, cpu / (rate * SECONDS) * 1e6, to_few[0], *to_many, *encoded, memory]


def conformance(name: str, cpu: int, folder: Path) -> str:
    """How many of the cases without limits and compression pass, and which do not."""
    with started(name, cpu) as server:
        found = suite.run(f"ws://127.0.0.1:{server.answer()['port']}", folder / "autobahn")
    failed = [case for case, each in found.items() if not each.passed]
    return " ".join([f"{len(found) - len(failed)}/{len(found)}", *failed])


def cell(title: str, name: str, found: Figures) -> str:
    """The median, its spread, and its ratio to the slowest in the same run."""
    values, digits = found[name][title], FIGURES[title]
    medians = {each: statistics.median(of[title]) for each, of in found.items()}
    is_rate = title.endswith("/s")
    base = min(medians.values()) if is_rate else max(medians.values())
    low, middle, high = (
        f"{value:,.{digits}f}" for value in (min(values), medians[name], max(values))
    )
    return f"{middle} ({low}–{high}) ×{medians[name] / base:.2f}"


def show(found: Figures, passed: dict[str, str]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 180
    table = Table(title="median (lowest–highest) × the slowest, or the largest")
    table.add_column("")
    for name in found:
        table.add_column(name)
    if passed:
        table.add_row("Autobahn", *(passed[name] for name in found))
    for title in FIGURES:
        table.add_row(title, *(cell(title, name, found) for name in found))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.websocket", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each library (5)")
    parser.add_argument("--only", action="append", metavar="NAME", help="libraries with NAME in it")
    parser.add_argument("--autobahn", action="store_true", help="the Autobahn test suite too")
    given = parser.parse_args()
    # The first word of a name is the module's.
    here = [name for name in SERVERS if find_spec(name.replace(",", " ").split()[0])]
    names = [name for name in here if any(part in name for part in given.only or [""])]
    if not names or given.rounds < 1:
        parser.error(f"--only wants a part of {'; '.join(here)}; --rounds at least 1")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < MANY + SPARE:
        parser.error(f"{MANY + SPARE} open files are needed, {hard} are allowed: ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the children inherit it
    cpus = sorted(os.sched_getaffinity(0))[-2:]
    found: Figures = {name: defaultdict(list) for name in names}
    passed = {}
    progress = Console(stderr=True, highlight=False, style="dim")
    with tempfile.TemporaryDirectory(prefix="domi-") as folder:
        for name in names if given.autobahn else ():
            progress.print(f"Autobahn: {name}", markup=False)
            passed[name] = conformance(name, cpus[0], Path(folder))
        load = compiled(Path(folder))
        for number in range(given.rounds):
            # Nobody always comes after the same one.
            for name in names[number % len(names) :] + names[: number % len(names)]:
                progress.print(f"[{number + 1}/{given.rounds}] {name}", markup=False)
                values = measure(name, load, cpus)
                for title, value in zip(FIGURES, values, strict=True):
                    found[name][title].append(value)
    show(found, passed)


if __name__ == "__main__":
    main()
