"""Contexts: what a handler is given, and the ways to answer it."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from domi_fast import (
    AlreadyReplied,
    Context,
    DomiError,
    FrameError,
    Node,
    PeerLost,
    RemoteError,
)
from tests.support import echo, endings, forget_records, nodes, session, until


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


async def test_the_deadline_travels(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", request_timeout=3.0) as (a, b):
        seen: list[float | None] = []

        def look(ctx: Context) -> None:
            seen.append(ctx.deadline)
            ctx.reply(b"")

        b.subscribe(50, look)
        await a.wait_subscribed(50, timeout=5)
        for timeout in (0.5, 20.0):
            begun = time.monotonic()
            await a.request(50, b"", timeout)
            seen_deadline = seen.pop()
            assert seen_deadline is not None
            assert begun + timeout <= seen_deadline < time.monotonic() + timeout + 0.1
        begun = time.monotonic()
        await a.request(50, b"")
        default = seen.pop()
        assert default is not None
        assert begun + 3.0 <= default < time.monotonic() + 3.1


async def test_a_context_is_immutable(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        kept: list[Context] = []
        a.subscribe(50, kept.append)
        a.notify(50, b"x")
        await until(lambda: kept)
        names = ["data", "channel", "sender", "deadline", "extend", "is_request", "answered", "new"]
        for name in names:
            with pytest.raises(AttributeError):
                setattr(kept[0], name, b"")
        with pytest.raises(AttributeError):
            del kept[0].data
        with pytest.raises(TypeError):
            Context().reply(b"")  # nobody but the core makes one that can be answered


async def test_a_context_stays_valid(registry_url: str) -> None:
    """After the handler returned, after the buffers were used again, after the peer is gone."""
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        b.subscribe(50, kept.append)
        b.subscribe(51, echo)
        await a.wait_subscribed(51, timeout=5)
        sent = [bytes([number]) * size for number in range(1, 20) for size in (3, 5000, 50_000)]
        for data in sent:
            a.notify(50, data)
        for _ in range(20):
            await a.request(51, bytes(60_000))
        assert [ctx.data for ctx in kept] == sent
        await a.close()
        await b.wait_peers(0, 5)
        gc.collect()
        assert [ctx.data for ctx in kept] == sent
        assert {(ctx.channel, ctx.sender) for ctx in kept} == {(50, 0 if b.id else 1)}
        assert "50" in repr(kept[0])


async def test_a_context_that_is_kept_never_shows_another_message(registry_url: str) -> None:
    """The core uses a context again once nobody has it: kept by a list, a frame or a traceback."""
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        seen: list[bytes] = []

        def some(ctx: Context) -> None:
            if len(ctx.data) % 3 == 0:
                kept.append(ctx)
            elif len(ctx.data) % 3 == 1:
                seen.append(ctx.data)

        async def later(ctx: Context) -> None:
            await asyncio.sleep(0)
            ctx.reply(ctx.data + ctx.extend)

        errors: list[BaseException] = []

        def fail(ctx: Context) -> None:
            try:
                raise ValueError(ctx.channel)
            except ValueError as error:
                errors.append(error)

        b.subscribe(50, some)
        b.subscribe(51, later)
        b.subscribe(52, fail)
        b.subscribe(53, echo)
        await a.wait_subscribed(53, timeout=5)
        sizes = list(range(100))
        answers = []
        for size in sizes:
            a.notify(50, bytes([size]) * size)
            a.ventilator([52] + [54] * size, bytes([size]))
            answers.append(a.request(51, bytes([size]) * size))
        for size, answer in zip(sizes, await asyncio.gather(*answers), strict=True):
            assert answer[:-13] == bytes([size]) * size
        assert await a.request(53, b"last") == b"last"
        assert [ctx.data for ctx in kept] == [bytes([size]) * size for size in sizes[::3]]
        assert seen == [bytes([size]) * size for size in sizes[1::3]]
        frames = [error.__traceback__.tb_frame for error in errors if error.__traceback__]
        contexts = [frame.f_locals["ctx"] for frame in frames]
        assert [ctx.data for ctx in contexts] == [bytes([size]) for size in sizes]
        assert [len(ctx.extend) for ctx in contexts] == [1 + 2 * size for size in sizes]


async def test_nothing_of_a_message_is_kept_once_its_handler_is_done(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        done: list[int] = []
        a.subscribe(50, lambda ctx: done.append(len(ctx.data)))
        data = bytes(100_000)
        before = sys.getrefcount(data)
        a.notify(50, data)
        await until(lambda: done)
        assert sys.getrefcount(data) == before


async def test_answered_later(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        b.subscribe(50, kept.append)
        await a.wait_subscribed(50, timeout=5)
        replies: list[bytes] = []
        a.subscribe(60, lambda ctx: replies.append(ctx.data))
        requests = [a.request(50, b"%d" % number) for number in range(3)]
        a.call(50, b"call", 60)
        await until(lambda: len(kept) == 4)
        assert not any(request.done() for request in requests)
        for ctx in reversed(kept):
            assert not ctx.answered
            ctx.reply(ctx.data)
            assert ctx.answered
        assert await asyncio.gather(*requests) == [b"0", b"1", b"2"]
        await until(lambda: replies)
        assert replies == [b"call"]


async def test_answered_from_another_thread(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        replies: list[bytes] = []
        results: list[bytes] = []

        async def in_a_thread(ctx: Context) -> None:
            await asyncio.to_thread(ctx.reply, bytearray(ctx.data))

        def thread_error(ctx: Context) -> None:
            threading.Thread(target=ctx.error, args=["from a thread"]).start()

        def thread_next(ctx: Context) -> None:
            threading.Thread(target=ctx.next, args=[memoryview(ctx.data)]).start()

        b.subscribe(50, in_a_thread)
        b.subscribe(51, thread_error)
        b.subscribe(52, thread_next)
        a.subscribe(60, lambda ctx: replies.append(ctx.data))
        a.subscribe(61, lambda ctx: results.append(ctx.data))
        await a.wait_subscribed(52, timeout=5)
        await b.wait_subscribed(61, timeout=5)
        assert await a.request(50, b"request") == b"request"
        a.call(50, b"call", 60)
        with pytest.raises(RemoteError, match="from a thread"):
            await a.request(51, b"")
        a.ventilator([52, 61], b"pipeline")
        await until(lambda: replies and results)
        assert (replies, results) == ([b"call"], [b"pipeline"])


async def test_another_thread_hears_its_own_mistakes(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        b.subscribe(50, kept.append)
        await a.wait_subscribed(50, timeout=5)
        request = a.request(50, b"")
        await until(lambda: kept)
        with pytest.raises(TypeError):
            await asyncio.to_thread(kept[0].reply, "text")
        with pytest.raises(TypeError):
            await asyncio.to_thread(kept[0].reply, 5)
        await asyncio.to_thread(kept[0].reply, b"fine")
        with pytest.raises(AlreadyReplied):
            await asyncio.to_thread(kept[0].reply, b"second")
        assert await request == b"fine"
        a.notify(50, b"")
        await until(lambda: len(kept) == 2)
        with pytest.raises(DomiError, match="no answer"):
            await asyncio.to_thread(kept[1].reply, b"")
        await a.close()
        await b.wait_peers(0, 5)
        with pytest.raises((PeerLost, AlreadyReplied)):
            await asyncio.to_thread(kept[0].reply, b"")


async def test_many_threads_answer_at_once(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        b.subscribe(50, kept.append)
        await a.wait_subscribed(50, timeout=5)
        requests = [a.request(50, b"%d" % number) for number in range(400)]
        await until(lambda: len(kept) == 400)

        def answer(contexts: list[Context]) -> None:
            for ctx in contexts:
                ctx.reply(ctx.data)

        threads = [threading.Thread(target=answer, args=[kept[n::4]]) for n in range(4)]
        for thread in threads:
            thread.start()
        assert await asyncio.gather(*requests) == [b"%d" % number for number in range(400)]
        for thread in threads:
            thread.join()


async def test_one_answer_to_a_message(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        b.subscribe(50, kept.append)
        await a.wait_subscribed(50, timeout=5)
        replies: list[bytes] = []
        a.subscribe(60, lambda ctx: replies.append(ctx.data))
        request = a.request(50, b"")
        found = endings(request)
        a.call(50, b"", 60)
        await until(lambda: len(kept) == 2)
        for ctx in kept:
            ctx.reply(b"first")
            for again in (lambda ctx=ctx: ctx.reply(b""), lambda ctx=ctx: ctx.error("")):
                with pytest.raises(AlreadyReplied) as raised:
                    again()
                assert (raised.value.channel, raised.value.peer) == (50, a.id)
        assert await request == b"first"
        await until(lambda: replies)
        assert found == ["answer"]
        assert replies == [b"first"]


async def test_an_error_is_an_answer_too(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        second: list[BaseException] = []

        def handler(ctx: Context) -> None:
            ctx.error("no")
            try:
                ctx.reply(b"yes")
            except AlreadyReplied as error:
                second.append(error)

        a.subscribe(50, handler)
        with pytest.raises(RemoteError):
            await a.request(50, b"")
        assert len(second) == 1


async def test_a_reply_that_was_refused_can_be_made_good(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", frame_limit=8192) as (a, b):

        def handler(ctx: Context) -> None:
            with pytest.raises(FrameError):
                ctx.reply(bytes(9000))
            with pytest.raises(TypeError):
                ctx.reply("text")
            assert not ctx.answered
            ctx.reply(b"smaller")

        b.subscribe(50, handler)
        await a.wait_subscribed(50, timeout=5)
        assert await a.request(50, b"") == b"smaller"


async def test_a_reply_to_what_asks_for_none(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        b.subscribe(50, kept.append)
        await a.wait_subscribed(50, timeout=5)
        a.notify(50, b"notify")
        a.publish(50, b"publish")
        await until(lambda: len(kept) == 2)
        for ctx in kept:
            with pytest.raises(DomiError):
                ctx.reply(b"")
            with pytest.raises(DomiError):
                ctx.error("no")
            assert not ctx.answered


async def test_a_reply_to_a_node_that_has_gone(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        b.subscribe(50, kept.append)
        await a.wait_subscribed(50, timeout=5)
        asker = a.id
        a.request(50, b"request", None)
        a.call(50, b"call", 60)
        await until(lambda: len(kept) == 2)
        await a.close()
        await b.wait_peers(0, 5)
        for ctx in kept:
            with pytest.raises(PeerLost) as raised:
                ctx.reply(b"")
            assert raised.value.peer == asker
            with pytest.raises(PeerLost):
                await asyncio.to_thread(ctx.reply, b"")


async def test_a_reply_after_the_own_node_has_closed(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        b.subscribe(50, kept.append)
        await a.wait_subscribed(50, timeout=5)
        request = a.request(50, b"request", None)
        a.call(50, b"call", 60)
        a.ventilator([50, 60], b"pipeline")
        await until(lambda: len(kept) == 3)
        await b.close()
        with pytest.raises(PeerLost):
            await request
        with pytest.raises(PeerLost):
            kept[0].reply(b"")
        with pytest.raises(DomiError):
            kept[1].reply(b"")
        with pytest.raises(DomiError):
            kept[2].next(b"")


async def test_a_context_is_the_handlers_own_after_what_happens_meanwhile(
    registry_url: str,
) -> None:
    """Also when its session is closed within the handler, which lets go of what is spare."""
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        message = bytes(range(200))

        def keep(ctx: Context) -> None:
            assert ctx.data == message
            kept.append(ctx)
            session(b, a.id).close("for the test")

        b.subscribe(50, keep)
        await a.wait_subscribed(50, timeout=5)
        a.notify(50, message)
        await until(lambda: kept)
        assert kept[0].data == message


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_the_next_message_after_what_ends_the_loop(kind: type[BaseException]) -> None:
    """It is shown as it is, and not as the one whose handler raised."""
    seen: list[bytes] = []

    def handler(ctx: Context) -> None:
        seen.append(ctx.data)
        if len(seen) == 1:
            raise kind

    async def start(node: Node) -> None:
        await node.start()
        node.subscribe(50, handler)
        node.notify(50, b"first")
        await asyncio.sleep(5)

    async def go_on(node: Node) -> None:
        node.notify(50, b"second")
        await until(lambda: len(seen) == 2)
        await node.close()

    loop = asyncio.new_event_loop()
    try:
        node = Node("a", registry="memory://what-ends-the-loop")
        with pytest.raises(kind):
            loop.run_until_complete(start(node))
        loop.run_until_complete(go_on(node))
    finally:
        loop.close()
    assert seen == [b"first", b"second"]
