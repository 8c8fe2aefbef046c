"""No verb leaves anything behind, however it ends: references, live objects, allocated blocks.

A million operations of each in ``make soak``, some thousands otherwise. A debug build counts the
core's live objects as well, after every test.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from domi_fast import (
    Client,
    Context,
    DeadlineExceeded,
    DomiError,
    FrameError,
    Node,
    NoSubscriber,
    Overloaded,
    RemoteError,
    Serial,
    connect,
)
from tests.conftest import SOAK
from tests.support import nodes, until

COUNT = 1_000_000 if SOAK else 4_000
# Operations between two waits for those before to be done with.
BURST = 500
# Blocks that may come or go whatever is done: far from one for each operation.
NOISE = 1_000
# More than a frame may have.
HUGE = bytes(16 << 20)

ECHO, RAISES, SHEDS, KEEPS, LATER, LISTS, FIRST, SECOND, LAST = range(50, 59)
RACED, JOINED, JOINED_TOO, REPLIES, NOBODY = range(60, 65)


@dataclass
class Stage:
    """Two nodes, a guest of the first, and what they share with the operations."""

    a: Node
    b: Node
    guest: Client
    serial: Serial
    data: bytes = bytes(range(200))
    large: bytes = bytes(20_000)
    kept: list[Context] = field(default_factory=list)
    done: int = 0

    def note(self, _: object) -> None:
        self.done += 1

    def tracked(self) -> list[Any]:
        return [self.data, self.large, self.a, self.b, self.guest, self.note, RAISES, KeyError]


@contextlib.asynccontextmanager
async def stage(url: str) -> AsyncIterator[Stage]:
    refused: list[None] = []
    settings: dict[str, Any] = {"on_error": lambda error, frame: refused.clear()}
    async with nodes(url, "a", "b", breaker=None, request_timeout=30.0, **settings) as (a, b):
        serial = Serial(b)
        guest = await connect(f"tcp://127.0.0.1:{a.port}", request_timeout=30.0, **settings)
        on = Stage(a, b, guest, serial)

        def raises(ctx: Context) -> None:
            raise KeyError("no such thing")

        def sheds(ctx: Context) -> None:
            raise Overloaded("enough")

        async def later(ctx: Context) -> None:
            await asyncio.sleep(0)
            ctx.reply(ctx.data)

        def lists(many: list[Context]) -> None:
            for ctx in many:
                if ctx.is_request:
                    ctx.reply(ctx.data)
                on.done += 1

        b.subscribe(ECHO, lambda ctx: ctx.reply(ctx.data))
        b.subscribe(RAISES, raises)
        b.subscribe(SHEDS, sheds)
        b.subscribe(KEEPS, on.kept.append)
        b.subscribe(LATER, later)
        b.subscribe(LISTS, lists, batch=True)
        b.subscribe(FIRST, lambda ctx: ctx.next(ctx.data))
        b.subscribe(SECOND, lambda ctx: ctx.next(ctx.data))
        b.subscribe(LAST, on.note)
        a.subscribe(REPLIES, on.note)
        guest.subscribe(REPLIES, on.note)
        serial.subscribe_race([RACED], lambda ctx: ctx.reply(ctx.data))
        serial.subscribe_all(
            [JOINED, JOINED_TOO], lambda joined: [ctx.reply(b"") for ctx in joined.requests]
        )
        try:
            await serial.start()
            await a.wait_subscribed(JOINED_TOO, timeout=10)
            await a.wait_subscribed(LAST, timeout=10)
            yield on
        finally:
            await guest.close()
            await serial.close()


Operation = Callable[[Stage, int], Awaitable[None]]


def sends(send: Callable[[Stage], object], marks: int = 1) -> Operation:
    """Something that ends in so many calls of ``note``, or of the handler of lists, later on."""

    async def run(on: Stage, count: int) -> None:
        end = on.done + count * marks
        for _ in range(count):
            send(on)
        await until(lambda: on.done >= end, timeout=30)

    return run


def ends(ask: Callable[[Stage], Any], *errors: type[Exception]) -> Operation:
    """Requests, all at once, each of which is answered, or ends with an error of these."""

    async def run(on: Stage, count: int) -> None:
        outcomes = await asyncio.gather(*[ask(on) for _ in range(count)], return_exceptions=True)
        expected = errors or (bytes,)
        assert all(type(outcome) in expected for outcome in outcomes), set(map(repr, outcomes))
        on.kept.clear()

    return run


def refuses(do: Callable[[Stage], object], *errors: type[Exception]) -> Operation:
    async def run(on: Stage, count: int) -> None:
        for _ in range(count):
            with pytest.raises(errors):
                do(on)

    return run


async def cancel(on: Stage, count: int) -> None:
    asked = [on.a.request(KEEPS, on.data) for _ in range(count)]
    await until(lambda: len(on.kept) == count, timeout=30)
    for request in asked:
        request.cancel()
    for request in asked:
        with pytest.raises(asyncio.CancelledError):
            await request
    for ctx in on.kept:
        ctx.reply(on.data)  # too late
    on.kept.clear()


async def forget(on: Stage, count: int) -> None:
    """Requests that nobody awaits."""
    for _ in range(count):
        on.a.request(ECHO, on.data)
    await until(lambda: on.a.counters()["in_flight"] == 0, timeout=30)


async def overflow(on: Stage, count: int) -> None:
    """There is no room."""
    with contextlib.suppress(Overloaded):
        while True:
            on.a.notify(LAST, on.large)
    for _ in range(count):
        with pytest.raises(Overloaded):
            on.a.notify(LAST, on.data)
    await on.a.drained(on.b.id)


async def subscribe(on: Stage, count: int) -> None:
    for _ in range(count):
        on.b.subscribe(NOBODY, on.note)
        on.b.unsubscribe(NOBODY)


async def timers(on: Stage, count: int) -> None:
    end = on.done + count
    for number in range(2 * count):
        timer = on.serial.call_later(0.001, lambda: on.note(None))
        if number % 2:
            timer.cancel()
    await until(lambda: on.done == end, timeout=30)


OPERATIONS: dict[str, Operation] = {
    "notify": sends(lambda on: on.a.notify(LAST, on.data)),
    "notify by key": sends(lambda on: on.a.notify(LAST, on.data, key=b"key")),
    "notify of a large one": sends(lambda on: on.a.notify(LAST, on.large)),
    "notify of a bytearray": sends(lambda on: on.a.notify(LAST, bytearray(on.data))),
    "notify_many": sends(lambda on: on.a.notify_many(LAST, [on.data] * 3), 3),
    "publish": sends(lambda on: on.a.publish(LAST, on.data)),
    "publish_many": sends(lambda on: on.a.publish_many(LAST, [on.data] * 3), 3),
    "call": sends(lambda on: on.a.call(ECHO, on.data, REPLIES)),
    "call_many": sends(lambda on: on.a.call_many(ECHO, [on.data] * 3, REPLIES), 3),
    "ventilator": sends(lambda on: on.a.ventilator([FIRST, SECOND, LAST], on.data)),
    "lists": sends(lambda on: on.a.notify(LISTS, on.data)),
    "request": ends(lambda on: on.a.request(ECHO, on.data)),
    "request by key": ends(lambda on: on.a.request(ECHO, on.data, key="key")),
    "request of a large one": ends(lambda on: on.a.request(ECHO, on.large)),
    "request of an async def": ends(lambda on: on.a.request(LATER, on.data)),
    "request of a list": ends(lambda on: on.a.request(LISTS, on.data)),
    "request of a race": ends(lambda on: on.a.request(RACED, on.data)),
    "request to itself": ends(lambda on: on.b.request(ECHO, on.data, to=on.b.id)),
    "request that raises": ends(lambda on: on.a.request(RAISES, on.data), RemoteError),
    "request that is shed": ends(lambda on: on.a.request(SHEDS, on.data), Overloaded),
    "request past its deadline": ends(
        lambda on: on.a.request(KEEPS, on.data, timeout=0.01), DeadlineExceeded
    ),
    "request that is cancelled": cancel,
    "request that is forgotten": forget,
    "guest notify": sends(lambda on: on.guest.notify(LAST, on.data)),
    "guest publish": sends(lambda on: on.guest.publish(LAST, on.data)),
    "guest call": sends(lambda on: on.guest.call(ECHO, on.data, REPLIES)),
    "guest request": ends(lambda on: on.guest.request(ECHO, on.data)),
    "guest request that raises": ends(lambda on: on.guest.request(RAISES, on.data), RemoteError),
    "serial request": ends(lambda on: on.serial.request(ECHO, on.data)),
    "serial notify": sends(lambda on: on.serial.notify(LAST, on.data)),
    "timers": timers,
    "subscribe": subscribe,
    "full queue": overflow,
    "nobody subscribes": refuses(lambda on: on.a.notify(NOBODY, on.data), NoSubscriber),
    "nobody to ask": refuses(lambda on: on.a.request(NOBODY, on.data), NoSubscriber),
    "too large": refuses(lambda on: on.a.notify(ECHO, HUGE), FrameError),
    "no bytes": refuses(lambda on: on.a.notify(ECHO, "text"), TypeError),  # type: ignore[arg-type]
    "no channel": refuses(lambda on: on.a.publish(1 << 20, on.data), DomiError, ValueError),
}


async def joins(on: Stage, count: int) -> None:
    for _ in range(count):
        pair = [on.a.request(channel, on.data) for channel in (JOINED, JOINED_TOO)]
        assert await asyncio.gather(*pair) == [b"", b""]


OPERATIONS["request of a join"] = joins


def blocks() -> int:
    gc.collect()
    gc.collect()
    return sys.getallocatedblocks()


@pytest.mark.parametrize("name", OPERATIONS)
async def test_nothing_is_left_of(
    name: str, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "domi_fast")
    async with stage(registry_url) as on:
        operation = OPERATIONS[name]

        async def settled(count: int) -> None:
            for _ in range(count // BURST):
                await operation(on, BURST)
            await on.a.drained(on.b.id)
            await until(lambda: on.a.counters()["in_flight"] == 0)

        await settled(4 * BURST)
        before = blocks()
        held = [sys.getrefcount(each) for each in on.tracked()]
        await settled(COUNT)
        assert abs(blocks() - before) < NOISE
        assert [sys.getrefcount(each) for each in on.tracked()] == held
        assert on.kept == []
        assert on.b.counters().get("protocol_errors", 0) == 0
