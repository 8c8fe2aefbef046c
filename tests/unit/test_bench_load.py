"""The benchmark of half load: when requests come, and from when they are timed."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from typing import Any

import pytest

from bench.two_process.channels import PING, PING_DATA, PONG_DATA
from bench.two_process.load import Probe, Round, arrivals
from tests.support import until


def test_callers_come_at_the_rate_and_know_nothing_of_each_other() -> None:
    rate, seconds = 100_000.0, 1.0
    found = arrivals(rate, seconds, seed=1)
    assert found[0] == 0
    assert found == sorted(found)
    assert found[-1] < seconds * 1e9
    # Five standard deviations of so many.
    assert len(found) == pytest.approx(rate * seconds, abs=5 * math.sqrt(rate * seconds))
    gaps = [later - earlier for earlier, later in itertools.pairwise(found)]
    mean = 1e9 / rate
    for times in (1, 2, 3):
        longer = sum(gap > times * mean for gap in gaps) / len(gaps)
        assert longer == pytest.approx(math.exp(-times), abs=0.01)


def test_each_seed_has_its_own_arrivals_every_time() -> None:
    assert arrivals(1000.0, 0.1, seed=1) == arrivals(1000.0, 0.1, seed=1)
    assert arrivals(1000.0, 0.1, seed=1) != arrivals(1000.0, 0.1, seed=2)


class Answering:
    """In the place of a node: it answers after a turn of the loop."""

    def __init__(self, answer: bytes = PONG_DATA) -> None:
        self.answer = answer
        self.under_way = self.most = self.asked = 0

    async def request(self, channel: int, data: bytes) -> bytes:
        assert (channel, data) == (PING, PING_DATA)
        self.asked += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0)
        self.under_way -= 1
        return self.answer


def test_a_request_is_timed_from_when_it_was_due_not_from_when_it_began() -> None:
    async def one(late: int) -> int:
        node: Any = Answering()
        requests = Round(node, 1)
        requests.begin(requests.ask(time.perf_counter_ns() - late))
        await requests.end()
        (taken,) = requests.taken
        return taken

    assert 0 < asyncio.run(one(0)) < 10**9
    assert asyncio.run(one(10**9)) >= 10**9


def test_so_many_are_in_flight_until_all_have_been_asked() -> None:
    async def all_of_them() -> tuple[Answering, list[int]]:
        node: Any = Answering()
        requests = Round(node, 100, unsent=92)
        for _ in range(8):
            requests.begin(requests.ask(time.perf_counter_ns()))
        await requests.end()
        return node, requests.taken

    node, taken = asyncio.run(all_of_them())
    assert (node.asked, node.most, node.under_way) == (100, 8, 0)
    assert len(taken) == 100


def test_a_wrong_answer_breaks_the_benchmark() -> None:
    async def one() -> None:
        node: Any = Answering(b"another")
        requests = Round(node, 1)
        requests.begin(requests.ask(0))
        await requests.end()

    with pytest.raises(RuntimeError, match="1 of 1 answers were wrong"):
        asyncio.run(one())


def test_the_probe_asks_again_and_again_until_it_is_told_to_stop() -> None:
    async def some() -> tuple[Answering, list[int]]:
        node: Any = Answering()
        probe = Probe(node)
        await until(lambda: node.asked >= 10)
        return node, await probe.end()

    node, taken = asyncio.run(some())
    assert (node.most, node.under_way) == (1, 0)
    assert len(taken) == node.asked >= 10
    assert min(taken) > 0


def test_a_wrong_answer_to_the_probe_breaks_the_benchmark() -> None:
    async def one() -> None:
        node: Any = Answering(b"another")
        probe = Probe(node)
        await until(lambda: node.asked)
        await probe.end()

    with pytest.raises(RuntimeError, match="answers were wrong"):
        asyncio.run(one())
