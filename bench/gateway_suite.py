"""The gateway: what its clients cost beside the bare library's, and what one who reads not does.

The library is that of the gateway, the protocol of websockets without I/O, on the same loop; the
clients are a program in C that knows nothing of either.
"""

from __future__ import annotations

import json
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench.child import BenchError, Child
from bench.figures import Figure, write
from bench.gateway.wire import FRAME_HEAD, JOINING, MOST_SHORT, WELCOMED, size_of
from bench.processor import stay
from bench.settings import Settings, Skip, in_turn
from bench.two_process.processes import Worker
from bench.websocket.processes import ask, await_clients, compiled, order, started

LIBRARY = "websockets sans-I/O"
CLIENTS = 10_000
# Of a round: so many turns of each, with so many messages. A machine's mood is often a short one.
TURNS, MESSAGES = 3, 5
MESSAGE = MOST_SHORT  # bytes of a WebSocket's message, with our header or without
DATA = MESSAGE - FRAME_HEAD
ON_THE_WIRE = size_of(DATA)
AHEAD = 2  # broadcasts under way: each has its turn of the loop, and none waits for the zone
HISTORY = 32  # frames; soon full, so that each broadcast also drops one
SPARE = 100  # descriptors beside the connections
NEVER = 86_400.0  # seconds
# Nobody answers pings here.
SILENT = {"ping_interval": NEVER}

READERS = 100
NEWS_SIZE = 1024  # bytes of data
RATE = 500.0  # broadcasts a second

__all__ = ["broadcast", "client_memory", "slow_client"]


@contextmanager
def open_files(count: int) -> Iterator[None]:
    """Let what is started meanwhile have as many descriptors as it may at all.

    :raises Skip: that is fewer than ``count``.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count:
        raise Skip(f"a process may not open {count} files, but {hard}: ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Ends:
    """A gateway, a zone with a group, and processes of clients.

    :param clients: how many there will be at most, for each process.
    """

    def __init__(
        self, stack: ExitStack, cpus: tuple[int, int], clients: int, **settings: Any
    ) -> None:
        stack.enter_context(open_files(clients + SPARE))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="domi-bench-")))
        self._stack = stack
        self._cpus = cpus
        self._program = compiled(folder)
        registry = f"sqlite://{folder / 'registry.db'}"
        self.room = self._worker("room", registry, cpus[1])
        self.gate = self._worker("gate", registry, cpus[0], "--settings", json.dumps(settings))

    def _worker(self, module: str, registry: str, cpu: int, *more: str) -> Worker:
        arguments = ("--registry", registry, "--cpu", cpu, *more)
        return self._stack.enter_context(Worker(f"bench.gateway.{module}", *arguments))

    def bare(self) -> tuple[Child, int]:
        """A bare server of the library, and its port."""
        server = self._stack.enter_context(started(LIBRARY, self._cpus[0]))
        return server, int(server.answer()["port"])

    def load(self) -> Child:
        load = self._stack.enter_context(Child("load", [str(self._program)]))
        stay(load.pid, self._cpus[1])
        return load

    def join(self, load: Child, count: int) -> None:
        """So many more clients of the gateway, which are members of the group."""
        ask(load, f"connect {self.gate.ready['port']} {count}")
        ask(load, f"say {JOINING.hex()} {WELCOMED}")

    def state(self, clients: int) -> dict[str, Any]:
        """What the gateway says of itself, which has so many clients."""
        state = self.gate.ask("state")
        if state["clients"] != clients:
            raise BenchError(f"the gateway has {state['clients']} clients, and not {clients}")
        return state


# ---------------------------------------------------------------------------------------- broadcast


def spent_by(process: int) -> tuple[float, int]:
    """Seconds of the processor that it has had, and system calls by which it has written."""
    ran = Path(f"/proc/{process}/schedstat").read_text().split()[0]
    lines = Path(f"/proc/{process}/io").read_text().splitlines()
    written = next(line.split()[1] for line in lines if line.startswith("syscw"))
    return int(ran) * 1e-9, int(written)


def broadcast(settings: Settings) -> list[Figure]:
    """One message of a group to all clients of a gateway, again and again.

    Each has a turn of the gateway's loop, and so a system call for each client, as it has in the
    bare loops.
    """
    clients = settings.few(CLIENTS)
    title = f"broadcast to {CLIENTS:,} clients of a gateway, deliveries"
    anchors = {
        "gateway-broadcast": "loop of write, encoded once",
        "gateway-broadcast-library": "loop of websockets' send_binary",
    }
    encoded, library = figures = [
        Figure(name, title, "/s", anchor=anchor) for name, anchor in anchors.items()
    ]
    cpu: dict[str, list[float]] = {"ours": [], "encoded": [], "library": []}
    writes: dict[str, list[float]] = {who: [] for who in cpu}
    rates: dict[str, list[float]] = {who: [] for who in cpu}
    with ExitStack() as stack:
        ends = Ends(stack, settings.pair(), clients, history=HISTORY, **SILENT)
        server, port = ends.bare()
        ours, others = ends.load(), ends.load()
        ends.join(ours, clients)
        ask(others, f"connect {port} {clients}")
        await_clients(server, clients)

        def tell() -> float:
            told = ends.room.ask("broadcast", count=1, size=DATA)
            if told["members"] != clients:
                raise BenchError(f"{told['members']} members, and not {clients}")
            return float(told["began"])

        def through_the_gateway(times: int) -> float:
            """Deliveries in a second."""
            ours.say(f"drain {clients * ON_THE_WIRE} {times}")
            began = tell()
            for _ in range(1, AHEAD):
                tell()
            ended = began
            for number in range(AHEAD, times + AHEAD):
                ended = float(ours.answer()["ended"])
                if number < times:
                    tell()
            return times * clients / (ended - began)

        def by_the_library(times: int, is_encoded: bool) -> float:
            others.say(f"drain {clients * ON_THE_WIRE} {times}")
            asked = order("broadcast", encoded=is_encoded, count=times, size=MESSAGE)
            began = float(ask(server, asked)["began"])
            *_, ended = (float(others.answer()["ended"]) for _ in range(times))
            return times * clients / (ended - began)

        def measure(who: str, process: int, turn: Callable[[int], float]) -> None:
            before = spent_by(process)
            rates[who].append(turn(MESSAGES))
            spent = [after - was for was, after in zip(before, spent_by(process), strict=True)]
            cpu[who].append(spent[0] / (MESSAGES * clients))
            writes[who].append(spent[1] / (MESSAGES * clients))

        def theirs(who: str) -> None:
            turn = partial(by_the_library, is_encoded=who == "encoded")
            measure(who, server.pid, turn)

        through_the_gateway(HISTORY)
        by_the_library(2, is_encoded=True)
        for number in range(settings.rounds):
            ends.state(clients)
            await_clients(server, clients)
            for turn in range(TURNS):
                in_turn(
                    number + turn,
                    partial(theirs, "library"),
                    partial(theirs, "encoded"),
                    partial(measure, "ours", ends.gate.pid, through_the_gateway),
                )
            ours_now, encoded_now, library_now = (
                statistics.median(rates[who][-TURNS:]) for who in ("ours", "encoded", "library")
            )
            encoded.values.append(ours_now)
            encoded.anchor_values.append(encoded_now)
            library.values.append(ours_now)
            library.anchor_values.append(library_now)
    encoded.detail = {
        "clients": clients,
        "bytes_of_a_message_on_the_wire": ON_THE_WIRE,
        "per_s_of_each_turn": rates,
        "cpu_s_per_delivery": cpu,
        "writes_per_delivery": writes,
    }
    spent = {who: write(statistics.median(taken), "s") for who, taken in cpu.items()}
    encoded.remark = (
        f"of the server's processor {spent['ours']} for each delivery, {spent['encoded']} by the "
        f"frame encoded once, {spent['library']} by the library's own loop"
    )
    if not settings.smoke and min(writes["ours"]) < 0.99:
        encoded.void = library.void = "several messages went to a client in one system call"
    return figures


# ------------------------------------------------------------------------------------------- memory


def client_memory(settings: Settings) -> list[Figure]:
    """What a client's connection, session and membership add to the library's own memory for it."""
    figure = Figure(
        "gateway-client-memory",
        "Resident memory of an idle client of a gateway, beyond the library's own",
        "B",
    )
    clients, first = settings.few(CLIENTS), settings.few(CLIENTS // 10)
    grown: dict[str, list[float]] = {"gateway": [], "library": []}
    for number in range(settings.fewer_rounds):
        with ExitStack() as stack:
            ends = Ends(stack, settings.pair(), first + clients)
            server, port = ends.bare()

            def weigh_ours(ends: Ends) -> None:
                load = ends.load()
                # The first ones pay for what all of them share.
                ends.join(load, first)
                before = ends.state(first)["resident"]
                ends.join(load, clients)
                after = ends.state(first + clients)["resident"]
                grown["gateway"].append((after - before) / clients)

            def weigh_theirs(ends: Ends, server: Child, port: int) -> None:
                load = ends.load()
                ask(load, f"connect {port} {first}")
                before = await_clients(server, first)["resident"]
                ask(load, f"connect {port} {clients}")
                after = await_clients(server, first + clients)["resident"]
                grown["library"].append((after - before) / clients)

            in_turn(number, partial(weigh_theirs, ends, server, port), partial(weigh_ours, ends))
        figure.values.append(grown["gateway"][-1] - grown["library"][-1])
    figure.detail = {"clients": clients, **grown}
    of = {who: write(statistics.median(each), "B") for who, each in grown.items()}
    figure.remark = f"{of['gateway']} for each client, {of['library']} in a bare server"
    return [figure]


# -------------------------------------------------------------------------------------- slow client


def slow_client(settings: Settings) -> list[Figure]:
    """From a group's broadcast to its members, beside one that has stopped reading, and not.

    It is cut when ``write_limit`` bytes wait for it, and comes again at once.
    """
    figure = Figure(
        "gateway-slow-client",
        f"p99 of a broadcast of 1 KiB to {READERS} clients of a gateway, one more has stopped",
        "s",
        by="p99",
        anchor="without it",
        anchor_is_ours=True,
    )
    clients = 10 if settings.smoke else READERS
    warm_up, count = (int(RATE * seconds) for seconds in ((0.1, 0.2) if settings.smoke else (1, 2)))
    cut, late = [], []
    with ExitStack() as stack:
        ends = Ends(stack, settings.pair(), clients, **SILENT)
        load = ends.load()
        ends.join(load, clients)

        def measure() -> dict[str, Any]:
            load.say(f"watch {(warm_up + count) * clients} {size_of(NEWS_SIZE)}")
            fed = ends.room.ask("feed", rate=RATE, warm_up=warm_up, count=count, size=NEWS_SIZE)
            late.append(fed["late"])
            found = load.answer()
            if found["count"] != count * clients:
                raise BenchError(f"{found['count']} counted, and not {count * clients}")
            return found

        def beside() -> None:
            before = ends.gate.ask("state")["cut"]
            ends.room.ask("stop_reading", port=ends.gate.ready["port"])
            figure.add_percentiles(measure())
            cut.append(ends.gate.ask("state")["cut"] - before)
            ends.room.ask("begone")

        for number in range(settings.rounds):
            in_turn(number, lambda: figure.add_anchor_percentiles(measure()), beside)
    figure.detail = {"clients": clients, "per_s": RATE, "cut": cut, "late_s": late}
    figure.remark = f"cut {statistics.median(cut):g} times a turn"
    if not settings.smoke and not min(cut):
        figure.void = "who stopped reading was not cut"
    return [figure]
