"""The asking end: it measures round trips and rates, and counts and checks every answer."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import time
from contextlib import suppress
from typing import Any

from bench.two_process.channels import (
    COUNTS,
    ECHO,
    PING,
    PING_DATA,
    PONG,
    PONG_DATA,
    SINK,
)
from bench.two_process.commands import percentiles, pin, run, serve
from domi_fast import Context, Node, Overloaded

WAIT = 10.0
NUMBERED = 1000  # messages with a content of their own, after each measurement


def check(is_right: bool, what: str) -> None:
    if not is_right:
        raise RuntimeError(what)


def below_everybody() -> str:
    """Have every other process go first on this CPU; how that was done."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:
        return f"nice {os.nice(19)}"
    return "SCHED_IDLE"


class Client:
    """One node whose peer is the server, and what the driver may ask of it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.server = -1
        self._flood: asyncio.Task[int] | None = None

    async def meet(self) -> None:
        await self.node.wait_subscribed(PING, timeout=WAIT)
        (self.server,) = self.node.subscribers(PING)

    async def round_trips(
        self, warm_up: int, count: int = 1_000_000_000, seconds: float = 1e6
    ) -> dict[str, Any]:
        """Awaited requests, one at a time, until so many or so long.

        Each lasts until the next can be sent, so that the loop around them is counted too.
        """
        request = self.node.request
        clock = time.perf_counter_ns
        wrong = 0
        for _ in range(warm_up):
            wrong += await request(PING, PING_DATA) != PONG_DATA
        taken = []
        then = clock()
        end = then + int(seconds * 1e9)
        for _ in range(count):
            wrong += await request(PING, PING_DATA) != PONG_DATA
            now = clock()
            taken.append(now - then)
            if now > end:
                break
            then = now
        check(wrong == 0, f"{wrong} of {len(taken)} answers were wrong")
        await self.numbered_requests()
        return {**percentiles(taken), "address": self.node.peers[self.server].address}

    async def calls(self, count: int, window: int) -> dict[str, Any]:
        """``call`` and its reply, handlers in Python at both ends, ``window`` under way."""
        call = self.node.call
        done = asyncio.Event()
        left = 0
        last = b""

        def pong(context: Context) -> None:
            nonlocal left, last
            left -= 1
            if left >= window:
                call(PING, PING_DATA, PONG)
            elif left == 0:
                last = context.data
                done.set()

        async def some(number: int) -> float:
            nonlocal left
            left = number
            done.clear()
            began = time.perf_counter()
            for _ in range(min(window, number)):
                call(PING, PING_DATA, PONG)
            await done.wait()
            return time.perf_counter() - began

        self.node.subscribe(PONG, pong)
        try:
            await some(max(1, count // 10))
            before = self.node.counters()
            cpu = time.process_time()
            taken = await some(count)
            cpu = time.process_time() - cpu
            after = self.node.counters()
        finally:
            self.node.unsubscribe(PONG)
        check(last == PONG_DATA, f"the last answer was {last!r}")
        sent = after["frames_out"] - before["frames_out"]
        received = after["frames_in"] - before["frames_in"]
        # The rest are heartbeats and news of subscriptions.
        for what, number in (("sent", sent), ("received", received)):
            check(0 <= number - count < 100, f"{number} frames were {what} for {count} calls")
        await self.numbered_calls()
        return {"rate": count / taken, "cpu_ns": cpu / count * 1e9}

    async def requests(self, count: int, in_flight: int) -> dict[str, Any]:
        """Awaited requests, ``in_flight`` coroutines with one each."""
        request = self.node.request
        answers = wrong = 0

        async def ask(number: int) -> None:
            nonlocal answers, wrong
            right = 0
            for _ in range(number):
                right += await request(PING, PING_DATA) == PONG_DATA
            answers += right
            wrong += number - right

        async def some(number: int) -> float:
            began = time.perf_counter()
            await asyncio.gather(*[ask(number) for _ in range(in_flight)])
            return time.perf_counter() - began

        each = max(1, count // in_flight)
        await some(max(1, each // 10))
        answers = 0
        cpu = time.process_time()
        taken = await some(each)
        cpu = time.process_time() - cpu
        check(wrong == 0, f"{wrong} answers were wrong")
        check(answers == each * in_flight, f"{answers} of {each * in_flight} answers came")
        await self.numbered_requests()
        return {"rate": answers / taken, "cpu_ns": cpu / answers * 1e9}

    async def notifies(self, size: int, count: int) -> dict[str, Any]:
        """One-way: from the first message sent until the server says it has had the last."""
        data = os.urandom(size)
        await self._notify(data, max(1, count // 10))
        await self.node.request(COUNTS, b"", timeout=60.0)
        began = time.perf_counter()
        await self._notify(data, count)
        counted = json.loads(await self.node.request(COUNTS, b"", timeout=60.0))
        taken = time.perf_counter() - began
        right = {
            "count": count,
            "size": count * size,
            "last": hashlib.sha256(data).hexdigest(),
        }
        check(counted == right, f"the server counted {counted} and not {right}")
        return {"rate": count / taken, "bytes_per_s": count * size / taken, "count": count}

    async def _notify(self, data: bytes, count: int) -> None:
        left = count
        while left:
            left -= await self._send(data, min(left, 1024))
        await self.node.drained(self.server)

    async def _send(self, data: bytes, most: int) -> int:
        """Send some notifies, and give the loop its turn; how many there was room for."""
        notify = self.node.notify
        sent = 0
        with suppress(Overloaded):
            for _ in range(most):
                notify(SINK, data)
                sent += 1
        if sent < most:
            await self.node.drained(self.server)
        else:
            await asyncio.sleep(0)
        return sent

    async def flood(self, size: int) -> dict[str, Any]:
        """Begin to send notifies as fast as the server takes them, below everybody else."""
        check(self._flood is None, "there is a flood already")
        await self.node.request(COUNTS, b"")
        self._flooding = True
        self._flood_data = os.urandom(size)
        self._flood_began = time.perf_counter()
        self._flood = asyncio.ensure_future(self._keep_flooding())
        return {}

    async def _keep_flooding(self) -> int:
        sent = 0
        while self._flooding:
            sent += await self._send(self._flood_data, 256)
        return sent

    async def stop_flood(self) -> dict[str, Any]:
        """End it, and wait until the server has taken all of it."""
        check(self._flood is not None, "there is no flood")
        assert self._flood is not None
        self._flooding = False
        sent = await self._flood
        self._flood = None
        await self.node.drained(self.server)
        counted = json.loads(await self.node.request(COUNTS, b"", timeout=60.0))
        taken = time.perf_counter() - self._flood_began
        check(counted["count"] == sent, f"{sent} were sent and {counted['count']} arrived")
        return {"rate": sent / taken, "count": sent}

    async def numbered_requests(self) -> None:
        """Requests that each have a content of their own, all at once: no answer is mixed up."""
        sent = [b"%d" % number for number in range(NUMBERED)]
        answers = await asyncio.gather(*[self.node.request(ECHO, data) for data in sent])
        check(answers == sent, "answers were mixed up")

    async def numbered_calls(self) -> None:
        """The same for calls, whose replies come in the order of the calls."""
        sent = [b"%d" % number for number in range(NUMBERED)]
        replies: list[bytes] = []
        done = asyncio.Event()

        def reply(context: Context) -> None:
            replies.append(context.data)
            if len(replies) == NUMBERED:
                done.set()

        self.node.subscribe(PONG, reply)
        try:
            for data in sent:
                self.node.call(ECHO, data, PONG)
            await asyncio.wait_for(done.wait(), WAIT)
        finally:
            self.node.unsubscribe(PONG)
        check(replies == sent, "replies were mixed up")


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    priority = below_everybody() if given.last else "normal"
    node = Node(given.name, registry=given.registry, unix_path=given.unix)
    client = Client(node)
    async with node:
        await client.meet()
        await serve(
            {
                "round_trips": client.round_trips,
                "calls": client.calls,
                "requests": client.requests,
                "notifies": client.notifies,
                "flood": client.flood,
                "stop_flood": client.stop_flood,
            },
            id=node.id,
            priority=priority,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", required=True)
    parser.add_argument("--cpu", type=int)
    parser.add_argument("--unix")
    parser.add_argument("--name", default="client")
    parser.add_argument("--last", action="store_true", help="every other process goes first")
    run(main(parser.parse_args()))
