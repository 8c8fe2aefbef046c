"""The asking end: it measures round trips and rates, and counts and checks every answer."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from typing import Any

from bench.peers.loads import check_arrival
from bench.processor import below_everybody, kept_waiting
from bench.two_process.channels import (
    BULK,
    COUNTS,
    HOLD,
    PING,
    PING_DATA,
    PING_LISTS,
    PONG,
    SINK,
)
from bench.two_process.commands import (
    RUNNERS,
    check,
    open_many_files,
    percentiles,
    pin,
    run,
    serve,
)
from domi_fast import Context, Node, Overloaded, Serial

WAIT = 10.0
LONG_WAIT = 300.0
NUMBERED = 1000  # messages with a content of their own, after each measurement
SENT = [b"%d" % number for number in range(NUMBERED)]
TIMER = 0.005


class Client:
    """One node whose peer is the server, and what the driver may ask of it.

    :param endpoint: whose handlers and verbs the calls go by: the node itself, or a Serial of it.
    """

    def __init__(self, node: Node, endpoint: Node | Serial | None = None) -> None:
        self.node = node
        self.endpoint = endpoint or node
        self.server = -1
        self._last = b""
        self._flood: asyncio.Task[int] | None = None

    async def meet(self) -> None:
        await self.node.wait_subscribed(PING, timeout=WAIT)
        (self.server,) = self.node.subscribers(PING)

    async def peers(self, count: int) -> dict[str, Any]:
        """Wait until there are so many peers, and no more."""
        await self.node.wait_peers(count, LONG_WAIT)
        return {}

    async def round_trips(
        self, warm_up: int, count: int = 1_000_000_000, seconds: float = 1e6
    ) -> dict[str, Any]:
        """Awaited requests, one at a time, until so many or so long."""
        await self._round_trips(warm_up)
        taken = await self._round_trips(count, seconds)
        await self.numbered_requests()
        return {**percentiles(taken), "address": self.node.peers[self.server].address}

    async def _round_trips(self, count: int, seconds: float = 1e6) -> list[int]:
        """Nanoseconds of each: until the next can be sent, so that the loop around is counted."""
        request = self.node.request
        clock = time.perf_counter_ns
        wrong = 0
        taken = []
        then = clock()
        end = then + int(seconds * 1e9)
        for _ in range(count):
            wrong += await request(PING, PING_DATA) != PING_DATA
            now = clock()
            taken.append(now - then)
            if now > end:
                break
            then = now
        check(wrong == 0, f"{wrong} of {len(taken)} answers were wrong")
        return taken

    async def round_trips_beside(
        self, kinds: list[str], phases: int, seconds: float
    ) -> dict[str, Any]:
        """Awaited requests while the server's serial thread is held up in each of these ways.

        :param kinds: what it is told to do all the time; empty: nothing. Their phases take turns.
        """
        taken: dict[str, list[int]] = {kind: [] for kind in kinds}
        for number in range(phases):
            for kind in kinds if number % 2 == 0 else reversed(kinds):
                over = asyncio.Event()
                # Two, so that one waits for its turn while the other holds the thread up.
                holds = [asyncio.ensure_future(self._hold(kind, over)) for _ in range(2)]
                await self._round_trips(1_000_000_000, seconds * 0.1)
                taken[kind] += await self._round_trips(1_000_000_000, seconds)
                over.set()
                held = sum(await asyncio.gather(*holds))
                check(held > 0 or not kind, f"{kind}: the serial thread was not held up")
        await self.numbered_requests()
        return {kind: percentiles(some) for kind, some in taken.items()}

    async def _hold(self, kind: str, over: asyncio.Event) -> int:
        """Have the server's serial thread held up again and again; how often it was."""
        count = 0
        while kind and not over.is_set():
            answer = await self.node.request(HOLD, kind.encode(), timeout=60.0)
            check(answer == kind.encode(), f"{kind}: the serial thread answered {answer!r}")
            count += 1
        return count

    async def lateness(self, phases: int, count: int) -> dict[str, Any]:
        """How late the loop calls what is not the node's.

        ``timer``: beyond the time when a sleeping task is due; ``soon``: from ``call_soon`` in a
        handler and in a task. Each sleep begins with a message, whose answer keeps a node that
        polls polling until it ends.

        :param count: of timers in a phase.
        :returns: percentiles over all, and the longest of each phase.
        """
        loop = asyncio.get_running_loop()
        clock = time.perf_counter_ns
        soon: list[int] = []
        timers: list[int] = []
        all_of: dict[str, list[int]] = {"soon": [], "timer": []}
        longest: dict[str, list[int]] = {"soon": [], "timer": []}

        all_called = asyncio.Event()

        def called(asked: int) -> None:
            soon.append(clock() - asked)
            if len(soon) == 2 * count:
                all_called.set()

        def pong(context: Context) -> None:
            loop.call_soon(called, clock())

        async def phase() -> None:
            soon.clear()
            timers.clear()
            all_called.clear()
            for _ in range(count):
                self.node.call(PING, PING_DATA, PONG)
                due = clock() + int(TIMER * 1e9)
                await asyncio.sleep(TIMER)
                timers.append(max(0, clock() - due))
                loop.call_soon(called, clock())
            await asyncio.wait_for(all_called.wait(), WAIT)

        self.node.subscribe(PONG, pong)
        try:
            await phase()
            began, cpu, waited = time.perf_counter(), time.process_time(), kept_waiting()
            for _ in range(phases):
                await phase()
                for kind, taken in (("soon", soon), ("timer", timers)):
                    all_of[kind] += taken
                    longest[kind].append(max(taken))
            waited = kept_waiting() - waited
            share = (time.process_time() - cpu) / (time.perf_counter() - began)
        finally:
            self.node.unsubscribe(PONG)
        found = {
            kind: {**percentiles(taken), "longest_ns": longest[kind]}
            for kind, taken in all_of.items()
        }
        return {**found, "share_of_the_core": share, "kept_waiting_s": waited}

    async def calls(self, count: int, window: int) -> dict[str, Any]:
        """``call`` and its reply, handlers in Python at both ends, ``window`` under way."""
        call = self.endpoint.call
        done = asyncio.Event()
        left = 0

        def pong(context: Context) -> None:
            nonlocal left
            left -= 1
            if left >= window:
                call(PING, PING_DATA, PONG)
            elif left == 0:
                self._last = context.data
                done.set()

        async def some(number: int) -> None:
            nonlocal left
            left = number
            done.clear()
            for _ in range(min(window, number)):
                call(PING, PING_DATA, PONG)
            await done.wait()

        self.endpoint.subscribe(PONG, pong)
        measured = await self._rate_of_calls(some, count)
        await self.numbered_calls()
        return measured

    async def list_calls(self, count: int, window: int) -> dict[str, Any]:
        """The same by ``call_many``, ``reply_many`` and handlers of lists."""
        call_many = self.endpoint.call_many
        done = asyncio.Event()
        data = [PING_DATA] * window
        left = unsent = 0

        def pong(contexts: list[Context]) -> None:
            nonlocal left, unsent
            left -= len(contexts)
            more = min(len(contexts), unsent)
            if more:
                unsent -= more
                call_many(PING_LISTS, data[:more], PONG)
            elif left == 0:
                self._last = contexts[-1].data
                done.set()

        async def some(number: int) -> None:
            nonlocal left, unsent
            left = number
            first = min(window, number)
            unsent = number - first
            done.clear()
            call_many(PING_LISTS, data[:first], PONG)
            await done.wait()

        self.endpoint.subscribe(PONG, pong, batch=True)
        measured = await self._rate_of_calls(some, count)
        await self.numbered_list_calls()
        return measured

    async def _rate_of_calls(
        self, some: Callable[[int], Awaitable[None]], count: int
    ) -> dict[str, Any]:
        """What ``some(count)`` takes, whose replies come to PONG; it is unsubscribed afterwards."""
        try:
            await some(max(1, count // 10))
            self._last = b""
            before = self.node.counters()
            began, cpu = time.perf_counter(), time.process_time()
            await some(count)
            cpu, taken = time.process_time() - cpu, time.perf_counter() - began
            after = self.node.counters()
        finally:
            self.endpoint.unsubscribe(PONG)
        check(self._last == PING_DATA, f"the last answer was {self._last!r}")
        sent = after["frames_out"] - before["frames_out"]
        received = after["frames_in"] - before["frames_in"]
        # The rest are heartbeats and news of subscriptions: of each peer a few at most.
        most = 100 + 4 * len(self.node.peers)
        for what, number in (("sent", sent), ("received", received)):
            check(0 <= number - count < most, f"{number} frames were {what} for {count} calls")
        return {"rate": count / taken, "cpu_ns": cpu / count * 1e9}

    async def requests(self, count: int, in_flight: int) -> dict[str, Any]:
        """Awaited requests, ``in_flight`` coroutines with one each."""
        request = self.node.request
        answers = wrong = 0

        async def ask(number: int) -> None:
            nonlocal answers, wrong
            right = 0
            for _ in range(number):
                right += await request(PING, PING_DATA) == PING_DATA
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

    async def _send(self, data: bytes, most: int, channel: int = SINK) -> int:
        """Send some notifies, and give the loop its turn; how many there was room for."""
        notify = self.node.notify
        sent = 0
        with suppress(Overloaded):
            for _ in range(most):
                notify(channel, data)
                sent += 1
        if sent < most:
            await self.node.drained(self.server)
        else:
            await asyncio.sleep(0)
        return sent

    async def transfer(self, size: int, count: int) -> dict[str, Any]:
        """One-way on each of the BULK channels at once, until the server has had the last of each.

        :param count: of messages on each.
        """
        data = os.urandom(size)
        await self._transfer(data, max(1, count // 10))
        began = time.perf_counter()
        await self._transfer(data, count)
        taken = time.perf_counter() - began
        return {"bytes_per_s": len(BULK) * count * size / taken}

    async def _transfer(self, data: bytes, count: int) -> None:
        async def fill(channel: int) -> None:
            left = count
            while left:
                left -= await self._send(data, 1, channel)
            # On its own channel: on another it might come before them.
            check_arrival(await self.node.request(channel, b"", timeout=60.0), data, count)

        await asyncio.gather(*[fill(channel) for channel in BULK])

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
            sent += await self._send(self._flood_data, max(1, 65_536 // len(self._flood_data)))
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
        answers = await asyncio.gather(*[self.node.request(PING, data) for data in SENT])
        check(answers == SENT, "answers were mixed up")

    async def numbered_calls(self) -> None:
        """The same for calls, whose replies come in the order of the calls."""
        replies: list[bytes] = []
        done = asyncio.Event()

        def reply(context: Context) -> None:
            replies.append(context.data)
            if len(replies) == NUMBERED:
                done.set()

        self.endpoint.subscribe(PONG, reply)
        for data in SENT:
            self.endpoint.call(PING, data, PONG)
        await self._replies(replies, done)

    async def numbered_list_calls(self) -> None:
        """The same for calls in lists."""
        replies: list[bytes] = []
        done = asyncio.Event()

        def reply(contexts: list[Context]) -> None:
            replies.extend(context.data for context in contexts)
            if len(replies) >= NUMBERED:
                done.set()

        self.endpoint.subscribe(PONG, reply, batch=True)
        self.endpoint.call_many(PING_LISTS, SENT, PONG)
        await self._replies(replies, done)

    async def _replies(self, replies: list[bytes], done: asyncio.Event) -> None:
        """Wait until as many have come as were sent; PONG is unsubscribed afterwards."""
        try:
            await asyncio.wait_for(done.wait(), WAIT)
        finally:
            self.endpoint.unsubscribe(PONG)
        check(replies == SENT, "replies were mixed up")


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    most = open_many_files()
    priority = below_everybody() if given.last else "normal"
    node = Node(
        given.name,
        registry=given.registry,
        unix_path=given.unix,
        busy_poll=given.busy_poll,
        sessions_per_peer=given.lanes,
    )
    serial = Serial(node) if given.serial else None
    client = Client(node, serial)
    async with node, serial or nullcontext():
        await client.meet()
        await serve(
            {
                "peers": client.peers,
                "round_trips": client.round_trips,
                "round_trips_beside": client.round_trips_beside,
                "lateness": client.lateness,
                "calls": client.calls,
                "list_calls": client.list_calls,
                "requests": client.requests,
                "notifies": client.notifies,
                "transfer": client.transfer,
                "flood": client.flood,
                "stop_flood": client.stop_flood,
            },
            id=node.id,
            port=node.port,
            files=most,
            priority=priority,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", required=True)
    parser.add_argument("--cpu", type=int)
    parser.add_argument("--unix")
    parser.add_argument("--serial", action="store_true", help="handlers and verbs of a Serial")
    parser.add_argument("--busy-poll", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--lanes", type=int, default=1, help="sessions with the server")
    parser.add_argument("--loop", choices=RUNNERS, default="uvloop")
    parser.add_argument("--name", default="client")
    parser.add_argument("--last", action="store_true", help="every other process goes first")
    given = parser.parse_args()
    run(main(given), given.loop)
