"""The benchmarks: what is run, and in what order.

Each gives figures, and runs its anchor in turn with itself: the machine may be in another mood a
minute later. Latency, serial mode and others have modules of their own beside this one; the list at
the end has all of them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench import (
    asyncio_suite,
    balance_suite,
    fan_out_suite,
    gateway_suite,
    growth_suite,
    latency_suite,
    load_suite,
    peers_suite,
    serial_suite,
    trouble_suite,
)
from bench.child import ROOT, BenchError
from bench.figures import Figure, write
from bench.peers import c_echo, raw_stream
from bench.peers.peer import Peer
from bench.settings import Settings, Skip, in_turn
from bench.two_process.processes import (
    Worker,
    cluster,
    module_command,
    start,
    start_pair,
)

KIB = 1024
MIB = 1024 * KIB
BUSY = 0.6  # share of its core that a flooded server has at least
SEVERAL, ONE, SINGLE = "Two processes or more", "One process", "Single operations"

__all__ = ["BENCHMARKS", "Benchmark"]


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


def call_reply(settings: Settings) -> list[Figure]:
    figure = Figure(
        "call-reply",
        "call + reply, handlers in Python, 4,096 under way",
        "/s",
        anchor="C epoll echo, 4,096 frames",
    )
    return rates(figure, settings, 3_000_000, 4096, "calls", window=4096)


def call_reply_lists(settings: Settings) -> list[Figure]:
    figure = Figure(
        "call-reply-lists",
        "call_many + reply_many, handlers of lists, 4,096 under way",
        "/s",
        anchor="C epoll echo, 4,096 frames",
    )
    return rates(figure, settings, 3_000_000, 4096, "list_calls", window=4096)


def requests_256(settings: Settings) -> list[Figure]:
    figure = Figure(
        "requests-256",
        "Awaited requests, 256 in flight",
        "/s",
        anchor="C epoll echo, 256 frames",
    )
    return rates(figure, settings, 600_000, 256, "requests", in_flight=256)


# Into what the receivers in C take each message: memory of its own, or always the same.
RAW_STREAMS = {"anchor_allocated": False, "anchor_fixed": True}


def raw_streams(number: int, settings: Settings, figures: dict[int, Figure]) -> None:
    """Both of them; the anchor is the faster one, as who allocates may be held up by that.

    :param figures: by the size of a message, of which those that have such an anchor are measured.
    """
    anchored = {size: figure for size, figure in figures.items() if figure.anchor}

    def receive(into: str) -> None:
        for size, figure in anchored.items():
            stream = settings.few(512 * MIB)
            measured = raw_stream.measure(*settings.pair(), stream, size, fixed=RAW_STREAMS[into])
            figure.detail[into].append(measured["bytes_per_s"])

    in_turn(number, *[partial(receive, into) for into in RAW_STREAMS])
    for figure in anchored.values():
        figure.anchor_values.append(max(figure.detail[into][-1] for into in RAW_STREAMS))


def notify(settings: Settings) -> list[Figure]:
    cpus = settings.pair()
    sizes = ((16, "16 B", 3_000_000), (KIB, "1 KiB", 500_000), (64 * KIB, "64 KiB", 10_000))
    figures: dict[int, Figure] = {}
    for size, name, count in (*sizes, (MIB, "1 MiB", 600)):
        unit = "/s" if size <= KIB else "B/s"
        figure = Figure(f"notify-{name.replace(' ', '')}", f"notify of {name}, one way", unit)
        figure.detail["count"] = settings.few(count)
        figures[size] = figure
        if unit == "B/s":
            figure.anchor = f"C send and recv of {name}"
            figure.detail |= {into: [] for into in RAW_STREAMS}
    for number in range(settings.rounds):

        def ours() -> None:
            with cluster() as (stack, folder):
                client = start_pair(stack, folder, cpus)
                for size, figure in figures.items():
                    measured = client.ask("notifies", size=size, count=figure.detail["count"])
                    figure.values.append(measured["rate" if figure.unit == "/s" else "bytes_per_s"])

        in_turn(number, partial(raw_streams, number, settings, figures), ours)
    return list(figures.values())


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


def idle_session(settings: Settings) -> list[Figure]:
    figure = Figure(
        "idle-session",
        "Resident memory of an idle session",
        "B",
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


def flood(settings: Settings) -> list[Figure]:
    figure = Figure(
        "flood",
        "p99 of awaited requests beside a flood of 16 B",
        "s",
        by="p99",
        anchor="without the flood",
        anchor_is_ours=True,
    )
    cpus = settings.pair()
    seconds = 0.1 if settings.smoke else 1.5
    warm_up = settings.few(5_000)
    sent, busy = [], []
    with cluster() as (stack, folder):
        server = start(stack, "server", folder, cpus[0])
        probe = start(stack, "client", folder, cpus[1])
        flooder = start(stack, "client", folder, cpus[1], "--last", "--name", "flooder")

        def without() -> None:
            measured = probe.ask("round_trips", warm_up=warm_up, seconds=seconds)
            figure.add_anchor_percentiles(measured)

        def beside() -> None:
            flooder.ask("flood", size=16)
            cpu, began = server.ask("counters")["cpu_s"], time.perf_counter()
            measured = probe.ask("round_trips", warm_up=warm_up, seconds=seconds)
            cpu = server.ask("counters")["cpu_s"] - cpu
            busy.append(cpu / (time.perf_counter() - began))
            sent.append(flooder.ask("stop_flood")["rate"])
            figure.add_percentiles(measured)

        for number in range(settings.rounds):
            in_turn(number, without, beside)
    if statistics.median(busy) < BUSY:
        figure.void = "the flood did not keep the server's core busy: what else runs here?"
    figure.detail = {
        "flood_per_s": statistics.median(sent),
        "share_of_the_servers_core": statistics.median(busy),
        "priority_of_the_flood": flooder.ready["priority"],
    }
    figure.remark = (
        f"{write(statistics.median(sent), '/s')} ({flooder.ready['priority']}), "
        f"the server's core {statistics.median(busy):.0%} busy"
    )
    return [figure]


# ------------------------------------------------------------------------------ within a process


def one_process(settings: Settings) -> list[Figure]:
    trips = Figure(
        "one-process-request", "Awaited request, 2 nodes, 1 process", "s", anchor="uvloop protocols"
    )
    calls = Figure("one-process-call-reply", "call + reply, 2 nodes, 1 process", "/s")
    count = settings.few(20_000)
    how_many = {"warm_up": count // 5, "count": count}
    for number in range(settings.rounds):
        with Worker("bench.one_process.nodes", "--cpu", settings.cpus[0]) as nodes:
            in_turn(
                number,
                lambda: trips.add_anchor_percentiles(nodes.ask("echoes", **how_many)),
                lambda: trips.add_percentiles(nodes.ask("round_trips", **how_many)),
            )
            many = settings.few(1_000_000)
            calls.values.append(nodes.ask("calls", count=many, window=4096)["rate"])
    return [trips, calls]


def dispatch(settings: Settings) -> list[Figure]:
    figure = Figure(
        "dispatch",
        "frames from a socket to a handler that does nothing",
        "/s",
        anchor="C loop of vectorcalls",
    )
    for _ in range(settings.rounds):
        with Worker("bench.one_process.dispatch", "--cpu", settings.cpus[0]) as node:
            compared = node.ask("compare", rounds=settings.few(2_000))
        figure.values.append(1.0 / statistics.median(compared["ours"]))
        figure.anchor_values.append(1.0 / statistics.median(compared["anchor"]))
    return [figure]


MICRO = {
    "test_encode_frame": ("encode_frame, 16 B of data", "struct and +"),
    "test_feed": ("FrameReader.feed, frames of 16 B", "struct in Python"),
    "test_ring_put_get": ("RingBuffer: put 64 B and get them", "SimpleQueue"),
    "test_ring_drain": ("RingBuffer: drain many of 64 B", "SimpleQueue"),
    "test_wheel_schedule_cancel": ("TimeWheel: set a timer and cancel it", "uvloop call_later"),
    "test_serial_schedule_cancel": ("Serial: set a timer and cancel it", "uvloop call_later"),
    "test_dispatch_frames": ("dispatch: frames of a socket to a handler", "recv and struct"),
    "test_local_notify": ("notify to a handler of the same node", "Python function"),
    "test_local_request": ("Awaited request to the same node", "future and call_soon"),
    "test_round_robin": ("choose among 10: round_robin", "random.choice"),
    "test_weighted_round_robin": ("choose among 10: weighted_round_robin", "random.choice"),
    "test_least_connections": ("choose among 10: least_connections", "random.choice"),
    "test_peak_ewma": ("choose among 10: peak_ewma", "random.choice"),
    "test_breaker": ("notify_many to a given peer that has a circuit breaker", "without one"),
}


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
        entry["name"]: [
            [entry["extra_info"]["items"] / taken for taken in rounds]
            for rounds in (entry["stats"]["data"], entry["extra_info"]["anchor"])
        ]
        for entry in read
    }
    return [
        Figure(
            name.removeprefix("test_").replace("_", "-"),
            title,
            "/s",
            values=found[name][0],
            anchor=anchor,
            anchor_values=found[name][1],
        )
        for name, (title, anchor) in MICRO.items()
    ]


# -------------------------------------------------------------------------------------- all of them


@dataclass(frozen=True)
class Benchmark:
    """What can be run by its name.

    :ivar peers: beside whom it measures, as far as they are installed.
    """

    name: str
    title: str
    run: Callable[[Settings], list[Figure]]
    level: str = SEVERAL
    peers: tuple[Peer, ...] = ()


BENCHMARKS = [
    Benchmark(
        "round-trip-one-core",
        "awaited request, both processes on one core",
        latency_suite.round_trip_one_core,
    ),
    Benchmark(
        "round-trip-two-cores",
        "awaited request, a core for each process",
        latency_suite.round_trip_two_cores,
    ),
    Benchmark(
        "round-trip-unix",
        "awaited request over a UNIX socket, one core",
        latency_suite.round_trip_unix,
    ),
    Benchmark(
        "round-trip-asyncio",
        "round trips and rates on asyncio's own loop",
        asyncio_suite.own_loop,
    ),
    Benchmark("busy", "awaited request, both ends polling, two cores", latency_suite.busy),
    Benchmark(
        "busy-unix",
        "awaited request over a UNIX socket, both ends polling, two cores",
        latency_suite.busy_unix,
    ),
    Benchmark(
        "first-answer", "from starting a program to its first answer", latency_suite.first_answer
    ),
    Benchmark("call-reply", "call and reply, handlers in Python, two cores", call_reply),
    Benchmark(
        "call-reply-lists", "call and reply by verbs and handlers of lists", call_reply_lists
    ),
    Benchmark("requests-256", "256 awaited requests in flight, two cores", requests_256),
    Benchmark("half-load", "awaited requests at half of the peak rate", load_suite.half_load),
    Benchmark("lanes", "requests beside large messages, on a lane of their own", load_suite.lanes),
    Benchmark("notify", "one-way notifies of 16 B to 1 MiB, two cores", notify),
    Benchmark("publish", "publish to 1, 10 and 100 nodes, two cores", publish),
    Benchmark("fan-out", "publish to 1,000 sessions, two cores", fan_out_suite.fan_out),
    Benchmark("idle-session", "memory of an idle session", idle_session),
    Benchmark("growth-nodes", "a message between two nodes of 2 to 200", growth_suite.nodes),
    Benchmark("growth-peers", "a message of a node with 1 to 1,023 peers", growth_suite.peers),
    Benchmark(
        "growth-subscriptions",
        "memory of a subscription of 1,000 to 60,000",
        growth_suite.subscriptions,
        ONE,
    ),
    Benchmark("flood", "a peer's p99 while another floods the node", flood),
    Benchmark("crowd", "who joins a node that 10,000 strangers crowd", trouble_suite.crowd),
    Benchmark("stopped", "a publish's p99 while one of three is stopped", trouble_suite.stopped),
    Benchmark(
        "gateway-broadcast",
        "a group's broadcast to 10,000 clients of a gateway",
        gateway_suite.broadcast,
    ),
    Benchmark(
        "gateway-client-memory",
        "memory of an idle client of a gateway",
        gateway_suite.client_memory,
    ),
    Benchmark(
        "gateway-slow-client",
        "a broadcast's p99 while one client reads nothing",
        gateway_suite.slow_client,
    ),
    Benchmark("serial", "call and reply in serial mode, two cores", serial_suite.call_reply),
    Benchmark(
        "serial-thread", "a node's p99 while its serial thread is held up", serial_suite.thread
    ),
    Benchmark(
        "balance",
        "a policy beside round robin when one node is slow",
        balance_suite.slow_node,
        ONE,
    ),
    Benchmark(
        "guards", "what circuit breakers and limits cost a message", balance_suite.guards, ONE
    ),
    Benchmark("dispatch", "a frame's way to its handler, one process", dispatch, ONE),
    Benchmark("one-process", "two nodes in one process, over a socket", one_process, ONE),
    Benchmark("micro", "single operations, by pytest-benchmark", micro, SINGLE),
    Benchmark(
        "peers-messages",
        "round trips, requests, calls and one way, beside others",
        peers_suite.messages,
        peers=peers_suite.BY_TURNS,
    ),
    Benchmark(
        "peers-publish",
        "publish to 1 to 1,000, beside others",
        peers_suite.publish,
        peers=peers_suite.BY_TURNS,
    ),
    Benchmark(
        "peers-idle",
        "memory of an idle connection, beside others",
        peers_suite.idle_connections,
        peers=peers_suite.BY_TURNS,
    ),
    Benchmark(
        "peers-first-answer",
        "from starting a program to its first answer, beside others",
        peers_suite.first_answers,
        peers=peers_suite.BY_TURNS,
    ),
    Benchmark(
        "peers-ray",
        "round trips, requests, calls and one way, beside Ray",
        peers_suite.ray,
        peers=peers_suite.ALONE,
    ),
]
