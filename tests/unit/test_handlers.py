"""What may be a handler, and that whatever it returns to be awaited is awaited."""

from __future__ import annotations

import asyncio
import functools
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from typing import Any

import pytest

from domi_fast import Context, DomiError, Node, connect
from tests.support import forget_records, nodes, until


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


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


KINDS: dict[str, Callable[[Callable[[Context], Any]], Callable[[Context], Any]]] = {
    "async def": lambda work: work,
    "partial": functools.partial,
    "lambda": lambda work: work,
    "callable object": Callee,
    "object with __await__": lambda work: lambda ctx: Later(work(ctx)),
    "future": lambda work: lambda ctx: asyncio.ensure_future(work(ctx)),
    "generator-based coroutine": of_a_generator,
}


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


def generator(ctx: Context) -> Iterator[None]:
    yield


async def asynchronous_generator(ctx: Context) -> AsyncIterator[None]:
    yield


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
