"""A ring that is full: on the node's loop it is emptied, of a thread that waits it refuses."""

from __future__ import annotations

import asyncio
import time

import pytest

from domi_fast import Context, Overloaded, Serial
from tests.serial.modes import make_serial
from tests.support import echo, nodes, session, until


async def test_a_full_ring_is_emptied_by_who_fills_it(registry_url: str) -> None:
    """Handlers that are slower than the messages come keep the node from reading more of them."""
    async with nodes(registry_url, "a", "b") as (a, b):
        serial = Serial(b, ring_size=4096, drain_budget=0.00001)
        ran: list[int] = []
        most = 0
        refused: list[BaseException] = []
        a.on_error = lambda error, _: refused.append(error)

        def slow(ctx: Context) -> None:
            nonlocal most
            ran.append(int(ctx.data))
            most = max(most, serial.backlog)
            if len(ran) % 100 == 1:
                time.sleep(0.01)

        serial.subscribe(50, slow)
        serial.subscribe(51, echo)
        async with serial:
            await a.wait_subscribed(51, timeout=5)
            for number in range(2000):
                a.notify(50, b"%d" % number)
            asked = [a.request(51, b"%d" % number) for number in range(100)]
            # Large ones wait in the ring by reference.
            asked += [a.request(51, bytes(100_000)) for _ in range(10)]
            answers = await asyncio.gather(*asked)
            assert answers[:100] == [b"%d" % number for number in range(100)]
            assert answers[100:] == [bytes(100_000)] * 10
            assert ran == [*range(2000)]
            assert most * 48 > 4096 - 100
            assert not refused
            assert b.counters().get("ring_full", 0) == 0


@pytest.mark.parametrize("own", [False, True])
async def test_a_session_may_end_while_room_is_made(registry_url: str, own: bool) -> None:
    """A handler that runs then closes the session whose frame is in hand."""
    async with nodes(registry_url, "a", "b") as (a, b):
        serial = Serial(b, ring_size=4096, drain_budget=0.00001)
        ran = 0

        def handler(ctx: Context) -> None:
            nonlocal ran
            ran += 1
            if ran == 150:
                session(b, ctx.sender).close("the test ends it")

        serial.subscribe(50, handler)
        async with serial:
            sender = b if own else a
            await sender.wait_subscribed(50, timeout=5)
            for _ in range(1000):
                sender.notify(50, bytes(40))
            await until(lambda: ran >= 150)


@pytest.mark.usefixtures("threaded")
async def test_a_full_ring_of_a_thread_that_waits_refuses(registry_url: str) -> None:
    """Everything is either run or refused, and the sender hears of each that is refused."""
    async with nodes(registry_url, "a", "b") as (a, b):
        serial = make_serial(b, ring_size=4096, drain_budget=0.00001)
        ran: list[bytes] = []
        refused: list[tuple[type[BaseException], bytes]] = []
        a.on_error = lambda error, frame: refused.append((type(error), frame.data))

        def slow(ctx: Context) -> None:
            ran.append(ctx.data)
            if ctx.data == b"0":
                time.sleep(0.05)

        serial.subscribe(50, slow)
        serial.subscribe(51, echo)
        async with serial:
            await a.wait_subscribed(51, timeout=5)
            for number in range(500):
                a.notify(50, b"%d" % number)
            asked = [a.request(51, b"") for _ in range(10)]
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
            await until(lambda: len(ran) + len(refused) == 500)
            overloaded = sum(isinstance(outcome, Overloaded) for outcome in outcomes)
            assert refused
            assert {kind for kind, _ in refused} == {Overloaded}
            assert sorted([*ran, *(message for _, message in refused)]) == sorted(
                b"%d" % number for number in range(500)
            )
            assert b.counters()["ring_full"] == len(refused) + overloaded
            assert overloaded + outcomes.count(b"") == 10
            assert ran == sorted(ran, key=int)
            assert await a.request(51, b"after") == b"after"
