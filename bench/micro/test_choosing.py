"""Choosing whom a message goes to, and what a circuit breaker adds to sending it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest

from domi_fast import Node
from domi_fast.balance import (
    Candidate,
    LeastConnections,
    PeakEwma,
    Policy,
    RoundRobin,
    WeightedRoundRobin,
)

CANDIDATES = 10
SINK = 50
DATA = b"sixteen bytes!!!"
AT_A_TIME = 100


def candidates() -> list[Candidate]:
    made = [Candidate(number, weight=1.0 + number) for number in range(CANDIDATES)]
    for candidate in made:
        candidate.observe(0.001)
    return made


def choose(measure: Any, items: int, policy: Policy) -> None:
    """Beside one of a list, at random, as Python's own library does it."""
    some = candidates()

    def work() -> None:
        for _ in range(items):
            policy.choose(some, None)

    def anchor() -> None:
        for _ in range(items):
            random.choice(some)

    measure(work, anchor, items)
    chosen = {policy.choose(some, None).id for _ in range(100)}
    assert chosen <= set(range(CANDIDATES))


def test_round_robin(measure: Any, items: int) -> None:
    choose(measure, items, RoundRobin())


def test_weighted_round_robin(measure: Any, items: int) -> None:
    choose(measure, items, WeightedRoundRobin())


def test_least_connections(measure: Any, items: int) -> None:
    choose(measure, items, LeastConnections())


def test_peak_ewma(measure: Any, items: int) -> None:
    choose(measure, items, PeakEwma())


@pytest.fixture
def pair(loop: Any) -> Iterator[Any]:
    """Makes two nodes of which the first sends to the second, with these settings, and which know
    nobody else.
    """
    made: list[Node] = []
    numbers = itertools.count()

    async def start(settings: dict[str, Any]) -> tuple[Node, int]:
        registry = f"memory://choosing-{next(numbers)}"
        server, client = Node("server", registry=registry), Node("c", registry=registry, **settings)
        made.extend((client, server))
        server.subscribe(SINK, lambda contexts: None, batch=True)
        for node in (server, client):
            await node.start()
        await client.wait_subscribed(SINK, timeout=10)
        return client, server.id

    yield lambda **settings: loop.run_until_complete(start(settings))
    peers = [len(node.peers) for node in made]
    for node in made:
        loop.run_until_complete(node.close())
    assert peers == [1] * len(made)


def test_breaker(measure: Any, items: int, loop: Any, pair: Any) -> None:
    """Beside the same without one."""
    messages = [DATA] * AT_A_TIME

    async def sending(client: Node, server: int) -> None:
        for _ in range(items // AT_A_TIME):
            client.notify_many(SINK, messages, to=server)
            await client.drained(server)

    with_one, without = pair(), pair(breaker=None)
    measure(
        lambda: loop.run_until_complete(sending(*with_one)),
        lambda: loop.run_until_complete(sending(*without)),
        items,
    )
