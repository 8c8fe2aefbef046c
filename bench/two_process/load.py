"""Awaited requests that come when they are due, whatever has become of those before them.

Each is a task of its own, as with a service that asks for each of its callers; the peak, of which
half is the load, is that of the same tasks.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from typing import Any

from bench.two_process.channels import PING, PING_DATA, PONG_DATA
from bench.two_process.client import Client
from bench.two_process.commands import check, percentiles, pin, run, serve
from domi_fast import Node

WARM_UP = 0.1  # as long as what is measured after it
WAIT = 60.0

__all__ = ["arrivals"]


def arrivals(rate: float, seconds: float, seed: int) -> list[int]:
    """When callers who know nothing of each other come: nanoseconds from the beginning, in order.

    A Poisson process: the gaps between them are exponential, and so some come close together.
    """
    chance = random.Random(seed)
    due = 0.0
    found = []
    while due < seconds:
        found.append(int(due * 1e9))
        due += chance.expovariate(rate)
    return found


class Round:
    """Some requests, each of which is a task, and the nanoseconds that they have taken.

    :param unsent: how many of them begin when another ends.
    """

    def __init__(self, node: Node, count: int, unsent: int = 0) -> None:
        loop = asyncio.get_running_loop()
        self._request = node.request
        # A request that is under way keeps its task alive.
        self.begin = loop.create_task
        self._over: asyncio.Future[None] = loop.create_future()
        self._count = self._left = count
        self._unsent = unsent
        self._wrong = 0
        self.taken: list[int] = []

    async def ask(self, due: int) -> None:
        """One request, timed from when it was due."""
        answer = await self._request(PING, PING_DATA)
        now = time.perf_counter_ns()
        self.taken.append(now - due)
        self._wrong += answer != PONG_DATA
        self._left -= 1
        if self._unsent:
            self._unsent -= 1
            self.begin(self.ask(now))
        elif not self._left:
            self._over.set_result(None)

    async def end(self) -> None:
        """Wait until all have been answered."""
        await asyncio.wait_for(self._over, WAIT)
        check(self._wrong == 0, f"{self._wrong} of {self._count} answers were wrong")


class Probe:
    """One who asks again and again, beside all else: nanoseconds of each round trip."""

    def __init__(self, node: Node) -> None:
        self._request = node.request
        self._stopped = False
        self._wrong = 0
        self._taken: list[int] = []
        self._asking = asyncio.ensure_future(self._ask())

    async def _ask(self) -> None:
        clock = time.perf_counter_ns
        while not self._stopped:
            then = clock()
            answer = await self._request(PING, PING_DATA)
            self._taken.append(clock() - then)
            self._wrong += answer != PONG_DATA

    async def end(self) -> list[int]:
        """Stop; what each round trip took."""
        self._stopped = True
        await asyncio.wait_for(self._asking, WAIT)
        check(self._wrong == 0, f"{self._wrong} of {len(self._taken)} answers were wrong")
        return self._taken


class Load:
    """What a client's node can do at most, and what it does at a rate."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def peak(self, in_flight: int, count: int) -> dict[str, Any]:
        """So many at a time, each followed by another when it ends."""
        await self._keep_in_flight(in_flight, max(in_flight, int(count * WARM_UP)))
        began = time.perf_counter()
        await self._keep_in_flight(in_flight, count)
        return {"rate": count / (time.perf_counter() - began)}

    async def _keep_in_flight(self, in_flight: int, count: int) -> None:
        requests = Round(self.client.node, count, count - in_flight)
        for _ in range(in_flight):
            requests.begin(requests.ask(time.perf_counter_ns()))
        await requests.end()

    async def arriving(self, rate: float, seconds: float, seed: int) -> dict[str, Any]:
        """Requests that come at this rate, each timed from when it was due until its answer.

        The loop never sleeps: it looks at the clock in each of its turns, which are microseconds
        apart, and begins what is due by then. A timer of the loop would begin those of a whole
        millisecond together.
        """
        await self._arrive(arrivals(rate, seconds * WARM_UP, seed + 1))
        dues = arrivals(rate, seconds, seed)
        probe = Probe(self.client.node)
        began = time.perf_counter()
        requests, turns = await self._arrive(dues)
        taken = time.perf_counter() - began
        beside = await probe.end()
        await self.client.numbered_requests()
        return {
            **percentiles(requests.taken),
            "rate": len(dues) / taken,
            "arrivals_a_turn": len(dues) / turns,
            "probe": percentiles(beside),
        }

    async def _arrive(self, dues: list[int]) -> tuple[Round, int]:
        """The requests, and in how many turns of the loop they have begun."""
        requests = Round(self.client.node, len(dues))
        clock = time.perf_counter_ns
        began = clock()
        turns = 1
        for due in dues:
            when = began + due
            turned = False
            while clock() < when:
                turned = True
                await asyncio.sleep(0)
            turns += turned
            requests.begin(requests.ask(when))
        await requests.end()
        return requests, turns


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    async with Node("load", registry=given.registry) as node:
        load = Load(Client(node))
        await load.client.meet()
        await serve({"peak": load.peak, "arriving": load.arriving})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", required=True)
    parser.add_argument("--cpu", type=int)
    run(main(parser.parse_args()))
