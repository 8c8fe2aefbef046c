"""A cluster of processes: one session a pair, subscriptions everywhere, and all comes back."""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import Worker, slowness, until_now, workers

SOAK = os.environ.get("DOMI_SOAK") == "1"
PROCESSES = 4
NODES = 20
PAIRS = NODES * (NODES - 1) // 2


@pytest.fixture(params=["asyncio", "uvloop"])
def four(request: pytest.FixtureRequest) -> Iterator[list[Worker]]:
    with workers(*[request.param] * PROCESSES) as started:
        yield started


def ask_all(processes: list[Worker], command: str, **arguments: Any) -> list[Any]:
    """The command in all processes at the same time."""
    for process in processes:
        process.tell(command, **arguments)
    return [process.answer() for process in processes]


def start_all(processes: list[Worker], url: str, **settings: Any) -> list[list[int]]:
    return ask_all(processes, "start", count=NODES // PROCESSES, registry=url, **settings)


def sessions_by_node(processes: list[Worker]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for part in ask_all(processes, "sessions"):
        found.update({int(machine): entry for machine, entry in part.items()})
    return found


def is_full_mesh(found: dict[int, Any]) -> bool:
    """Whether every node has exactly one session with every other, seen from both ends."""
    everybody = set(found)
    return all(
        entry["up"] == entry["all"] == entry["peers"] == sorted(everybody - {machine})
        for machine, entry in found.items()
    )


def test_twenty_nodes_in_four_processes(four: list[Worker], sqlite_url: str) -> None:
    ask_all(four, "ids")  # the interpreters are up
    before = slowness()
    begun = time.monotonic()
    ids = [machine for part in start_all(four, sqlite_url) for machine in part]
    connected = max(ask_all(four, "wait_peers", count=NODES - 1))
    took = connected - begun
    assert took < 3.0 * max(before, slowness())
    assert sorted(ids) == list(range(NODES))

    # One session a pair at both ends, though everybody dialled at once: also none half open.
    until_now(lambda: is_full_mesh(sessions_by_node(four)), 3)
    found = sessions_by_node(four)
    ends = sum(len(entry["all"]) for entry in found.values())
    assert ends == 2 * PAIRS

    # A new subscription is usable from every node within 200 ms of being made.
    for channel, machine in ((110, ids[0]), (111, ids[-1])):
        owner = owner_of(four, machine)
        others = [process for process in four if process is not owner]
        for process in others:
            process.tell("use", channel=channel)
        owner.tell("subscribe", machine=machine, channel=channel)
        owner.tell("use", channel=channel)
        made = owner.answer()
        usable = max(process.answer() for process in four)
        assert usable - made < 0.2 * slowness()

    # A publish from each node reaches each subscriber exactly once.
    subscribers = ids[::3]
    for machine in subscribers:
        owner_of(four, machine).ask("subscribe", machine=machine, channel=120)
    ask_all(four, "wait_subscribed", channel=120, count=len(subscribers))
    sent = ask_all(four, "publish", channel=120, text="news from")
    assert {count for part in sent for count in part} == {len(subscribers)}
    expected = Counter(
        (receiver, sender, f"news from {sender}") for receiver in subscribers for sender in ids
    )

    def received() -> Counter[tuple[int, int, str]]:
        found: Counter[tuple[int, int, str]] = Counter()
        for part in ask_all(four, "received"):
            for receiver, sender, text, count in part:
                if text != "use":
                    found[receiver, sender, text] += count
        return found

    until_now(lambda: received().total() >= expected.total(), 5)
    # Whatever was on its way beside them has arrived when a request to each is answered.
    ask_all(four, "use", channel=110)
    assert received() == expected
    assert is_full_mesh(sessions_by_node(four))


def owner_of(processes: list[Worker], machine: int) -> Worker:
    return next(process for process in processes if machine in process.ask("ids"))


def test_nodes_that_leave_are_gone_everywhere(four: list[Worker], sqlite_url: str) -> None:
    ids = start_all(four, sqlite_url)
    ask_all(four, "wait_peers", count=NODES - 1)
    four[0].ask("close")
    ask_all(four[1:], "wait_peers", count=NODES - len(ids[0]) - 1)
    until_now(lambda: is_full_mesh(sessions_by_node(four[1:])), 3)
    # Their ids are free again at once, and so are their places in the mesh.
    assert sorted(four[0].ask("start", count=5, registry=sqlite_url)) == sorted(ids[0])
    ask_all(four, "wait_peers", count=NODES - 1)
    until_now(lambda: is_full_mesh(sessions_by_node(four)), 3)


def test_sessions_cut_at_random_come_back(four: list[Worker], sqlite_url: str) -> None:
    start_all(four, sqlite_url)
    ask_all(four, "wait_peers", count=NODES - 1)
    ask_all(four, "watch_losses")
    end = time.monotonic() + (60 if SOAK else 4)
    rounds = itertools.count()
    cut = 0
    for number in rounds:
        if time.monotonic() > end:
            break
        for process, seed in zip(four, itertools.count(number * PROCESSES), strict=False):
            process.tell("cut", count=1 + number % 12, seed=seed)
        cut += sum(process.answer() for process in four)
        # Now and then all come back before the next cut, mostly they do not.
        if number % 5 == 4:
            ask_all(four, "wait_peers", count=NODES - 1)
        else:
            time.sleep(0.02)
    assert cut > 100
    assert sum(ask_all(four, "opened")) > 100
    ask_all(four, "wait_peers", count=NODES - 1)
    until_now(lambda: is_full_mesh(sessions_by_node(four)), 5)
    # And they work: from everybody to everybody, by way of every session.
    ids = [machine for part in ask_all(four, "ids") for machine in part]
    for machine in ids:
        owner_of(four, machine).ask("subscribe", machine=machine, channel=130)
    ask_all(four, "wait_subscribed", channel=130, count=NODES)
    counts = ask_all(four, "publish", channel=130, text="x")
    assert {count for part in counts for count in part} == {NODES}

    def received() -> int:
        return sum(entry[3] for part in ask_all(four, "received") for entry in part)

    until_now(lambda: received() >= NODES * NODES, 5)
    assert received() == NODES * NODES
    assert is_full_mesh(sessions_by_node(four))
