"""The benchmark of half load: when requests come, and from when they are timed."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import os
import subprocess
import sys
import threading
from array import array
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import pytest

from bench.figures import Figure
from bench.load_suite import why_void
from bench.processor import kept_waiting
from bench.two_process.channels import PING, PING_DATA
from bench.two_process.client import Client
from bench.two_process.load import Load, Probe, Requests, arrivals, p99_of_parts
from domi_fast import PeerLost
from tests.support import until


def test_callers_come_at_the_rate_and_know_nothing_of_each_other() -> None:
    rate, seconds = 100_000.0, 1.0
    found = arrivals(rate, seconds, seed=1)
    assert found[0] == 0
    assert list(found) == sorted(found)
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
    """In the place of a node: it answers after a turn of the loop.

    :param answer: what with; an exception is raised.
    """

    def __init__(self, answer: bytes | BaseException = PING_DATA) -> None:
        self.answer = answer
        self.under_way = self.most = self.asked = 0

    def request(self, channel: int, data: bytes) -> asyncio.Future[bytes]:
        assert (channel, data) == (PING, PING_DATA)
        self.asked += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        return asyncio.ensure_future(self._answer())

    async def _answer(self) -> bytes:
        await asyncio.sleep(0)
        self.under_way -= 1
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


async def taken_by(answer: bytes | BaseException, *late: int) -> list[int]:
    """Nanoseconds of requests that were due so long ago."""
    node: Any = Answering(answer)
    requests = Requests(node, [-each for each in late])
    requests.begin(1)
    requests.begin(len(late) - 1)
    return list(await requests.end())


def test_a_request_is_timed_from_when_it_was_due_not_from_when_it_began() -> None:
    (on_time,) = asyncio.run(taken_by(PING_DATA, 0))
    (late,) = asyncio.run(taken_by(PING_DATA, 10**9))
    assert 0 < on_time < 10**9 <= late


def test_the_end_is_when_all_have_been_answered() -> None:
    assert len(asyncio.run(taken_by(PING_DATA, *range(100)))) == 100


@pytest.mark.parametrize(
    "answer",
    [b"another", PeerLost(1), asyncio.CancelledError()],
    ids=["wrong", "failed", "cancelled"],
)
def test_a_request_without_its_answer_breaks_the_benchmark(answer: bytes | BaseException) -> None:
    with pytest.raises(RuntimeError, match="2 of 2 failed, or their answers were wrong"):
        asyncio.run(taken_by(answer, 0, 0))


class Asked(Client):
    """What the load wants of a client, with nobody at the other end."""

    def __init__(self, answering: Answering) -> None:
        self.answering = answering
        self.node = cast(Any, self.answering)
        self.compared = 0

    async def numbered_requests(self) -> None:
        self.compared += 1


def test_requests_come_at_the_rate_and_are_counted_with_the_probe_beside() -> None:
    client = Asked(Answering())
    rate, seconds = 2_000.0, 0.2
    measured = asyncio.run(Load(client).arriving(rate, seconds, seed=1))
    assert measured["count"] == len(arrivals(rate, seconds, seed=1))
    assert client.answering.asked == measured["count"] + measured["probe"]["count"]
    assert client.answering.under_way == 0
    assert measured["rate"] <= 1.5 * rate
    assert measured["arrivals_a_turn"] >= 1.0
    assert 0.0 < measured["share_idle"] < 1.0
    assert client.compared == 1


class Prompt(asyncio.Future[bytes]):
    """It is done, and who awaits it goes on in the next turn of the loop."""

    def __await__(self) -> Generator[Any, None, bytes]:
        yield
        return self.result()


class AnsweringPromptly(Answering):
    def request(self, channel: int, data: bytes) -> asyncio.Future[bytes]:
        answer = Prompt()
        answer.set_result(PING_DATA)
        return answer


def test_a_turn_in_which_the_probe_is_answered_is_not_idle() -> None:
    measured = asyncio.run(Load(Asked(AnsweringPromptly())).arriving(100.0, 0.5, seed=1))
    assert measured["probe"]["count"] > 10 * measured["count"]
    assert measured["share_idle"] == 0.0


def test_a_moment_that_holds_many_up_is_not_in_the_middle_part() -> None:
    times = array("q", [10] * 1000)
    times[100:180] = array("q", [500] * 80)
    times[950:960] = array("q", [70] * 10)
    assert p99_of_parts(times) == 10
    times[::50] = array("q", [20] * 20)
    assert p99_of_parts(times) == 20


@pytest.mark.parametrize(
    ("rate", "p50", "why"),
    [(500.0, 1.9, ""), (440.0, 1.0, "at the rate"), (500.0, 2.1, "stood in a queue")],
)
def test_what_is_no_half_load_is_not_judged(rate: float, p50: float, why: str) -> None:
    probe, load = (Figure(name, name, "s") for name in ("probe", "load"))
    probe.values, load.values = [1.0, 1.0, 1.0], [p50, p50, 9.0]
    found = why_void({"per_s": rate, "peak_per_s": 1000.0}, probe, load)
    assert why in found
    assert bool(found) == bool(why)


def test_the_probe_asks_again_and_again_until_it_is_told_to_stop() -> None:
    async def some() -> tuple[Answering, array[int]]:
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


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel does not count")
def test_of_every_thread_it_is_counted_how_long_it_waited_for_a_processor() -> None:
    """Two that compute on one, while the main thread sleeps."""
    cpu = min(os.sched_getaffinity(0))
    together, over = threading.Barrier(3), threading.Event()

    def compute() -> None:
        os.sched_setaffinity(0, {cpu})
        together.wait()
        # Without the interpreter's lock.
        hashlib.sha256(bytes(32 << 20))
        together.wait()
        over.wait()

    def of_this_thread() -> float:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) * 1e-9

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    before, mine = kept_waiting(), of_this_thread()
    together.wait()
    together.wait()
    waited, mine = kept_waiting() - before, of_this_thread() - mine
    at_all = kept_waiting(os.getpid(), os.getpid()) / kept_waiting()
    over.set()
    for thread in threads:
        thread.join()
    assert waited > mine + 0.005
    assert at_all == pytest.approx(2.0, rel=0.2)


def test_who_has_ended_has_not_waited() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert kept_waiting(ended.pid) == 0.0
