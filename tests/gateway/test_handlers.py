"""What clients say to the gateway itself."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from domi_fast.gateway import Refusal
from tests.gateway.clients import Told, connected
from tests.gateway.nodes import gateway


async def test_a_handler_answers() -> None:
    async with gateway() as gate, connected(gate) as client:

        @gate.handle(60)
        def upper(message: Any) -> None:
            message.reply(61, message.data.upper())

        @gate.handle(62)
        async def later(message: Any) -> None:
            await asyncio.sleep(0)
            message.reply(63, b"%d" % message.user)

        await client.hello()
        await client.send(60, b"hi")
        await client.send(62)
        assert await client.take() == Told(61, b"HI")
        assert await client.take() == Told(63, b"%d" % client.user)


async def test_nobody_handles_this() -> None:
    async with gateway() as gate, connected(gate) as client:
        await client.hello()
        await client.send(60)
        why = "this gateway handles no event 60"
        assert await client.refused() == (0, 60, Refusal.NO_HANDLER, why)


class Wordless(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("no such thing"), "ValueError: no such thing"),
        (ValueError(json.loads('"\\ud800"')), "ValueError: ?"),
        (Wordless(), "Wordless"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
async def test_a_handler_that_raises(error: Exception, told: str, is_async: bool) -> None:
    async with gateway() as gate, connected(gate) as client:

        async def fails_later(message: Any) -> None:
            await asyncio.sleep(0)
            raise error

        def fails(message: Any) -> None:
            raise error

        gate.handle(60, fails_later if is_async else fails)
        await client.hello()
        for _ in range(2):
            await client.send(60)
            assert await client.refused() == (0, 60, Refusal.FAILED, told)
        assert gate.node.counters()["gateway_handler_errors"] == 2


async def test_a_handler_that_asks_for_the_result_of_a_cancelled_future() -> None:
    async with gateway() as gate, connected(gate) as client:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        gate.handle(60, lambda message: future.result())
        await client.hello()
        await client.send(60)
        assert (await client.refused())[:3] == (0, 60, Refusal.FAILED)


async def test_so_many_handlers_run_at_a_time() -> None:
    async with gateway(handler_limit=2) as gate, connected(gate) as client:
        done = asyncio.Event()

        @gate.handle(60)
        async def waits(message: Any) -> None:
            await done.wait()
            message.reply(61, message.data)

        await client.hello()
        for number in range(3):
            await client.send(60, b"%d" % number)
        assert (await client.refused())[:3] == (0, 60, Refusal.OVERLOADED)
        done.set()
        assert [(await client.take()).data for _ in range(2)] == [b"0", b"1"]
        await client.send(60, b"again")
        assert await client.take() == Told(61, b"again")
