"""Requests that come when they are due, whatever has become of those before them.

None is a task: making one takes longer than the request. They have a callback, which is what a task
that awaits one has, too. Times are kept in arrays: a list of as many is a long way for the
collector of garbage, each time that it goes through everything, and would be in what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import contextvars
import gc
import random
import statistics
import time
from array import array
from collections.abc import Sequence
from typing import Any

from bench.two_process.channels import PING, PING_DATA
from bench.two_process.client import Client
from bench.two_process.commands import check, percentiles, pin, run, serve
from domi_fast import Node, Request

WAIT = 60.0
PARTS = 10

__all__ = ["Load", "Probe", "Requests", "arrivals", "p99_of_parts"]


def arrivals(rate: float, seconds: float, seed: int) -> array[int]:
    """When callers who know nothing of each other come: nanoseconds from the beginning, in order.

    A Poisson process: the gaps between them are exponential, and so some come close together.
    """
    chance = random.Random(seed)
    due = 0.0
    found = array("q")
    while due < seconds:
        found.append(int(due * 1e9))
        due += chance.expovariate(rate)
    return found


class Requests:
    """Requests, each of which is due at a time of its own, on one channel: answered in order.

    :param dues: nanoseconds from now.
    :ivar ended: when each has ended, with an answer or without, by the clock that ``began`` is of.
    """

    def __init__(self, node: Node, dues: Sequence[int]) -> None:
        self._request = node.request
        # One for all, which else would be copied for each.
        self._context = contextvars.copy_context()
        self._dues = dues
        self._clock = time.perf_counter_ns
        self._wrong = 0
        self.ended = array("q")
        self.began = self._clock()

    def begin(self, count: int) -> None:
        """So many more of them."""
        request, note, context = self._request, self._note, self._context
        for _ in range(count):
            request(PING, PING_DATA).add_done_callback(note, context=context)

    def _note(self, request: Request) -> None:
        self.ended.append(self._clock())
        # What raises in here is lost in the loop.
        has_failed = request.cancelled() or request.exception() is not None
        self._wrong += has_failed or request.result() != PING_DATA

    async def end(self) -> array[int]:
        """Wait until all have been answered; how long each took from when it was due.

        :raises RuntimeError: if one failed, or its answer was wrong.
        """
        count = len(self._dues)
        limit = time.perf_counter() + WAIT
        while len(self.ended) < count:
            check(time.perf_counter() < limit, f"{len(self.ended)} of {count} requests ended")
            await asyncio.sleep(0)
        check(self._wrong == 0, f"{self._wrong} of {count} failed, or their answers were wrong")
        pairs = zip(self.ended, self._dues, strict=True)
        return array("q", (then - self.began - due for then, due in pairs))


class Probe:
    """One who asks again and again, beside all else: nanoseconds of each round trip."""

    def __init__(self, node: Node) -> None:
        self._request = node.request
        self._stopped = False
        self._wrong = 0
        self._taken = array("q")
        self._asking = asyncio.ensure_future(self._ask())

    @property
    def answers(self) -> int:
        return len(self._taken)

    async def _ask(self) -> None:
        clock = time.perf_counter_ns
        while not self._stopped:
            then = clock()
            answer = await self._request(PING, PING_DATA)
            self._taken.append(clock() - then)
            self._wrong += answer != PING_DATA

    async def end(self) -> array[int]:
        """Stop; what each round trip took."""
        self._stopped = True
        await asyncio.wait_for(self._asking, WAIT)
        check(self._wrong == 0, f"{self._wrong} of {len(self._taken)} answers were wrong")
        return self._taken


def p99_of_parts(times: array[int]) -> float:
    """The p99 of the middle one of PARTS of them: what it is but for the moments of a few."""
    size = -(-len(times) // PARTS)
    parts = [times[first : first + size] for first in range(0, len(times), size)]
    return statistics.median(percentiles(part)["p99_ns"] for part in parts)


class Load:
    """What a client's node does at a rate."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def arriving(self, rate: float, seconds: float, seed: int) -> dict[str, Any]:
        """Requests that come at this rate, each timed from when it was due until its answer.

        The loop never sleeps: in each of its turns, which are microseconds apart, it begins what is
        due by then. A timer of the loop would begin those of a whole millisecond together. A turn
        in which nothing begins, and nothing is answered, of these or of the probe, is idle.
        """
        dues = arrivals(rate, seconds, seed)
        node = self.client.node
        # What has been made until now is no garbage of the requests.
        gc.collect()
        clock = time.perf_counter_ns
        probe = Probe(node)
        requests = Requests(node, dues)
        began = now = requests.began
        count = len(dues)
        begun = ended = turns = idle = 0
        while begun < count:
            first, begun = begun, bisect.bisect_right(dues, now - began, begun)
            requests.begin(begun - first)
            await asyncio.sleep(0)
            then, now = now, clock()
            if begun > first:
                turns += 1
            elif ended == len(requests.ended) + probe.answers:
                idle += now - then
            ended = len(requests.ended) + probe.answers
        times = await requests.end()
        taken = clock() - began
        beside = await probe.end()
        await self.client.numbered_requests()
        return {
            **percentiles(times),
            "p99_of_parts_ns": p99_of_parts(times),
            "rate": count / taken * 1e9,
            "seconds": taken * 1e-9,
            "arrivals_a_turn": count / turns,
            "share_idle": idle / taken,
            "probe": percentiles(beside),
        }


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    async with Node("load", registry=given.registry) as node:
        client = Client(node)
        await client.meet()
        await serve({"requests": client.requests, "arriving": Load(client).arriving})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", required=True)
    parser.add_argument("--cpu", type=int)
    run(main(parser.parse_args()))
