"""The benchmarks: what is run, in what order, on which processors.

Each gives figures, and runs its anchor in turn with itself: the machine may be in another mood a
minute later.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.figures import Figure, Target
from bench.peers import c_echo, raw_stream
from bench.two_process.processes import ROOT, BenchError, Worker, module_command

KIB = 1024
MIB = 1024 * KIB
BUSY = 0.6  # share of its core that a flooded server has at least

__all__ = ["BENCHMARKS", "Benchmark", "Settings", "Skip", "choose_cpus"]


class Skip(Exception):
    """A benchmark cannot be run on this machine."""


@dataclass(frozen=True)
class Settings:
    """How much is measured, and where.

    :ivar cpus: one processor or two: servers run on the first, clients on the second.
    """

    rounds: int
    smoke: bool
    cpus: tuple[int, ...]

    def few(self, count: int) -> int:
        """That many, or next to nothing for a smoke test."""
        return max(1, count // 100) if self.smoke else count

    def pair(self) -> tuple[int, int]:
        if len(self.cpus) < 2:
            raise Skip("it needs two processors")
        return self.cpus[0], self.cpus[1]


@dataclass(frozen=True)
class Benchmark:
    name: str
    title: str
    run: Callable[[Settings], list[Figure]]


BENCHMARKS: list[Benchmark] = []


def benchmark(
    name: str, title: str
) -> Callable[[Callable[[Settings], list[Figure]]], Callable[[Settings], list[Figure]]]:
    def add(run: Callable[[Settings], list[Figure]]) -> Callable[[Settings], list[Figure]]:
        BENCHMARKS.append(Benchmark(name, title, run))
        return run

    return add


def choose_cpus() -> tuple[int, ...]:
    """Two usable processors, on cores of their own where that can be told; or the only one."""
    chosen: dict[tuple[str, str], int] = {}
    usable = sorted(os.sched_getaffinity(0))
    for cpu in usable:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            package = (topology / "physical_package_id").read_text().strip()
            core = (topology / "core_id").read_text().strip()
        except OSError:
            package, core = "", str(cpu)
        chosen.setdefault((package, core), cpu)
    found = sorted(chosen.values())[:2]
    return tuple(found if len(found) == 2 else usable[:2])


@contextmanager
def cluster() -> Iterator[tuple[ExitStack, Path]]:
    """A folder for a registry and sockets, and a stack for what is started."""
    with tempfile.TemporaryDirectory(prefix="domi-bench-") as folder, ExitStack() as stack:
        yield stack, Path(folder)


def start(stack: ExitStack, module: str, folder: Path, cpu: int | None, *more: object) -> Worker:
    pinned = [] if cpu is None else ["--cpu", cpu]
    registry = f"sqlite://{folder / 'registry.db'}"
    arguments = ["--registry", registry, *pinned, *more]
    return stack.enter_context(Worker(f"bench.two_process.{module}", *arguments))


def start_pair(
    stack: ExitStack, folder: Path, cpus: tuple[int, int], *, unix: bool = False
) -> Worker:
    """A server and a client that knows it; the client."""
    paths = [["--unix", folder / name] if unix else [] for name in ("server", "client")]
    start(stack, "server", folder, cpus[0], *paths[0])
    return start(stack, "client", folder, cpus[1], *paths[1])


def in_turn(number: int, *steps: Callable[[], None]) -> None:
    """Both, the anchor first in every second round: neither always has the warmer machine."""
    for step in steps if number % 2 == 0 else reversed(steps):
        step()


# -------------------------------------------------------------------------------------- latency


def round_trips(
    figure: Figure, settings: Settings, cpus: tuple[int, int], *, unix: bool = False
) -> list[Figure]:
    count, warm_up = settings.few(20_000), settings.few(5_000)
    anchors = []

    def ours() -> None:
        with cluster() as (stack, folder):
            client = start_pair(stack, folder, cpus, unix=unix)
            measured = client.ask("round_trips", warm_up=warm_up, count=count)
        if measured["address"].startswith("unix:") != unix:
            raise BenchError(f"the session went over {measured['address']}")
        figure.add_round_trips(measured)

    def anchor() -> None:
        measured = c_echo.round_trip(*cpus, count, unix=unix, warm_up=warm_up)
        figure.anchor_values.append(measured["p50_ns"] * 1e-9)
        anchors.append(measured)

    for number in range(settings.rounds):
        in_turn(number, anchor, ours)
    figure.detail["anchor_p99"] = statistics.median(a["p99_ns"] for a in anchors) * 1e-9
    figure.detail["anchor_p999"] = statistics.median(a["p999_ns"] for a in anchors) * 1e-9
    return [figure]


@benchmark("round-trip-one-core", "awaited request, both processes on one core")
def round_trip_one_core(settings: Settings) -> list[Figure]:
    figure = Figure(
        "round-trip-one-core",
        "Awaited request, 2 processes, 1 core",
        "s",
        anchor="C epoll echo",
        target=Target("ratio", 1.5, at_most=True),
    )
    return round_trips(figure, settings, (settings.cpus[0], settings.cpus[0]))


@benchmark("round-trip-two-cores", "awaited request, a core for each process")
def round_trip_two_cores(settings: Settings) -> list[Figure]:
    figure = Figure(
        "round-trip-two-cores", "Awaited request, 2 processes, 2 cores", "s", anchor="C epoll echo"
    )
    return round_trips(figure, settings, settings.pair())


@benchmark("round-trip-unix", "awaited request over a UNIX socket, one core")
def round_trip_unix(settings: Settings) -> list[Figure]:
    figure = Figure(
        "round-trip-unix",
        "Awaited request, UNIX socket, 1 core",
        "s",
        anchor="C epoll echo, UNIX",
    )
    return round_trips(figure, settings, (settings.cpus[0], settings.cpus[0]), unix=True)


@benchmark("first-answer", "from starting a program to its first answer")
def first_answer(settings: Settings) -> list[Figure]:
    figure = Figure(
        "first-answer",
        "Start of a program to its first answer",
        "s",
        anchor="Python that imports uvloop",
    )
    cpus = settings.pair()

    def timed(command: list[str], right: str) -> float:
        began = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            # A program that hangs ends without a word, which is an error below.
            watchdog = threading.Timer(30.0, process.kill)
            watchdog.start()
            try:
                os.sched_setaffinity(process.pid, {cpus[1]})
                assert process.stdout is not None
                line = process.stdout.readline()
                taken = time.perf_counter() - began
                process.wait()
            finally:
                watchdog.cancel()
                if process.poll() is None:
                    process.kill()
        if line.strip() != right:
            raise BenchError(f"{command[-1]} printed {line!r}")
        return taken

    with cluster() as (stack, folder):
        start(stack, "server", folder, cpus[0])
        registry = f"sqlite://{folder / 'registry.db'}"
        ours = module_command("bench.two_process.first_answer", registry)
        bare = [sys.executable, "-c", "import uvloop; print('right', flush=True)"]
        timed(ours, "right")
        timed(bare, "right")
        for _ in range(settings.rounds):
            figure.anchor_values.append(timed(bare, "right"))
            figure.values.append(timed(ours, "right"))
    return [figure]


# ---------------------------------------------------------------------------------------- rates


def rates(
    figure: Figure, settings: Settings, count: int, frames: int, do: str, **arguments: Any
) -> list[Figure]:
    cpus = settings.pair()
    count = settings.few(count)
    cpu = []

    def ours() -> None:
        with cluster() as (stack, folder):
            client = start_pair(stack, folder, cpus)
            measured = client.ask(do, count=count, **arguments)
        figure.values.append(measured["rate"])
        cpu.append(measured["cpu_ns"])

    def anchor() -> None:
        measured = c_echo.round_trip(*cpus, count, warm_up=count // 10, window=frames)
        figure.anchor_values.append(measured["rate"])

    for number in range(settings.rounds):
        in_turn(number, anchor, ours)
    # Of the client, for one message: it changes less with the load of the machine than the rate.
    figure.detail = {"count": count, "client_cpu_ns": statistics.median(cpu)}
    return [figure]


@benchmark("call-reply", "call and reply, handlers in Python, two cores")
def call_reply(settings: Settings) -> list[Figure]:
    figure = Figure(
        "call-reply",
        "call + reply, handlers in Python, 4,096 under way",
        "/s",
        anchor="C epoll echo, 4,096 frames",
        target=Target("value", 4e6, at_most=False),
    )
    return rates(figure, settings, 3_000_000, 4096, "calls", window=4096)


@benchmark("requests-256", "256 awaited requests in flight, two cores")
def requests_256(settings: Settings) -> list[Figure]:
    figure = Figure(
        "requests-256",
        "Awaited requests, 256 in flight",
        "/s",
        anchor="C epoll echo, 256 frames",
        target=Target("value", 6e5, at_most=False),
    )
    return rates(figure, settings, 600_000, 256, "requests", in_flight=256)


@benchmark("notify", "one-way notifies of 16 B to 1 MiB, two cores")
def notify(settings: Settings) -> list[Figure]:
    cpus = settings.pair()
    stream = 512 * MIB
    sizes = ((16, "16 B", 3_000_000), (KIB, "1 KiB", 500_000), (64 * KIB, "64 KiB", 10_000))
    figures: dict[int, Figure] = {}
    for size, name, count in (*sizes, (MIB, "1 MiB", 600)):
        unit = "/s" if size <= KIB else "B/s"
        figure = Figure(f"notify-{name.replace(' ', '')}", f"notify of {name}, one way", unit)
        figure.detail["count"] = settings.few(count)
        figures[size] = figure
        if unit == "B/s":
            figure.anchor = "blocking sockets"
    for number in range(settings.rounds):

        def anchor() -> None:
            measured = raw_stream.measure(*cpus, settings.few(stream))
            for figure in figures.values():
                if figure.unit == "B/s":
                    figure.anchor_values.append(measured["bytes_per_s"])

        def ours() -> None:
            with cluster() as (stack, folder):
                client = start_pair(stack, folder, cpus)
                for size, figure in figures.items():
                    measured = client.ask("notifies", size=size, count=figure.detail["count"])
                    figure.values.append(measured["rate" if figure.unit == "/s" else "bytes_per_s"])

        in_turn(number, anchor, ours)
    return list(figures.values())


@benchmark("publish", "publish to 1, 10 and 100 nodes, two cores")
def publish(settings: Settings) -> list[Figure]:
    cpus = settings.pair()
    figures = []
    for subscribers in (1, 3) if settings.smoke else (1, 10, 100):
        figure = Figure(
            f"publish-{subscribers}",
            f"publish of 16 B to {subscribers} node{'s'[: subscribers > 1]}, deliveries",
            "/s",
        )
        count = settings.few(1_000_000) // subscribers
        with cluster() as (stack, folder):
            who = ["--count", subscribers]
            # The publisher is there first: the others' start ends with all of them connected.
            publisher = start(stack, "publish", folder, cpus[0], *who, "publisher")
            start(stack, "publish", folder, cpus[1], *who, "subscribers")
            for _ in range(settings.rounds):
                measured = publisher.ask("measure", size=16, count=count)
                figure.values.append(measured["rate"])
        figure.detail["count"] = count
        figures.append(figure)
    return figures


# ------------------------------------------------------------------------------ memory, fairness


@benchmark("idle-session", "memory of an idle session")
def idle_session(settings: Settings) -> list[Figure]:
    figure = Figure(
        "idle-session",
        "Resident memory of an idle session",
        "B",
        target=Target("value", 8 * KIB, at_most=True),
    )
    cpus = (settings.cpus * 2)[:2]
    count = 100 if settings.smoke else 1000
    first = count // 2
    trimmed = []
    for _ in range(settings.rounds):
        with cluster() as (stack, folder):
            server = start(stack, "server", folder, cpus[0])
            url = f"tcp://127.0.0.1:{server.ready['port']}"
            arguments = ["--url", url, "--cpu", cpus[1]]
            guests = stack.enter_context(Worker("bench.two_process.guests", *arguments))
            if min(server.ready["files"], guests.ready["files"]) < count + first + 100:
                raise Skip(f"a process may not open {count + first + 100} files")
            # The first ones pay for what all of them share.
            guests.ask("open", count=first)
            before = server.ask("memory")["rss_trimmed"]
            if guests.ask("open", count=count)["open"] != count + first:
                raise BenchError("sessions were lost while they were opened")
            after = server.ask("memory")
        figure.values.append((after["rss"] - before) / count)
        trimmed.append((after["rss_trimmed"] - before) / count)
    figure.detail = {"sessions": count, "after_malloc_trim": statistics.median(trimmed)}
    return [figure]


@benchmark("flood", "a peer's p99 while another floods the node")
def flood(settings: Settings) -> list[Figure]:
    figure = Figure(
        "flood",
        "p99 of awaited requests beside a flood of 16 B",
        "s",
        anchor="without the flood",
        target=Target("ratio", 3.0, at_most=True),
    )
    cpus = settings.pair()
    seconds = 0.1 if settings.smoke else 1.5
    warm_up = settings.few(5_000)
    medians, sent, busy = [], [], []
    with cluster() as (stack, folder):
        server = start(stack, "server", folder, cpus[0])
        probe = start(stack, "client", folder, cpus[1])
        flooder = start(stack, "client", folder, cpus[1], "--last", "--name", "flooder")

        def without() -> None:
            measured = probe.ask("round_trips", warm_up=warm_up, seconds=seconds)
            figure.anchor_values.append(measured["p99_ns"] * 1e-9)

        def beside() -> None:
            flooder.ask("flood", size=16)
            cpu, began = server.ask("counters")["cpu_s"], time.perf_counter()
            measured = probe.ask("round_trips", warm_up=warm_up, seconds=seconds)
            cpu = server.ask("counters")["cpu_s"] - cpu
            busy.append(cpu / (time.perf_counter() - began))
            sent.append(flooder.ask("stop_flood")["rate"])
            figure.values.append(measured["p99_ns"] * 1e-9)
            figure.samples = measured["count"]
            medians.append(measured["p50_ns"] * 1e-9)

        for number in range(settings.rounds):
            in_turn(number, without, beside)
    if statistics.median(busy) < BUSY:
        figure.void = "the flood did not keep the server's core busy: what else runs here?"
    figure.detail = {
        "p50_beside_the_flood": statistics.median(medians),
        "flood_per_s": statistics.median(sent),
        "share_of_the_servers_core": statistics.median(busy),
        "priority_of_the_flood": flooder.ready["priority"],
    }
    return [figure]


# ------------------------------------------------------------------------------ within a process


@benchmark("one-process", "two nodes in one process, over a socket")
def one_process(settings: Settings) -> list[Figure]:
    trips = Figure(
        "one-process-request", "Awaited request, 2 nodes, 1 process", "s", anchor="uvloop protocols"
    )
    calls = Figure("one-process-call-reply", "call + reply, 2 nodes, 1 process", "/s")
    count = settings.few(20_000)
    for _ in range(settings.rounds):
        with Worker("bench.one_process.nodes", "--cpu", settings.cpus[0]) as nodes:
            anchor = nodes.ask("echoes", warm_up=count // 5, count=count)
            trips.anchor_values.append(anchor["p50_ns"] * 1e-9)
            trips.add_round_trips(nodes.ask("round_trips", warm_up=count // 5, count=count))
            many = settings.few(1_000_000)
            calls.values.append(nodes.ask("calls", count=many, window=4096)["rate"])
    return [trips, calls]


MICRO = {
    "test_encode_frame": ("encode_frame, 16 B of data", "struct and +"),
    "test_feed": ("FrameReader.feed, frames of 16 B", "struct in Python"),
    "test_wheel_schedule_cancel": ("TimeWheel: set a timer and cancel it", "uvloop call_later"),
    "test_dispatch": ("notify to a handler of the same node", "Python function"),
    "test_local_request": ("Awaited request to the same node", "future and call_soon"),
}


@benchmark("micro", "single operations, by pytest-benchmark")
def micro(settings: Settings) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="domi-bench-") as folder:
        report = Path(folder, "micro.json")
        arguments = ["bench/micro", "-q", "-p", "no:cacheprovider", f"--benchmark-json={report}"]
        environment = {**os.environ, "DOMI_BENCH_CPU": str(settings.cpus[-1])}
        environment["DOMI_BENCH_SMOKE"] = str(int(settings.smoke))
        done = subprocess.run(
            module_command("pytest", *arguments),
            cwd=ROOT,
            env=environment,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300.0,
        )
        if done.returncode:
            raise BenchError(f"pytest ended with code {done.returncode}:\n{done.stdout[-4000:]}")
        read = json.loads(report.read_text())["benchmarks"]
    found = {
        entry["name"]: [entry["extra_info"]["items"] / taken for taken in entry["stats"]["data"]]
        for entry in read
    }
    return [
        Figure(
            name.removeprefix("test_").replace("_", "-"),
            title,
            "/s",
            values=found[name],
            anchor=anchor,
            anchor_values=found[f"{name}_anchor"],
        )
        for name, (title, anchor) in MICRO.items()
    ]
