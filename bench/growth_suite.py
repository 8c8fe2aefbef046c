"""Growth: a message beside more and more that is idle, and a subscription beside more of them.

Both ends of what is measured are on the first processor, and what is idle is on the second: it
takes nothing from them but what it makes them do. Figures at all sizes are taken by turns, of
clusters that stand side by side.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.child import BenchError
from bench.figures import Figure
from bench.processor import stay
from bench.settings import Settings, Skip, in_turn
from bench.two_process.processes import Worker, cluster, start

WORK = {
    "trip": "Awaited request, 1 core",
    "call": "Processor time of a call and its reply, both ends",
}
WAIT = 300.0
SPARE_FILES = 600  # of a process: registries, loops, its own
HEARTBEAT = 5.0  # seconds between two of a node, by default
WINDOWS = 5  # of the time in which a node is idle
STEP = 1000  # subscriptions whose memory is weighed

# Of a round: a value, or percentiles of round trips in nanoseconds.
Cost = float | dict[str, Any]

__all__ = ["Cost", "grown", "idle_shares", "nodes", "peers", "shares", "subscriptions"]


@dataclass
class Pair:
    """The two nodes of a cluster that are measured.

    :ivar peers: how many each of them has.
    """

    server: Worker
    client: Worker
    peers: int

    def settle(self) -> None:
        """Wait until both have all their peers, and no other."""
        for worker in (self.server, self.client):
            worker.ask("peers", timeout=WAIT, count=self.peers)

    def costs(self, settings: Settings) -> dict[str, Cost]:
        """Seconds that a message takes, or their percentiles, for each of WORK."""
        self.settle()
        count = settings.few(10_000)
        trips = self.client.ask("round_trips", warm_up=max(1, count // 5), count=count)
        before = self.server.ask("counters")
        calls = self.client.ask("calls", count=settings.few(1_000_000), window=4096)
        after = self.server.ask("counters")
        served = after["frames_in"] - before["frames_in"]
        server = (after["cpu_s"] - before["cpu_s"]) / served
        return {"trip": trips, "call": calls["cpu_ns"] * 1e-9 + server}


def grown(
    name: str,
    titles: Mapping[str, str],
    sizes: Sequence[int],
    cost: Callable[[int], Mapping[str, Cost]],
    rounds: int,
    *,
    judged: Mapping[int, int],
    of: str,
    unit: str = "s",
) -> list[Figure]:
    """What something costs at each size, by turns: figures of those that are judged, beside that of
    the smallest.

    :param titles: of what is measured, by the names that ``cost(size)`` uses.
    :param cost: of a round, either a value or, of round trips, their percentiles.
    :param judged: the sizes, by those of a whole run, which give the figures their names.
    :param of: what the sizes are numbers of.
    """
    rounds_of = {work: {size: Figure("", "", unit) for size in sizes} for work in titles}

    def add(size: int) -> None:
        for work, found in cost(size).items():
            measured = rounds_of[work][size]
            if isinstance(found, dict):
                measured.add_percentiles(found)
            else:
                measured.values.append(found)

    for number in range(rounds):
        in_turn(number, *[partial(add, size) for size in sizes])
    figures = []
    for work, title in titles.items():
        smallest = rounds_of[work][sizes[0]]
        curve = {
            "x": list(sizes),
            "y": [statistics.median(rounds_of[work][size].values) for size in sizes],
            "x_title": of,
            "y_title": f"{title}, {unit}",
        }
        figures += [
            replace(
                rounds_of[work][size],
                name=f"{name}-{work}-{whole}",
                title=f"{title}, {size:,} {of}",
                anchor=f"{sizes[0]:,}",
                anchor_is_ours=True,
                anchor_values=smallest.values,
                anchor_p99=smallest.p99,
                anchor_p999=smallest.p999,
                detail={"curve": curve},
            )
            for whole, size in judged.items()
        ]
    return figures


# ------------------------------------------------------------------------------- nodes of a cluster


def shares(count: int, peers: int, files: int) -> list[int]:
    """How many of ``count`` nodes, of so many peers each, go into each process that may open so
    many files.
    """
    most = (files - SPARE_FILES) // (peers + 8)  # a node has a listener, and its registry's files
    if most < 1:
        raise Skip(f"a process may not open {SPARE_FILES + peers + 8} files")
    processes = -(-count // most)
    return [count // processes + (number < count % processes) for number in range(processes)]


def nodes(settings: Settings) -> list[Figure]:
    """Between two nodes of clusters of 2, 20 and 200, whose others are idle nodes."""
    cpus = settings.pair()
    sizes = (2, 4, 8) if settings.smoke else (2, 20, 200)
    began = time.monotonic()
    with ExitStack() as stack:
        pairs, joiners = {}, {}
        for size in sizes:
            inner, folder = stack.enter_context(cluster())
            pairs[size] = cluster_of(inner, folder, cpus, size)
            joiners[size] = start(inner, "joiner", folder, cpus[0])
        stood = time.monotonic() - began

        def cost(size: int) -> dict[str, Cost]:
            found = pairs[size].costs(settings)
            joined = joiners[size].ask("join", peers=size)
            return {**found, "join": joined["taken_ns"] * 1e-9}

        titles = {**WORK, "join": "Start of a node until all are its peers"}
        figures = grown(
            "growth-nodes",
            titles,
            sizes,
            cost,
            settings.rounds,
            judged=dict(zip((20, 200), sizes[1:], strict=True)),
            of="nodes in the cluster",
        )
    for figure in figures:
        figure.detail["seconds_to_stand"] = stood
    return figures


def cluster_of(stack: ExitStack, folder: Path, cpus: tuple[int, int], size: int) -> Pair:
    """A pair on the first processor, and idle nodes on the second until there are so many."""
    server = start(stack, "server", folder, cpus[0])
    idle: dict[Worker, int] = {}
    if size > 2:
        for share in shares(size - 2, size, server.ready["files"]):
            idle[start(stack, "idle_nodes", folder, None)] = share
    # All at once, on both processors: they have thousands of sessions to open.
    for worker, share in idle.items():
        worker.send("start", count=share)
    for worker in idle:
        worker.answer(WAIT)
    for worker in idle:
        stay(worker.pid, cpus[1])
    pair = Pair(server, start(stack, "client", folder, cpus[0]), size - 1)
    pair.settle()
    for worker in idle:
        worker.ask("peers", timeout=WAIT, count=size - 1)
    return pair


# ------------------------------------------------------------------------------- peers of a node


def peers(settings: Settings) -> list[Figure]:
    """Between two nodes that have 1,023 peers each: the other, and scripted ones that are idle."""
    cpus = settings.pair()
    sizes = (1, 4, 12) if settings.smoke else (1, 100, 1023)
    window = 0.2 if settings.smoke else HEARTBEAT
    with ExitStack() as stack:
        pairs, scripted, weights = {}, [], {}
        for size in sizes:
            inner, folder = stack.enter_context(cluster())
            server = start(inner, "server", folder, cpus[0])
            client = start(inner, "client", folder, cpus[0])
            pairs[size] = Pair(server, client, size)
            if size == 1:
                continue
            others = start(inner, "scripted", folder, cpus[1])
            if min(each.ready["files"] for each in (server, client, others)) < 2 * size + 100:
                raise Skip(f"a process may not open {2 * size + 100} files")
            scripted.append(others)
            before = server.ask("memory")["rss_trimmed"]
            ports = [server.ready["port"], client.ready["port"]]
            others.ask("join", timeout=WAIT, ports=ports, count=size - 1)
            pairs[size].settle()
            weights[size] = (server.ask("memory")["rss_trimmed"] - before) / (size - 1)

        figures = grown(
            "growth-peers",
            WORK,
            sizes,
            lambda size: pairs[size].costs(settings),
            settings.rounds,
            judged={1023: sizes[-1]},
            of="peers of each node",
        )
        idle = idle_shares({size: pair.server for size, pair in pairs.items()}, window)
        lost = [reason for each in scripted for reason in each.ask("lost")["lost"]]
        if lost:
            raise BenchError(f"{len(lost)} scripted peers were lost: {lost[0]}")
    for figure in figures:
        figure.detail |= {
            "bytes_a_peer": weights[sizes[-1]],
            "share_of_a_core_when_idle": statistics.mean(idle[sizes[-1]]),
            "share_of_a_core_when_idle_with_one": statistics.mean(idle[sizes[0]]),
            "shares_of_a_core_when_idle": idle[sizes[-1]],
        }
    return figures


def idle_shares(servers: Mapping[int, Worker], seconds: float) -> dict[int, list[float]]:
    """The share of a core that each takes while nobody asks anything of it, in each of the parts of
    that time. The whole of it has a heartbeat of each peer; a part may have more of them than
    another.
    """
    shares_of: dict[int, list[float]] = {size: [] for size in servers}
    for _ in range(WINDOWS):
        began = time.perf_counter()
        before = {size: server.ask("counters")["cpu_s"] for size, server in servers.items()}
        time.sleep(seconds / WINDOWS)  # is what is measured
        for size, server in servers.items():
            had = server.ask("counters")["cpu_s"] - before[size]
            shares_of[size].append(had / (time.perf_counter() - began))
    return shares_of


# ---------------------------------------------------------------------------------- subscriptions


def subscriptions(settings: Settings) -> list[Figure]:
    """The bytes of a thousand subscriptions more, of a node that has 1,000 and 60,000."""
    sizes = (1_000, 4_000) if settings.smoke else (1_000, 10_000, 30_000, 60_000)
    weighed: dict[int, float] = {}

    def weigh() -> None:
        cpu = ["--cpu", settings.cpus[0]]
        with Worker("bench.one_process.subscriptions", *cpu) as node:
            for size in sizes:
                before = node.ask("grow", to=size)["rss_trimmed"]
                after = node.ask("grow", to=size + STEP)["rss_trimmed"]
                weighed[size] = (after - before) / STEP

    def cost(size: int) -> dict[str, Any]:
        # One node grows through all of them: a round weighs it at its first size.
        if size not in weighed:
            weigh()
        return {"bytes": weighed.pop(size)}

    return grown(
        "growth-subscriptions",
        {"bytes": "Resident memory of a subscription"},
        sizes,
        cost,
        settings.rounds,
        judged={60_000: sizes[-1]},
        of="channels subscribed",
        unit="B",
    )
