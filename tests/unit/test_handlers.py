"""What may be a handler, how it is run, and what its failures cost."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import re
import time
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from typing import Any

import pytest

from domi_fast import (
    Context,
    DomiError,
    Node,
    NoSubscriber,
    PeerLost,
    RemoteError,
    connect,
)
from tests.support import echo, endings, forget_records, link, nodes, until


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


class Custom(BaseException):
    """Not an Exception."""


async def answers(ctx: Context) -> None:
    await asyncio.sleep(0)
    ctx.reply(b"answer")


async def fails(ctx: Context) -> None:
    await asyncio.sleep(0)
    raise LookupError("inside")


class Later:
    """An awaitable of a class of its own."""

    def __init__(self, work: Awaitable[None]) -> None:
        self._work = work

    def __await__(self) -> Generator[Any, Any, None]:
        return self._work.__await__()


class Callee:
    def __init__(self, work: Callable[[Context], Awaitable[None]]) -> None:
        self._work = work

    async def __call__(self, ctx: Context) -> None:
        await self._work(ctx)


def of_a_generator(work: Callable[[Context], Awaitable[None]]) -> Callable[[Context], Any]:
    @types.coroutine
    def handler(ctx: Context) -> Generator[Any, Any, None]:
        yield from work(ctx).__await__()

    return handler


def generator(ctx: Context) -> Iterator[None]:
    yield


async def asynchronous_generator(ctx: Context) -> AsyncIterator[None]:
    yield


KINDS: dict[str, Callable[[Callable[[Context], Any]], Callable[[Context], Any]]] = {
    "async def": lambda work: work,
    "partial": functools.partial,
    "lambda": lambda work: work,
    "callable object": Callee,
    "object with __await__": lambda work: lambda ctx: Later(work(ctx)),
    "future": lambda work: lambda ctx: asyncio.ensure_future(work(ctx)),
    "generator-based coroutine": of_a_generator,
}


# ----------------------------------------------------------------------------------------- handlers


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError, Custom])
async def test_a_handler_that_raises_hurts_nobody(
    registry_url: str, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):

        def fails(ctx: Context) -> None:
            raise error("on purpose")

        b.subscribe(50, fails)
        b.subscribe(51, echo)
        await a.wait_subscribed(51, timeout=5)
        ends = link(a, b)
        for _ in range(3):
            a.notify(50, b"")
            a.publish(50, b"")
            a.call(50, b"", 60)
            a.ventilator([50, 51], b"")
            with pytest.raises(RemoteError) as raised:
                await a.request(50, b"")
            assert raised.value.type == error.__name__
            assert await a.request(51, b"alive") == b"alive"
        assert link(a, b) == ends
        assert b.counters()["handler_errors"] == 15
        assert "the handler of channel 50 failed" in caplog.text


async def test_an_async_handler_that_raises_hurts_nobody(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):

        async def fails(ctx: Context) -> None:
            if ctx.data == b"later":
                await asyncio.sleep(0.001)
            if ctx.data == b"cancelled":
                raise asyncio.CancelledError
            raise ValueError(ctx.data.decode())

        b.subscribe(50, fails)
        b.subscribe(51, echo)
        await a.wait_subscribed(51, timeout=5)
        ends = link(a, b)
        for data in (b"at once", b"later", b"cancelled"):
            a.notify(50, data)
            a.publish(50, data)
            a.call(50, data, 60)
            with pytest.raises(RemoteError):
                await a.request(50, data)
            assert await a.request(51, b"alive") == b"alive"
        await until(lambda: b.counters()["handler_errors"] == 12)
        assert link(a, b) == ends
        assert "the handler of channel 50 failed" in caplog.text


async def test_a_handler_that_raises_after_its_answer(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):

        def answers_and_fails(ctx: Context) -> None:
            ctx.reply(b"the answer")
            raise ValueError("afterwards")

        a.subscribe(50, answers_and_fails)
        request = a.request(50, b"")
        found = endings(request)
        assert await request == b"the answer"
        a.subscribe(51, echo)
        await a.request(51, b"")
        assert found == ["answer"]
        assert a.counters()["handler_errors"] == 1


async def test_a_request_that_the_handler_forgets(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):

        async def forgets_later(ctx: Context) -> None:
            await asyncio.sleep(0)

        b.subscribe(50, lambda ctx: None)
        b.subscribe(51, forgets_later)
        await a.wait_subscribed(51, timeout=5)
        for channel in (50, 51):
            request = a.request(channel, b"", None)
            found = endings(request)
            with pytest.raises(RemoteError) as raised:
                await asyncio.wait_for(request, 2)
            assert raised.value.type == "NoAnswer"
            await until(lambda found=found: found)
            assert found == ["RemoteError"]
        assert b.counters()["handlers_without_answer"] == 2


async def test_a_handler_that_unsubscribes_itself(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        got: list[bytes] = []

        def once() -> Callable[[Context], None]:
            def handler(ctx: Context) -> None:
                b.unsubscribe(50)
                gc.collect()
                got.append(ctx.data)
                ctx.reply(b"once")

            return handler

        b.subscribe(50, once())
        await a.wait_subscribed(50, timeout=5)
        outcomes = await asyncio.gather(
            *(a.request(50, b"%d" % number) for number in range(3)), return_exceptions=True
        )
        assert outcomes[0] == b"once"
        assert [type(outcome) for outcome in outcomes[1:]] == [NoSubscriber] * 2
        assert got == [b"0"]


async def test_a_handler_may_use_every_verb(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        got: list[bytes] = []

        async def busy(ctx: Context) -> None:
            answer = await b.request(51, b"asked")
            b.notify(52, answer + b" notified")
            b.publish(52, b"published")
            b.call(51, b"called", 52)
            ctx.reply(b"done")

        b.subscribe(50, busy)
        for node in (a, b):
            node.subscribe(51, echo)
        b.subscribe(52, lambda ctx: got.append(ctx.data))
        await a.wait_subscribed(52, timeout=5)
        await b.wait_subscribed(51, 2, 5)
        assert await a.request(50, b"") == b"done"
        await until(lambda: len(got) == 3)
        assert sorted(got) == [b"asked notified", b"called", b"published"]


async def test_close_waits_for_the_handlers_that_run(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        go_on = asyncio.Event()

        async def slow(ctx: Context) -> None:
            await go_on.wait()
            ctx.reply(b"in time")

        b.subscribe(50, slow)
        await a.wait_subscribed(50, timeout=5)
        request = a.request(50, b"")
        await until(b._router.handler_tasks)
        closing = asyncio.ensure_future(b.close())
        await asyncio.sleep(0)
        go_on.set()
        assert await request == b"in time"
        await closing


async def test_close_does_not_wait_for_ever(registry_url: str) -> None:
    cancelled: list[bool] = []
    async with nodes(registry_url, "a", "b", drain_timeout=0.05) as (a, b):

        async def endless(ctx: Context) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.append(True)

        b.subscribe(50, endless)
        await a.wait_subscribed(50, timeout=5)
        request = a.request(50, b"")
        await until(b._router.handler_tasks)
        begun = time.monotonic()
        await b.close()
        assert time.monotonic() - begun < 1
        assert cancelled == [True]
        with pytest.raises((PeerLost, RemoteError)):
            await request


async def test_an_async_handler_that_waits_holds_nobody_up(registry_url: str) -> None:
    """Neither the next message of its own channel, nor anything else on the same session."""
    async with nodes(registry_url, "a", "b") as (a, b):
        go_on = asyncio.Event()
        tasks: set[Any] = set()

        async def waits(ctx: Context) -> None:
            tasks.add(asyncio.current_task())
            await go_on.wait()
            ctx.reply(ctx.data)

        b.subscribe(50, waits)
        b.subscribe(51, echo)
        await a.wait_subscribed(51, timeout=5)
        waiting = [a.request(50, b"%d" % number, None) for number in range(20)]
        await until(lambda: len(tasks) == 20)
        assert await a.request(51, b"meanwhile", 5) == b"meanwhile"
        assert not any(request.done() for request in waiting)
        assert None not in tasks
        go_on.set()
        assert await asyncio.gather(*waiting) == [b"%d" % number for number in range(20)]


async def test_the_log_names_channel_and_sender_of_what_failed(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):

        def fails(ctx: Context) -> None:
            raise ValueError("the reason")

        async def fails_later(ctx: Context) -> None:
            await asyncio.sleep(0)
            raise ValueError("the reason")

        b.subscribe(50, fails)
        b.subscribe(51, fails_later)
        await a.wait_subscribed(51, timeout=5)
        for channel in (50, 51):
            caplog.clear()
            a.notify(channel, b"")
            await until(lambda channel=channel: b.counters().get("handler_errors") == channel - 49)
            [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
            text = record.getMessage()
            assert f"channel {channel} " in text
            assert f"node {a.id}" in text
            assert record.exc_info is not None
            assert str(record.exc_info[1]) == "the reason"


async def test_an_error_to_a_plain_call_is_logged_and_counted(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        replies: list[bytes] = []
        b.subscribe(50, lambda ctx: ctx.error("not today"))
        b.subscribe(51, echo)
        a.subscribe(60, lambda ctx: replies.append(ctx.data))
        await a.wait_subscribed(51, timeout=5)
        a.call(50, b"x", 60)
        assert await a.request(51, b"") == b""
        assert b.counters()["call_errors"] == 1
        assert re.search(rf"channel 50: .*node {a.id} .*not today", caplog.text)
        assert not replies


@pytest.mark.parametrize("kind", list(KINDS))
async def test_every_kind_of_coroutine_is_run(registry_url: str, kind: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        b.subscribe(60, KINDS[kind](answers))
        b.subscribe(61, KINDS[kind](fails))
        await a.wait_subscribed(60, timeout=5)
        await a.wait_subscribed(61, timeout=5)
        assert await a.request(60, b"", 5) == b"answer"
        with pytest.raises(DomiError, match=r"LookupError.*inside"):
            await a.request(61, b"", 5)
        assert b.counters()["handler_errors"] == 1
        await until(lambda: not b._router.handler_tasks())


async def test_a_request_returned_by_a_handler_is_waited_for(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        b.subscribe(60, lambda ctx: b.request(61, ctx.data))
        b.subscribe(61, lambda ctx: ctx.reply(ctx.data))
        await a.wait_subscribed(60, timeout=5)
        asked = a.request(60, b"", 5)
        # It was awaited, and the handler has answered with nothing.
        with pytest.raises(DomiError, match="NoAnswer"):
            await asked
        assert b.counters().get("handler_errors", 0) == 0


@pytest.mark.parametrize("handler", [generator, asynchronous_generator])
def test_generators_are_refused(registry_url: str, handler: Any) -> None:
    node = Node("a", registry=registry_url)
    for given in (handler, functools.partial(handler)):
        with pytest.raises(TypeError, match="generator"):
            node.subscribe(60, given)
    assert not node._router.handlers()


async def test_a_subscription_without_its_channel(registry_url: str) -> None:
    """The decorator's parentheses were forgotten, or the channel is wrong: said at once."""
    async with nodes(registry_url, "a") as (node,):
        guest = await connect(f"tcp://127.0.0.1:{node.port}")
        for one in (node, guest):
            with pytest.raises(TypeError, match="a channel is an int"):
                one.subscribe(print)  # type: ignore[call-overload]
            with pytest.raises(ValueError, match="70000"):
                one.subscribe(70_000)
            with pytest.raises(TypeError, match="not callable"):
                one.subscribe(60, None)  # type: ignore[call-overload]
        await guest.close()


@pytest.mark.parametrize("verb", ["notify", "request", "subscribe", "counters"])
def test_a_verb_cannot_be_overridden(verb: str) -> None:
    with pytest.raises(TypeError, match=f"Mine.{verb}.*cannot be overridden"):
        type("Mine", (Node,), {verb: lambda self: None})
    assert type("Mine", (Node,), {"other": lambda self: None})("a", registry="memory://x")
