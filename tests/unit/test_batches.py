"""Several messages at once: verbs that send many, and handlers that get lists."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from domi_fast import (
    AlreadyReplied,
    Context,
    DomiError,
    FrameError,
    Node,
    NoSubscriber,
    Overloaded,
    RemoteError,
    Serial,
    connect,
)
from tests.conftest import LOOPS
from tests.support import echo, forget_records, nodes, until


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


@asynccontextmanager
async def trio(url: str) -> AsyncIterator[list[Node]]:
    """Three nodes, of which the last two note what they get on channel 50."""
    async with nodes(url, "a", "b", "c") as made:
        yield made


MESSAGES = [b"%d" % number for number in range(100)]


# ------------------------------------------------------------------------------------------ sending


async def test_notify_many(registry_url: str) -> None:
    """As notify for each: round robin, in order, from any iterable."""
    async with trio(registry_url) as (a, b, c):
        seen: dict[int, list[bytes]] = {b.id: [], c.id: []}
        for node in (b, c):
            node.subscribe(50, lambda ctx, into=seen[node.id]: into.append(ctx.data))
        await a.wait_subscribed(50, count=2, timeout=5)
        assert a.notify_many(50, MESSAGES) == 100
        assert a.notify_many(50, []) == 0
        await until(lambda: sum(map(len, seen.values())) == 100)
        assert sorted(seen.values()) == sorted([MESSAGES[::2], MESSAGES[1::2]])
        assert a.notify_many(50, (bytearray(each) for each in MESSAGES), to=c.id) == 100
        await until(lambda: len(seen[c.id]) == 150)
        assert seen[c.id][50:] == MESSAGES


async def test_publish_many(registry_url: str) -> None:
    async with trio(registry_url) as (a, b, c):
        seen: dict[int, list[bytes]] = {a.id: [], b.id: [], c.id: []}
        for node in (a, b, c):
            node.subscribe(50, lambda ctx, into=seen[node.id]: into.append(ctx.data))
        await a.wait_subscribed(50, count=3, timeout=5)
        assert a.publish_many(50, MESSAGES) == 300
        assert a.publish_many(51, MESSAGES) == 0
        assert a.publish_many(50, [b"last"], to=b.id) == 1
        await until(lambda: sum(map(len, seen.values())) == 301)
        assert seen[a.id] == seen[c.id] == MESSAGES
        assert seen[b.id] == [*MESSAGES, b"last"]


async def test_call_many(registry_url: str) -> None:
    async with trio(registry_url) as (a, b, c):
        replies: list[tuple[int, bytes]] = []
        a.subscribe(60, lambda ctx: replies.append((ctx.sender, ctx.data)))
        for node in (b, c):
            node.subscribe(50, echo)
        await a.wait_subscribed(50, count=2, timeout=5)
        assert a.call_many(50, MESSAGES, 60, to=b.id) == 100
        await until(lambda: len(replies) == 100)
        assert replies == [(b.id, message) for message in MESSAGES]
        replies.clear()
        assert a.call_many(50, MESSAGES, 60) == 100
        await until(lambda: len(replies) == 100)
        assert sorted(message for _, message in replies) == sorted(MESSAGES)
        assert {sender for sender, _ in replies} == {b.id, c.id}


async def test_a_guest_sends_many(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        seen: list[bytes] = []
        a.subscribe(50, lambda ctx: seen.append(ctx.data))
        a.subscribe(51, echo)
        guest = await connect(f"tcp://127.0.0.1:{a.port}")
        try:
            replies: list[bytes] = []
            guest.subscribe(60, lambda ctx: replies.append(ctx.data))
            assert guest.notify_many(50, MESSAGES) == 100
            assert guest.publish_many(50, MESSAGES) == 100
            assert guest.call_many(51, MESSAGES, 60) == 100
            await until(lambda: len(seen) == 200 and len(replies) == 100)
            assert seen == MESSAGES * 2
            assert replies == MESSAGES
        finally:
            await guest.close()


async def test_what_is_refused_says_how_many_went_before(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", queue_limit=65536, frame_limit=65536) as (a, b):
        seen: list[int] = []
        b.subscribe(50, lambda ctx: seen.append(len(ctx.data)))
        await a.wait_subscribed(50, timeout=5)
        verbs: list[Any] = [
            a.notify_many,
            a.publish_many,
            lambda channel, messages: a.call_many(channel, messages, 60),
        ]
        for send in verbs:
            with pytest.raises(FrameError) as too_large:
                send(50, [b"1", b"22", bytes(70_000), b"333"])
            assert too_large.value.sent == 2
            with pytest.raises(TypeError):
                send(50, [b"4444", "text"])
            with pytest.raises(ValueError, match="50-65499"):
                send(49, [b""])
        await until(lambda: len(seen) == 9)
        assert seen == [1, 2, 4] * 3
        with pytest.raises(NoSubscriber) as nobody:
            a.notify_many(51, [b"x"])
        assert nobody.value.sent == 0
        with pytest.raises(Overloaded) as full:
            a.notify_many(50, [bytes(60_000)] * 1000)
        assert full.value.sent is not None
        assert 1 <= full.value.sent < 1000
        await until(lambda: seen.count(60_000) == full.value.sent)
        assert DomiError("by itself").sent is None


async def test_reply_many(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        b.subscribe(50, kept.append)
        await a.wait_subscribed(50, timeout=5)
        asked = [a.request(50, message) for message in MESSAGES]
        await until(lambda: len(kept) == 100)
        with pytest.raises(ValueError, match="2 answers for 100 contexts"):
            b.reply_many(kept, [b"", b""])
        assert b.reply_many(kept[:50], [ctx.data for ctx in kept[:50]]) == 50
        with pytest.raises(AlreadyReplied) as twice:
            b.reply_many([kept[50], kept[0], kept[51]], b"same")
        assert twice.value.sent == 1
        assert b.reply_many(iter(kept[51:]), b"same") == 49
        assert await asyncio.gather(*asked) == MESSAGES[:50] + [b"same"] * 50


# --------------------------------------------------------------------------------------- receiving


@pytest.mark.parametrize("serially", [False, True])
async def test_a_handler_that_gets_lists(registry_url: str, serially: bool) -> None:
    """What one read brings on the channel, whatever came on others in between; 256 at a time."""
    async with nodes(registry_url, "a", "b") as (a, b):
        where = Serial(b) if serially else b
        lists: list[list[bytes]] = []
        others: list[bytes] = []

        @where.subscribe(50, batch=True)
        def handler(contexts: list[Context]) -> None:
            lists.append([ctx.data for ctx in contexts])
            assert {ctx.channel for ctx in contexts} == {50}

        where.subscribe(51, lambda ctx: others.append(ctx.data))
        if serially:
            await where.start()
        await a.wait_subscribed(51, timeout=5)
        for message in MESSAGES:
            a.notify(50, message)
            a.notify(51, message)
        await until(lambda: len(others) == 100)
        await until(lambda: sum(map(len, lists)) == 100)
        assert others == MESSAGES
        assert [message for each in lists for message in each] == MESSAGES
        assert len(lists) < 50
        a.notify(50, bytes(200_000))
        await until(lambda: lists[-1] == [bytes(200_000)])
        b.notify(50, b"from itself")
        await until(lambda: lists[-1] == [b"from itself"])
        lists.clear()
        many = [b"%d" % number for number in range(10_000)]
        a.notify_many(50, many)
        await until(lambda: sum(map(len, lists)) == 10_000)
        assert [message for each in lists for message in each] == many
        # How much one read brings depends on the machine: more than a few, and never more than 256.
        assert 16 <= max(map(len, lists)) <= 256
        if serially:
            await where.close()


@pytest.mark.parametrize("serially", [False, True])
async def test_requests_in_lists_have_one_outcome_each(registry_url: str, serially: bool) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        where = Serial(b) if serially else b
        kept: list[Context] = []

        @where.subscribe(50, batch=True)
        def handler(contexts: list[Context]) -> None:
            for ctx in contexts:
                if ctx.data == b"answer":
                    ctx.reply(b"answered")
                elif ctx.data == b"keep":
                    kept.append(ctx)
            if contexts[-1].data == b"raise":
                raise LookupError("inside")

        if serially:
            await where.start()
        await a.wait_subscribed(50, timeout=5)

        async def outcomes(*messages: bytes) -> list[str]:
            asked = [a.request(50, message) for message in messages]
            await until(lambda: all(request.done() for request in asked) or kept)
            for ctx in kept:
                ctx.reply(b"kept")
            kept.clear()
            found = await asyncio.gather(*asked, return_exceptions=True)
            return [
                each.type if isinstance(each, RemoteError) else bytes(each).decode()  # type: ignore[arg-type]
                for each in found
            ]

        assert await outcomes(b"answer", b"forget", b"keep") == ["answered", "NoAnswer", "kept"]
        assert await outcomes(b"answer", b"raise") == ["answered", "LookupError"]
        assert b.counters()["handler_errors"] == 1
        if serially:
            await where.close()


@pytest.mark.parametrize("serially", [False, True])
async def test_a_handler_of_lists_that_is_taken_off(registry_url: str, serially: bool) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        where = Serial(b) if serially else b
        lists: list[int] = []

        def off(ctx: Context) -> None:
            where.unsubscribe(50)
            ctx.reply(b"")

        where.subscribe(50, lambda contexts: lists.append(len(contexts)), batch=True)
        where.subscribe(51, off)
        if serially:
            await where.start()
        await a.wait_subscribed(51, timeout=5)
        # In one read: what waits for the end of it when the handler goes is refused.
        asked = [a.request(50, b""), a.request(50, b"")]
        await a.request(51, b"")
        for request in asked:
            with pytest.raises(NoSubscriber):
                await request
        assert lists == []
        if serially:
            await where.close()


async def test_handlers_that_cannot_get_lists(registry_url: str) -> None:
    async def handler(contexts: list[Context]) -> None:
        pass

    def generator(contexts: list[Context]) -> Iterator[None]:
        yield

    node = Node("a", registry=registry_url)
    for each, text in ((handler, "async def"), (generator, "a generator"), (5, "not callable")):
        with pytest.raises(TypeError, match=text):
            node.subscribe(50, each, batch=True)  # type: ignore[call-overload]
    assert node._router.handlers() == {}


@pytest.mark.parametrize("serially", [False, True])
async def test_the_list_is_the_handlers_own(registry_url: str, serially: bool) -> None:
    """Whatever it does with it: each request in it has one outcome all the same."""
    async with nodes(registry_url, "a", "b") as (a, b):
        where = Serial(b) if serially else b

        @where.subscribe(50, batch=True)
        def empties(contexts: list[Any]) -> None:
            while contexts:
                if contexts.pop().data == b"raise":
                    contexts[:] = [b"else", None]
                    raise LookupError("inside")
            contexts += ["other", None]

        if serially:
            await where.start()
        await a.wait_subscribed(50, timeout=5)
        asked = [a.request(50, b"", timeout=None) for _ in range(3)]
        for outcome in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(outcome, RemoteError)
            assert outcome.type == "NoAnswer"
        asked = [a.request(50, b"raise", timeout=None) for _ in range(3)]
        for outcome in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(outcome, RemoteError)
            assert outcome.type == "LookupError"
        if serially:
            await where.close()


@pytest.mark.parametrize("serially", [False, True])
async def test_a_handler_of_lists_may_say_that_it_is_overloaded(
    registry_url: str, serially: bool
) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        where = Serial(b) if serially else b

        @where.subscribe(50, batch=True)
        def busy(contexts: list[Context]) -> None:
            contexts[0].reply(b"first")
            raise Overloaded("busy")

        if serially:
            await where.start()
        await a.wait_subscribed(50, timeout=5)
        asked = [a.request(50, b"") for _ in range(3)]
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert outcomes[0] == b"first"
        assert [type(outcome) for outcome in outcomes[1:]] == [Overloaded] * 2
        assert b.counters()["handlers_overloaded"] == 1
        if serially:
            await where.close()


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("ends", [KeyboardInterrupt, SystemExit])
def test_lists_that_wait_when_the_loop_is_ended_are_run_later(
    kind: str, ends: type[BaseException], registry_url: str
) -> None:
    """A handler ends the loop in the middle of a tick: what was taken out of the ring is kept."""
    loop = LOOPS[kind]()
    lists: list[list[bytes]] = []

    async def begin() -> tuple[Node, Node, Serial]:
        a, b = Node("a", registry=registry_url), Node("b", registry=registry_url)
        await asyncio.gather(a.start(), b.start())
        serial = Serial(b)

        def end(ctx: Context) -> None:
            raise ends

        serial.subscribe(50, lambda contexts: lists.append([c.data for c in contexts]), batch=True)
        serial.subscribe(51, end)
        await serial.start()
        await a.wait_subscribed(51, timeout=5)
        return a, b, serial

    async def finish(a: Node, b: Node, serial: Serial) -> None:
        await until(lambda: lists)
        await serial.close()
        await asyncio.gather(a.close(), b.close())

    try:
        a, b, serial = loop.run_until_complete(begin())
        a.notify(50, b"1")
        a.notify(50, b"2")
        a.notify(51, b"")
        with pytest.raises(ends):
            loop.run_until_complete(asyncio.sleep(10))
        loop.run_until_complete(finish(a, b, serial))
    finally:
        loop.close()
    assert lists == [[b"1", b"2"]]


async def test_what_is_no_context(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        for wrong in (None, "context", 5):
            with pytest.raises(TypeError, match="is not a Context"):
                a.reply_many([wrong], b"")  # type: ignore[list-item]
            with pytest.raises(TypeError, match="is not a Context"):
                a._router.abandon([wrong])  # type: ignore[list-item]
