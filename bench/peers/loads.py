"""What the asking ends measure, whatever they ask with: answers are checked, nothing is lost.

Every peer's server is an echo. While the time is taken all messages are alike: each answer that is
awaited is compared; of calls and one way all are counted, and the last is compared. Afterwards some
go round that each have a content of their own, so that mixed-up answers would be seen.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.figures import LEAST_FOR_P999
from bench.two_process.channels import PING_DATA
from bench.two_process.commands import Command, check, percentiles

SENT = [b"%04d" % number for number in range(200)]
WARM_UP = 0.2  # as a share of the time that is measured
BATCH = 64  # at most so many messages between two looks at the clock
PATIENCE = 60.0
PROLONGED = 10  # times that long, at most, who is slow has for as many as a p99.9 wants

Ask = Callable[[bytes], Awaitable[bytes]]


def asking(ask: Ask, alone: Ask | None = None) -> dict[str, Command]:
    """The commands of a peer that can be asked.

    :param alone: how to ask when nobody else does, if there is a faster way.
    """
    return {
        "round_trips": partial(round_trips, alone or ask),
        "requests": partial(requests, ask),
    }


async def round_trips(ask: Ask, seconds: float) -> dict[str, Any]:
    """One at a time; from one answer to the next, so that the loop around it is counted.

    They go on beyond that time until there are enough of them, but not for ever: :data:`PROLONGED`.
    """
    await _trips(ask, seconds * WARM_UP, 0)
    taken = await _trips(ask, seconds, LEAST_FOR_P999)
    await _distinct(ask, 1)
    return percentiles(taken)


async def _trips(ask: Ask, seconds: float, least: int) -> list[int]:
    clock = time.perf_counter_ns
    taken: list[int] = []
    wrong = 0
    then = clock()
    end, latest = then + int(seconds * 1e9), then + int(seconds * PROLONGED * 1e9)
    while then < end or (len(taken) < least and then < latest):
        wrong += await ask(PING_DATA) != PING_DATA
        now = clock()
        taken.append(now - then)
        then = now
    check(wrong == 0, f"{wrong} of {len(taken)} answers were wrong")
    return taken


async def requests(ask: Ask, in_flight: int, seconds: float) -> dict[str, Any]:
    """``in_flight`` coroutines that each await one answer after the other."""
    await _rate(ask, in_flight, seconds * WARM_UP)
    rate = await _rate(ask, in_flight, seconds)
    await _distinct(ask, in_flight)
    return {"rate": rate}


async def _rate(ask: Ask, in_flight: int, seconds: float) -> float:
    clock = time.perf_counter
    answers = wrong = 0

    async def keep_asking() -> None:
        nonlocal answers, wrong
        asked = right = 0
        while clock() < end:
            asked += 1
            right += await ask(PING_DATA) == PING_DATA
        answers += asked
        wrong += asked - right

    began = clock()
    end = began + seconds
    await asyncio.gather(*[keep_asking() for _ in range(in_flight)])
    taken = clock() - began
    check(wrong == 0, f"{wrong} of {answers} answers were wrong")
    return answers / taken


async def _distinct(ask: Ask, in_flight: int) -> None:
    async def some(first: int) -> None:
        for data in SENT[first::in_flight]:
            check(await ask(data) == data, "answers were mixed up")

    await asyncio.gather(*[some(first) for first in range(in_flight)])


async def calls(
    write: Callable[[bytes], Awaitable[object]],
    read: Callable[[], Awaitable[bytes]],
    window: int,
    seconds: float,
) -> dict[str, Any]:
    """Messages over a stream that comes back, of which ``window`` are under way."""
    await _echoes(write, read, window, seconds * WARM_UP)
    rate = await _echoes(write, read, window, seconds)
    for data in SENT:
        await write(data)
    check([await read() for _ in SENT] == SENT, "answers were mixed up")
    return {"rate": rate}


async def _echoes(
    write: Callable[[bytes], Awaitable[object]],
    read: Callable[[], Awaitable[bytes]],
    window: int,
    seconds: float,
) -> float:
    clock = time.perf_counter
    room = asyncio.Event()
    last = b""
    sent = received = 0
    is_over = False

    async def keep_writing() -> None:
        nonlocal sent
        while not is_over:
            if sent - received < window:
                sent += 1
                await write(PING_DATA)
            else:
                room.clear()
                await room.wait()

    began = clock()
    writing = asyncio.ensure_future(keep_writing())
    try:
        while not is_over or received < sent:
            last = await read()
            received += 1
            is_over = clock() - began > seconds
            room.set()
        taken = clock() - began
        await writing
    finally:
        writing.cancel()
    check_last(last)
    return received / taken


def check_last(answer: bytes) -> None:
    """Of calls, all are counted, and the last is compared: by ours as well."""
    check(answer == PING_DATA, f"the last answer was {answer!r}")


@dataclass(frozen=True)
class Stream:
    """A way to send one way, and to ask in the end for what has arrived, a :func:`tally`."""

    send: Callable[[bytes], Awaitable[object]]
    counted: Callable[[], Awaitable[bytes]]


async def notifies(begin: Callable[[], Stream], size: int, seconds: float) -> dict[str, Any]:
    """From the first message until the receiver says that it has had the last."""
    data = os.urandom(size)
    await _one_way(begin(), data, seconds * WARM_UP)
    count, taken = await _one_way(begin(), data, seconds)
    return streamed(size, count, taken)


async def _one_way(stream: Stream, data: bytes, seconds: float) -> tuple[int, float]:
    clock = time.perf_counter
    send = stream.send
    batch = batch_of(len(data))
    count = 0
    began = clock()
    while clock() - began < seconds:
        for _ in range(batch):
            await send(data)
        count += batch
        # Some never let the loop have its turn as long as there is room in a buffer.
        await asyncio.sleep(0)
    arrived = await asyncio.wait_for(stream.counted(), PATIENCE)
    taken = clock() - began
    check_arrival(arrived, data, count)
    return count, taken


def batch_of(size: int) -> int:
    """Messages between two looks at the clock: few when each takes long."""
    return max(1, min(BATCH, 65_536 // size))


def streamed(size: int, count: int, taken: float) -> dict[str, Any]:
    return {"rate": count / taken, "bytes_per_s": count * size / taken, "count": count}


def tally(count: int, size: int, last: bytes | bytearray) -> bytes:
    """What a receiver answers with: how much has come, and what the last of it was."""
    told = {"count": count, "size": size, "last": hashlib.sha256(last).hexdigest()}
    return json.dumps(told).encode()


def check_arrival(arrived: bytes, data: bytes, count: int) -> None:
    right = tally(count, count * len(data), data)
    check(arrived == right, f"the receiver counted {arrived!r} and not {right!r}")


class Tally:
    """Counts what comes until it is asked."""

    def __init__(self) -> None:
        self.count = self.size = 0
        self._last: bytes | bytearray = b""

    def add(self, data: bytes | bytearray) -> None:
        self.count += 1
        self.size += len(data)
        self._last = data

    def told(self) -> bytes:
        """See :func:`tally`; it begins anew."""
        told = tally(self.count, self.size, self._last)
        self.count = self.size = 0
        return told
