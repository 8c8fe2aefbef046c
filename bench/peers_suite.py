"""The same work done by others, pinned in the same way, by turns with ours in every round.

Each figure has ours for its value and one peer for its anchor. A round starts fresh processes of
all, but of Ray. While one is measured the others' sleep.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bench.child import BenchError
from bench.figures import Figure
from bench.latency_suite import time_to_answer
from bench.peers.peer import Peer, named
from bench.processor import stay
from bench.settings import Settings, Skip, in_turn
from bench.two_process.processes import (
    Worker,
    cluster,
    module_command,
    start,
    start_pair,
)

SECONDS = 0.2  # of each peer, each work and each round
WINDOW = 4096
KIB = 1024
OURS = ""  # among the names of the peers
MOST_NODES = 100  # that subscribe; more are guests
# Messages that arrive in a round, over all subscribers.
DELIVERIES = {OURS: 500_000, "uvloop": 500_000, "pyzmq": 150_000, "nats": 20_000}

# Ray has daemons that are never quite idle: it is measured apart, and they are ended then.
BY_TURNS = named("uvloop", "pyzmq", "pyzmq-asyncio", "nats", "grpc", "aiohttp")
ALONE = named("ray")

__all__ = [
    "ALONE",
    "BY_TURNS",
    "DONE_BY",
    "first_answers",
    "idle_connections",
    "messages",
    "publish",
    "ray",
]


@dataclass(frozen=True)
class Work:
    """What ours and the peers are asked to do.

    :ivar do: the command that does it, of our client and of the peers'.
    :ivar count: how much of it ours does; the peers go by the time.
    :ivar of: what of the answer is the figure.
    """

    name: str
    title: str
    do: str
    count: int
    unit: str = "/s"
    of: str = "rate"
    arguments: dict[str, int] = field(default_factory=dict)
    is_one_core: bool = False

    def ours(self, settings: Settings) -> dict[str, int]:
        count = settings.few(self.count)
        warm_up = {"warm_up": max(1, count // 5)} if self.do == "round_trips" else {}
        return {**self.arguments, **warm_up, "count": count}

    def figure(self, peer: Peer) -> Figure:
        return figure_of(self.name, self.title, self.unit, peer)


def figure_of(name: str, title: str, unit: str, peer: Peer) -> Figure:
    return Figure(
        f"{name}-vs-{peer.name}",
        f"{title}, beside {peer.title}",
        unit,
        anchor=peer.title,
    )


def peer_of(figure: Figure) -> str:
    return figure.name.rpartition("-vs-")[2]


WORKS = (
    Work(
        "round-trip-one-core",
        "Awaited round trip, 1 core",
        "round_trips",
        10_000,
        "s",
        "p50_ns",
        is_one_core=True,
    ),
    Work(
        "round-trip-two-cores", "Awaited round trip, 2 cores", "round_trips", 2_000, "s", "p50_ns"
    ),
    *(
        Work(
            f"requests-{number}",
            f"Awaited requests, {number} in flight",
            "requests",
            count,
            arguments={"in_flight": number},
        )
        for number, count in ((1, 2_000), (16, 40_000), (256, 200_000))
    ),
    Work(
        "call-reply",
        "call + reply, 4,096 under way",
        "calls",
        1_200_000,
        arguments={"window": WINDOW},
    ),
    *(
        Work(
            f"notify-{name.replace(' ', '')}",
            f"One way, {name}",
            "notifies",
            count,
            "/s" if size <= KIB else "B/s",
            "rate" if size <= KIB else "bytes_per_s",
            {"size": size},
        )
        for size, name, count in (
            (16, "16 B", 1_200_000),
            (KIB, "1 KiB", 400_000),
            (64 * KIB, "64 KiB", 12_000),
            (1024 * KIB, "1 MiB", 400),
        )
    ),
)

SUBSCRIBERS = (1, 10, 100, 1000)
# All works, by the commands or roles that do them.
DONE_BY = {
    **{work.name: work.do for work in WORKS},
    **{f"publish-{number}": "publish" for number in SUBSCRIBERS},
    "idle-connection": "connections",
    "first-answer": "first_answer",
}


# -------------------------------------------------------------------------------------- who is here


def here(peers: Sequence[Peer], do: str) -> list[Peer]:
    """Those that are installed and can do it; nobody there is a reason to skip the benchmark."""
    found = [peer for peer in peers if do in peer.does and not peer.missing()]
    if not found:
        missing = "; ".join(dict.fromkeys(peer.missing() for peer in peers if do in peer.does))
        raise Skip(missing)
    return found


def program(stack: ExitStack, peer: Peer, role: str, cpu: int, *more: object) -> Worker:
    arguments = [role, "--cpu", cpu, *more]
    return stack.enter_context(Worker(f"bench.peers.{peer.module}", *arguments))


def start_peer(stack: ExitStack, peer: Peer, cpus: tuple[int, int]) -> Worker:
    """A server and a client of it; the client."""
    server = program(stack, peer, "server", cpus[0])
    return program(stack, peer, "client", cpus[1], "--address", server.ready["address"])


class Attempts:
    """Of what peers do: one that fails is let go of, and told at the end."""

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}

    def attempt(self, peer: Peer, what: str, step: Callable[[], None]) -> None:
        if peer.name not in self.failed:
            try:
                step()
            except BenchError as error:
                self.failed[peer.name] = f"{peer.title}, {what}: {error}"

    def add_round(
        self, peers: Sequence[Peer], figures: Sequence[Figure], found: dict[str, float]
    ) -> None:
        """What a round found for ours and for each peer, to the figures of those still there."""
        for peer, figure in zip(peers, figures, strict=True):
            if peer.name not in self.failed:
                figure.values.append(found[OURS])
                figure.anchor_values.append(found[peer.name])

    def rest(self, figures: Iterable[Figure]) -> list[Figure]:
        """Those beside peers that have not failed.

        :raises BenchError: one has failed; it has them.
        """
        left = [figure for figure in figures if peer_of(figure) not in self.failed]
        if self.failed:
            raise BenchError("\n".join(self.failed.values()), left)
        return left


# ---------------------------------------------------------------------------------- between the two


def messages(settings: Settings) -> list[Figure]:
    return compare(WORKS, here(BY_TURNS, "round_trips"), settings)


def ray(settings: Settings) -> list[Figure]:
    peers = here(ALONE, "round_trips")
    return compare(WORKS, peers, settings) + answers(peers, settings)


def compare(works: Sequence[Work], peers: Sequence[Peer], settings: Settings) -> list[Figure]:
    """Every work by ours and by each peer that can do it. A peer that fails is let go of.

    :raises BenchError: at the end, if one has failed; it has the figures of the others.
    """
    cpus = settings.pair()
    seconds = 0.02 if settings.smoke else SECONDS
    figures = {
        (work.name, peer.name): work.figure(peer)
        for work in works
        for peer in peers
        if work.do in peer.does
    }
    attempts = Attempts()
    clients: dict[str, Worker] = {}
    found: dict[str, dict[str, Any]] = {}

    def begin(peer: Peer, stack: ExitStack) -> None:
        clients[peer.name] = start_peer(stack, peer, cpus)

    def ours(work: Work) -> None:
        found[OURS] = ask(work, clients[OURS], cpus, work.ours(settings))

    def theirs(work: Work, peer: Peer) -> None:
        arguments = {**work.arguments, "seconds": seconds}
        found[peer.name] = ask(work, clients[peer.name], cpus, arguments)

    with ExitStack() as whole:
        for number in range(settings.rounds):
            with cluster() as (stack, folder):
                clients[OURS] = start_pair(stack, folder, cpus)
                for peer in peers:
                    if not peer.stays or number == 0:
                        of = whole if peer.stays else stack
                        attempts.attempt(peer, "at its start", partial(begin, peer, of))
                for work in works:
                    able = [peer for peer in peers if work.do in peer.does]
                    steps = [
                        partial(attempts.attempt, peer, work.name, partial(theirs, work, peer))
                        for peer in able
                    ]
                    in_turn(number, partial(ours, work), *steps)
                    for peer in able:
                        if peer.name not in attempts.failed:
                            add(figures[work.name, peer.name], work, found[OURS], found[peer.name])
    return attempts.rest(figures.values())


def ask(
    work: Work, client: Worker, cpus: tuple[int, int], arguments: dict[str, Any]
) -> dict[str, Any]:
    if not work.is_one_core:
        return client.ask(work.do, **arguments)
    stay(client.pid, cpus[0])
    try:
        return client.ask(work.do, **arguments)
    finally:
        stay(client.pid, cpus[1])


def add(figure: Figure, work: Work, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """A round of both."""
    if work.unit == "s":
        figure.add_percentiles(ours)
        figure.add_anchor_percentiles(theirs)
    else:
        figure.values.append(ours[work.of])
        figure.anchor_values.append(theirs[work.of])


# -------------------------------------------------------------------------------------- publishing


def publish(settings: Settings) -> list[Figure]:
    """One publisher, and subscribers in one other process, which stay over the rounds."""
    cpus = settings.pair()
    peers = here(BY_TURNS, "publish")
    numbers = (1, 3) if settings.smoke else SUBSCRIBERS
    attempts = Attempts()
    return attempts.rest(
        each for number in numbers for each in publish_to(number, peers, settings, cpus, attempts)
    )


def publish_to(
    subscribers: int,
    peers: Sequence[Peer],
    settings: Settings,
    cpus: tuple[int, int],
    attempts: Attempts,
) -> list[Figure]:
    title = f"publish of 16 B to {subscribers} subscriber{'s'[: subscribers > 1]}"
    figures = [figure_of(f"publish-{subscribers}", title, "/s", peer) for peer in peers]
    counts = {name: settings.few(count) // subscribers for name, count in DELIVERIES.items()}
    rates: dict[str, float] = {}
    with cluster() as (stack, folder):
        who = ["--count", subscribers]
        # A publisher is there first: the others' start ends with all of them connected.
        # A thousand nodes would all be each other's peers.
        guests = ["--guests"] if subscribers > MOST_NODES else []
        publishers = {OURS: start(stack, "publish", folder, cpus[0], *who, *guests, "publisher")}
        if guests:
            guests += ["--url", f"tcp://127.0.0.1:{publishers[OURS].ready['port']}"]
        start(stack, "publish", folder, cpus[1], *who, *guests, "subscribers")

        def begin(peer: Peer) -> None:
            publisher = program(stack, peer, "publisher", cpus[0], *who)
            publishers[peer.name] = publisher
            address = ["--address", publisher.ready["address"]]
            program(stack, peer, "subscribers", cpus[1], *who, *address)

        def measure(name: str) -> None:
            measured = publishers[name].ask("measure", size=16, count=counts[name])
            rates[name] = measured["rate"]

        for peer in peers:
            attempts.attempt(peer, f"{title}, at its start", partial(begin, peer))
        steps = [
            partial(attempts.attempt, peer, title, partial(measure, peer.name)) for peer in peers
        ]
        for number in range(settings.rounds):
            in_turn(number, partial(measure, OURS), *steps)
            attempts.add_round(peers, figures, rates)
    return figures


# ------------------------------------------------------------------------- memory, the first answer


def idle_connections(settings: Settings) -> list[Figure]:
    """What the server's process gains for each connection that is open and idle."""
    cpus = (settings.cpus * 2)[:2]
    count = 100 if settings.smoke else 1000
    # The opening end of pyzmq has two for each.
    files = 2 * (count + count // 2) + 100
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < files:
        raise Skip(f"a process may not open {files} files")
    peers = here(BY_TURNS, "connections")
    title = "Resident memory of an idle connection"
    figures = [figure_of("idle-connection", title, "B", peer) for peer in peers]
    attempts = Attempts()
    weights: dict[str, float] = {}

    def ours() -> None:
        with cluster() as (stack, folder):
            server = start(stack, "server", folder, cpus[0])
            url = f"tcp://127.0.0.1:{server.ready['port']}"
            arguments = ["--url", url, "--cpu", cpus[1]]
            opener = stack.enter_context(Worker("bench.two_process.guests", *arguments))
            weights[OURS] = weight(server, opener, count)

    def theirs(peer: Peer) -> None:
        with ExitStack() as stack:
            server = program(stack, peer, "server", cpus[0])
            address = ["--address", server.ready["address"]]
            opener = program(stack, peer, "connections", cpus[1], *address)
            weights[peer.name] = weight(server, opener, count)

    steps = [partial(attempts.attempt, peer, title, partial(theirs, peer)) for peer in peers]
    for number in range(settings.fewer_rounds):
        in_turn(number, ours, *steps)
        attempts.add_round(peers, figures, weights)
    return attempts.rest(figures)


def weight(server: Worker, opener: Worker, count: int) -> float:
    """Bytes of each of ``count`` connections; half as many before pay for what all share."""
    first = count // 2
    opener.ask("open", count=first)
    before = server.ask("memory")["rss_trimmed"]
    if opener.ask("open", count=count)["open"] != count + first:
        raise BenchError("connections were lost while they were opened")
    grown = server.ask("memory")["rss"] - before
    if grown <= 0:
        raise BenchError(f"{count} connections made the server {-grown} bytes smaller")
    return float(grown / count)


def first_answers(settings: Settings) -> list[Figure]:
    return answers(here(BY_TURNS, "first_answer"), settings)


def answers(peers: Sequence[Peer], settings: Settings) -> list[Figure]:
    """From starting a program until it has an answer of a server, which is there already."""
    cpus = settings.pair()
    title = "Start of a program to its first answer"
    figures = [figure_of("first-answer", title, "s", peer) for peer in peers]
    attempts = Attempts()
    with cluster() as (stack, folder):
        start(stack, "server", folder, cpus[0])
        registry = f"sqlite://{folder / 'registry.db'}"
        commands = {OURS: module_command("bench.two_process.first_answer", registry)}
        taken: dict[str, float] = {}

        def begin(peer: Peer) -> None:
            address = program(stack, peer, "server", cpus[0]).ready["address"]
            commands[peer.name] = module_command("bench.peers.first_answers", peer.name, address)
            measure(peer.name)

        def measure(name: str) -> None:
            taken[name] = time_to_answer(commands[name], cpus[1])

        # Before it counts, each one's files are read from the disk.
        measure(OURS)
        for peer in peers:
            attempts.attempt(peer, f"{title}, at its start", partial(begin, peer))
        steps = [
            partial(attempts.attempt, peer, title, partial(measure, peer.name)) for peer in peers
        ]
        for number in range(settings.rounds):
            in_turn(number, partial(measure, OURS), *steps)
            attempts.add_round(peers, figures, taken)
    return attempts.rest(figures)
