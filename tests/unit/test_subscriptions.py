"""Subscribing: by call, by decorator, and for the length of a block."""

from __future__ import annotations

import asyncio
import functools
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from domi_fast import (
    Context,
    DomiError,
    LibraryChannel,
    Node,
    NoSubscriber,
    Overloaded,
    connect,
)
from tests.support import echo, forget_records, nodes, until

WRONG_CHANNELS = [-1, 0, 49, 65500, 65501, 65535, 65536, 1 << 40, True]
WINGS = (LibraryChannel.ZONE, LibraryChannel.GATEWAY)


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


async def anext_of(messages: Any) -> Context:
    return await asyncio.wait_for(messages.__anext__(), 5)


# ------------------------------------------------------------------------------------ subscriptions


async def test_def_and_async_def_both_answer(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):

        async def later(ctx: Context) -> None:
            await asyncio.sleep(0)
            ctx.reply(b"async " + ctx.data)

        b.subscribe(50, lambda ctx: ctx.reply(b"def " + ctx.data))
        b.subscribe(51, later)
        await a.wait_subscribed(50, timeout=5)
        await a.wait_subscribed(51, timeout=5)
        assert await a.request(50, b"x") == b"def x"
        assert await a.request(51, b"x") == b"async x"


async def test_subscribe_as_a_decorator_leaves_the_function(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):

        @a.subscribe(50)
        def double(ctx: Context) -> None:
            ctx.reply(ctx.data * 2)

        @a.subscribe(51)
        async def triple(ctx: Context) -> None:
            ctx.reply(ctx.data * 3)

        assert callable(double)
        assert asyncio.iscoroutinefunction(triple)
        assert await a.request(50, b"x") == b"xx"
        assert await a.request(51, b"x") == b"xxx"


async def test_any_callable_may_be_a_handler(registry_url: str) -> None:
    class Service:
        def method(self, ctx: Context) -> None:
            ctx.reply(b"method")

        def __call__(self, ctx: Context) -> None:
            ctx.reply(b"call")

    def named(text: bytes, ctx: Context) -> None:
        ctx.reply(text)

    async with nodes(registry_url, "a") as (a,):
        a.subscribe(50, Service().method)
        a.subscribe(51, Service())
        a.subscribe(52, functools.partial(named, b"partial"))
        assert await asyncio.gather(*(a.request(c, b"") for c in (50, 51, 52))) == [
            b"method",
            b"call",
            b"partial",
        ]


async def test_a_channel_has_one_handler(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(50, lambda ctx: ctx.reply(b"first"))
        with pytest.raises(DomiError, match="50") as refused:
            a.subscribe(50, echo)
        assert refused.value.channel == 50
        assert await a.request(50, b"") == b"first"
        a.unsubscribe(50)
        a.subscribe(50, lambda ctx: ctx.reply(b"second"))
        assert await a.request(50, b"") == b"second"


async def test_unsubscribe_ends_it_here_and_at_the_peers(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        assert a.subscribers(50) == [b.id]
        assert 50 in a.peers[b.id].channels
        b.unsubscribe(50)
        await until(lambda: not a.subscribers(50))
        assert 50 not in a.peers[b.id].channels
        for node in (a, b):
            with pytest.raises(NoSubscriber):
                node.notify(50, b"")
        with pytest.raises(DomiError) as refused:
            b.unsubscribe(50)
        assert refused.value.channel == 50


def test_unsubscribe_lets_go_of_the_handler(registry_url: str) -> None:
    node = Node("a", registry=registry_url)

    class Handler:
        def __call__(self, ctx: Context) -> None: ...

    handler = Handler()
    gone = weakref.ref(handler)
    node.subscribe(50, handler)
    node.unsubscribe(50)
    del handler
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("channel", WRONG_CHANNELS)
async def test_channels_of_the_library_are_refused(registry_url: str, channel: int) -> None:
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(60, echo)
        for verb in (
            lambda: a.subscribe(channel, echo),
            lambda: a.unsubscribe(channel),
            lambda: a.notify(channel, b""),
            lambda: a.publish(channel, b""),
            lambda: a.call(channel, b"", 60),
            lambda: a.call(60, b"", channel),
            lambda: a.request(channel, b""),
            lambda: a.ventilator([channel], b""),
            lambda: a.ventilator([60, channel], b""),
        ):
            with pytest.raises(ValueError, match=str(channel)):
                verb()


@pytest.mark.parametrize("channel", ["50", 50.0, None, b"50"])
async def test_a_channel_is_an_int(registry_url: str, channel: Any) -> None:
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(60, echo)
        for verb in (
            lambda: a.subscribe(channel, echo),
            lambda: a.notify(channel, b""),
            lambda: a.publish(channel, b""),
            lambda: a.call(60, b"", channel),
            lambda: a.request(channel, b""),
            lambda: a.ventilator([channel], b""),
        ):
            with pytest.raises(TypeError):
                verb()


def test_a_handler_is_callable(registry_url: str) -> None:
    with pytest.raises(TypeError, match="callable"):
        Node("a", registry=registry_url).subscribe(50, 5)


async def test_the_edges_of_the_users_channels(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        for channel in (50, 65499):
            b.subscribe(channel, echo)
            await a.wait_subscribed(channel, timeout=5)
            assert await a.request(channel, b"edge") == b"edge"


async def test_library_channels_only_by_name(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        got: list[bytes] = []
        b.subscribe(LibraryChannel.NIL, lambda ctx: got.append(ctx.data))
        await a.wait_subscribed(LibraryChannel.NIL, timeout=5)
        a.notify(LibraryChannel.NIL, b"by name")
        await until(lambda: got)
        assert got == [b"by name"]
        for channel in set(LibraryChannel) - {LibraryChannel.NIL, *WINGS}:
            with pytest.raises(ValueError, match="served by the core"):
                b.subscribe(channel, echo)


async def test_the_channels_of_wings(registry_url: str) -> None:
    """Announced and routed as those of users are; by their members, and not by guests."""
    async with nodes(registry_url, "a", "b", "c") as (a, b, c):
        for channel in WINGS:
            got: list[tuple[int, bytes]] = []

            def take(ctx: Context, got: list[tuple[int, bytes]] = got, own: int = a.id) -> None:
                assert ctx.sender == own
                got.append((ctx.channel, ctx.data))

            for node in (b, c):
                node.subscribe(channel, take)
            await a.wait_subscribed(channel, 2, timeout=5)
            assert a.subscribers(channel) == sorted([b.id, c.id])
            assert channel in a.peers[b.id].channels
            a.notify(channel, b"one", to=c.id)
            await until(lambda got=got: len(got) == 1)
            assert a.publish(channel, b"all") == 2
            await until(lambda got=got: len(got) == 3)
            assert got == [(channel, b"one"), *[(channel, b"all")] * 2]
            c.unsubscribe(channel)
            await until(lambda channel=channel: a.subscribers(channel) == [b.id])
            with pytest.raises(ValueError, match="members of LibraryChannel"):
                a.publish(int(channel), b"by number")
            with pytest.raises(ValueError, match="members of LibraryChannel"):
                c.subscribe(int(channel), take)


async def test_the_channels_of_wings_are_not_for_guests(registry_url: str) -> None:
    async with (
        nodes(registry_url, "a", "b") as (a, b),
        await connect(f"tcp://127.0.0.1:{a.port}") as guest,
    ):
        got: list[bytes] = []
        refused: list[DomiError] = []
        guest.on_error = lambda error, _: refused.append(error)
        for channel in WINGS:
            b.subscribe(channel, lambda ctx: got.append(ctx.data))
            await a.wait_subscribed(channel, timeout=5)
            guest.notify(channel, b"from a guest")
            guest.publish(channel, b"from a guest")
            with pytest.raises(DomiError, match="members of LibraryChannel"):
                await guest.request(channel, b"from a guest")
            guest.subscribe(channel, lambda ctx: got.append(ctx.data))
        # What is announced and sent in order has been seen once this is.
        guest.subscribe(60, echo)
        await b.wait_subscribed(60, timeout=5)
        for channel in WINGS:
            assert b.subscribers(channel) == [b.id]
            assert a.publish(channel, b"to nodes") == 1
        await until(lambda: len(got) == len(WINGS))
        assert got == [b"to nodes"] * len(WINGS)
        assert [error.channel for error in refused] == [8, 8, 9, 9]


async def test_subscriptions_made_before_the_start(registry_url: str) -> None:
    late = Node("b", registry=registry_url)
    late.subscribe(50, echo)
    async with nodes(registry_url, "a") as (a,), late:
        # Listed as a peer means: its channels are known.
        await a.wait_peers(1, 5)
        assert a.subscribers(50) == [late.id]
        assert await a.request(50, b"x") == b"x"


# ------------------------------------------------------------------------------------ watch_channel


async def test_watch_channel(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        async with b.watch_channel(50) as messages:
            await a.wait_subscribed(50, timeout=5)
            for number in range(10):
                a.notify(50, b"%d" % number)
            request = a.request(50, b"question")
            got = []
            async for ctx in messages:
                got.append(ctx.data)
                if ctx.is_request:
                    ctx.reply(b"answer")
                    break
            assert got == [b"%d" % number for number in range(10)] + [b"question"]
            assert await request == b"answer"
        await until(lambda: not a.subscribers(50))
        with pytest.raises(NoSubscriber):
            b.notify(50, b"")
        b.subscribe(50, echo)


async def test_watch_channel_when_full(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,), a.watch_channel(50, maxsize=2) as messages:
        for number in range(5):
            a.notify(50, b"%d" % number)
        with pytest.raises(Overloaded, match="2 messages"):
            await a.request(50, b"")
        assert a.counters()["handlers_overloaded"] == 4
        a.subscribe(51, echo)
        got = [(await anext_of(messages)).data for _ in range(2)]
        assert got == [b"0", b"1"]
        a.notify(50, b"there is room again")
        assert (await anext_of(messages)).data == b"there is room again"


async def test_leaving_a_watch_by_an_error_unsubscribes(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):

        async def fail_within() -> None:
            async with a.watch_channel(50):
                assert a.subscribers(50) == [a.id]
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail_within()
        assert not a.subscribers(50)


async def test_a_watch_is_a_subscription(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(50, echo)
        with pytest.raises(DomiError):
            async with a.watch_channel(50):
                pass
        assert await a.request(50, b"mine") == b"mine"
        with pytest.raises(ValueError, match="maxsize"):
            async with a.watch_channel(51, maxsize=0):
                pass
        with pytest.raises(ValueError, match="49"):
            async with a.watch_channel(49):
                pass
        async with a.watch_channel(52):
            a.unsubscribe(52)
