"""Latency: how long one answer takes, and how long the loop's other work waits meanwhile."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

from bench.child import ROOT, BenchError
from bench.figures import Figure
from bench.peers import c_echo
from bench.settings import Settings, in_turn
from bench.two_process.processes import (
    cluster,
    module_command,
    start,
    start_pair,
)

BUSY_POLL = 0.01
POLLING = 0.9  # share of its core that a node that polls has at least
KINDS = {"soon": "call_soon", "timer": "a 5 ms timer"}
LATENESSES = {"p99": "p99", "phase": "longest in 0.1 s", "max": "longest of all"}

__all__ = [
    "busy",
    "busy_unix",
    "first_answer",
    "round_trip_one_core",
    "round_trip_two_cores",
    "round_trip_unix",
]


def trips_between(
    cpus: tuple[int, int], warm_up: int, count: int, *more: object, unix: bool = False
) -> dict[str, Any]:
    """Awaited requests one at a time, between fresh processes."""
    with cluster() as (stack, folder):
        client = start_pair(stack, folder, cpus, *more, unix=unix)
        measured = client.ask("round_trips", warm_up=warm_up, count=count)
    if measured["address"].startswith("unix:") != unix:
        raise BenchError(f"the session went over {measured['address']}")
    return measured


def round_trips(
    figure: Figure,
    settings: Settings,
    cpus: tuple[int, int],
    *more: object,
    unix: bool = False,
    busy: bool = False,
) -> list[Figure]:
    """Awaited requests one at a time, beside the echo in C.

    :param more: of the command line of both ends.
    :param busy: both ends of the echo poll.
    """
    count, warm_up = settings.few(20_000), settings.few(5_000)

    def ours() -> None:
        figure.add_percentiles(trips_between(cpus, warm_up, count, *more, unix=unix))

    def anchor() -> None:
        measured = c_echo.round_trip(*cpus, count, busy, unix, warm_up=warm_up)
        figure.add_anchor_percentiles(measured)

    for number in range(settings.rounds):
        in_turn(number, anchor, ours)
    return [figure]


def round_trip_one_core(settings: Settings) -> list[Figure]:
    figure = Figure(
        "round-trip-one-core",
        "Awaited request, 2 processes, 1 core",
        "s",
        anchor="C epoll echo",
    )
    return round_trips(figure, settings, (settings.cpus[0], settings.cpus[0]))


def round_trip_two_cores(settings: Settings) -> list[Figure]:
    figure = Figure(
        "round-trip-two-cores", "Awaited request, 2 processes, 2 cores", "s", anchor="C epoll echo"
    )
    return round_trips(figure, settings, settings.pair())


def round_trip_unix(settings: Settings) -> list[Figure]:
    figure = Figure(
        "round-trip-unix",
        "Awaited request, UNIX socket, 1 core",
        "s",
        anchor="C epoll echo, UNIX",
    )
    return round_trips(figure, settings, (settings.cpus[0], settings.cpus[0]), unix=True)


def time_to_answer(command: list[str], cpu: int) -> float:
    """Seconds from starting a program on this CPU until it prints ``right``.

    What it imports is kept compiled, as that of packages is which were installed.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        # A program that hangs ends without a word, which is an error below.
        watchdog = threading.Timer(30.0, process.kill)
        watchdog.start()
        try:
            os.sched_setaffinity(process.pid, {cpu})
            assert process.stdout is not None
            line = process.stdout.readline()
            taken = time.perf_counter() - began
            process.wait()
        finally:
            watchdog.cancel()
            if process.poll() is None:
                process.kill()
    if line.strip() != "right":
        raise BenchError(f"{command[-1]} printed {line!r}")
    return taken


def first_answer(settings: Settings) -> list[Figure]:
    figure = Figure(
        "first-answer",
        "Start of a program to its first answer",
        "s",
        anchor="Python that imports uvloop",
    )
    cpus = settings.pair()

    with cluster() as (stack, folder):
        start(stack, "server", folder, cpus[0])
        registry = f"sqlite://{folder / 'registry.db'}"
        ours = module_command("bench.two_process.first_answer", registry)
        bare = [sys.executable, "-c", "import uvloop; print('right', flush=True)"]
        time_to_answer(ours, cpus[1])
        time_to_answer(bare, cpus[1])
        for number in range(settings.rounds):
            in_turn(
                number,
                lambda: figure.anchor_values.append(time_to_answer(bare, cpus[1])),
                lambda: figure.values.append(time_to_answer(ours, cpus[1])),
            )
    return [figure]


# --------------------------------------------------------------------------------------- polling


def busy(settings: Settings) -> list[Figure]:
    """Both ends poll, so that no core has to be woken; and what else their loops do meanwhile."""
    figure = Figure(
        "busy-round-trip",
        "Awaited request, both ends polling, 2 cores",
        "s",
        anchor="C polling echo",
    )
    cpus = settings.pair()
    return [
        *round_trips(figure, settings, cpus, "--busy-poll", BUSY_POLL, busy=True),
        busy_one_core(settings),
        *lateness(settings, cpus),
    ]


def busy_unix(settings: Settings) -> list[Figure]:
    figure = Figure(
        "busy-unix",
        "Awaited request, both ends polling, UNIX socket, 2 cores",
        "s",
        anchor="C polling echo, UNIX",
    )
    polling = "--busy-poll", BUSY_POLL
    return round_trips(figure, settings, settings.pair(), *polling, unix=True, busy=True)


def busy_one_core(settings: Settings) -> Figure:
    """Each polls while the other is to answer: that they get there at all is the point."""
    figure = Figure(
        "busy-one-core",
        "Awaited request, both ends polling, 1 core",
        "s",
        anchor="without polling",
        anchor_is_ours=True,
    )
    # A round trip might take as long as the scheduler leaves a process that never sleeps.
    most = {"warm_up": settings.few(100), "count": settings.few(20_000), "seconds": 2.0}
    cpus = (settings.cpus[0], settings.cpus[0])

    def measure(*more: object) -> dict[str, Any]:
        with cluster() as (stack, folder):
            return start_pair(stack, folder, cpus, *more).ask("round_trips", **most)

    for number in range(settings.rounds):
        in_turn(
            number,
            lambda: figure.add_anchor_percentiles(measure()),
            lambda: figure.add_percentiles(measure("--busy-poll", BUSY_POLL)),
        )
    return figure


def lateness(settings: Settings, cpus: tuple[int, int]) -> list[Figure]:
    """How late a loop's other work is while its node polls, beside a node that does not.

    One that polls has no right of way: others that share its core, and a virtual machine's host,
    hold it up for milliseconds now and then. What is judged is therefore the longest wait in most
    phases of a tenth of a second, not that of all.
    """
    figures = {
        (kind, of): Figure(
            f"busy-{kind}-{of}", f"Lateness of {title} beside a polling node, {title_of}", "s"
        )
        for kind, title in KINDS.items()
        for of, title_of in LATENESSES.items()
    }
    for figure in figures.values():
        figure.anchor = "without polling"
        figure.anchor_is_ours = True
    phases = settings.few(20)
    shares, waits = [], []

    def measure(*more: object) -> dict[str, Any]:
        with cluster() as (stack, folder):
            return start_pair(stack, folder, cpus, *more).ask("lateness", phases=phases, count=20)

    def add(measured: dict[str, Any], to: str) -> None:
        for (kind, of), figure in figures.items():
            found = measured[kind]
            taken = statistics.median(found["longest_ns"]) if of == "phase" else found[f"{of}_ns"]
            getattr(figure, to).append(taken * 1e-9)
            figure.samples = found["count"]

    def ours() -> None:
        measured = measure("--busy-poll", BUSY_POLL)
        add(measured, "values")
        shares.append(measured["share_of_the_core"])
        waits.append(measured["kept_waiting_s"])

    def anchor() -> None:
        add(measure(), "anchor_values")

    for number in range(settings.rounds):
        in_turn(number, anchor, ours)
    share = statistics.median(shares)
    for figure in figures.values():
        figure.detail = {
            "share_of_the_core": share,
            "seconds_kept_waiting": statistics.median(waits),
        }
        if share < POLLING:
            figure.void = f"the node polled only {share:.0%} of the time: what else runs here?"
    return list(figures.values())
