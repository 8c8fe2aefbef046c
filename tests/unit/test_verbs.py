"""The verbs of a node, clause by clause: what arrives, in which order, and how each can fail."""

from __future__ import annotations

import array
import asyncio
import contextlib
import contextvars
import functools
import gc
import logging
import re
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from domi_fast import (
    AlreadyReplied,
    Context,
    DeadlineExceeded,
    DomiError,
    FrameError,
    LibraryChannel,
    Node,
    NodeConfig,
    NoSubscriber,
    Overloaded,
    PeerLost,
    RegistryError,
    RemoteError,
    Request,
)
from tests.support import RawPeer, forget_records, link, nodes, session, until

MIB = 1 << 20
WRONG_CHANNELS = [-1, 0, 49, 65500, 65501, 65535, 65536, 1 << 40, True]


def echo(ctx: Context) -> None:
    ctx.reply(ctx.data)


def endings(request: Any) -> list[str]:
    """How the request ends, once for each time that it ends."""
    found: list[str] = []

    def ended(done: Any) -> None:
        if done.cancelled():
            found.append("cancelled")
        elif done.exception() is not None:
            found.append(type(done.exception()).__name__)
        else:
            found.append("answer")

    request.add_done_callback(ended)
    return found


# ----------------------------------------------------------------------------------- subscriptions


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
        served = [channel for channel in LibraryChannel if channel is not LibraryChannel.NIL]
        for channel in served:
            with pytest.raises(ValueError, match="served by the core"):
                b.subscribe(channel, echo)


async def test_subscriptions_made_before_the_start(registry_url: str) -> None:
    late = Node("b", registry=registry_url)
    late.subscribe(50, echo)
    async with nodes(registry_url, "a") as (a,), late:
        # Listed as a peer means: its channels are known.
        await a.wait_peers(1, 5)
        assert a.subscribers(50) == [late.id]
        assert await a.request(50, b"x") == b"x"


# ------------------------------------------------------------------------------------------ notify


async def test_notify_reaches_one_subscriber(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c") as (a, b, c):
        got: list[tuple[int, Context]] = []
        b.subscribe(50, lambda ctx: got.append((b.id, ctx)))
        c.subscribe(50, lambda ctx: got.append((c.id, ctx)))
        await a.wait_subscribed(50, 2, 5)
        assert a.notify(50, b"hello") is None
        await until(lambda: got)
        # A second one goes to the other, so that both have certainly seen all there is.
        a.notify(50, b"again")
        await until(lambda: len(got) == 2)
        assert [ctx.data for _, ctx in got] == [b"hello", b"again"]
        assert {machine for machine, _ in got} == {b.id, c.id}
        ctx = got[0][1]
        assert (ctx.channel, ctx.sender, ctx.deadline, ctx.is_request) == (50, a.id, None, False)
        assert type(ctx.data) is bytes


async def test_without_a_subscriber_the_verbs_say_so(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, _):
        for verb in (
            lambda: a.notify(70, b""),
            lambda: a.call(70, b"", 71),
            lambda: a.request(70, b""),
            lambda: a.ventilator([70], b""),
        ):
            with pytest.raises(NoSubscriber) as refused:
                verb()
            assert refused.value.channel == 70
        assert a.counters()["in_flight"] == 0


# ----------------------------------------------------------------------------------------- publish


async def test_publish_reaches_every_subscriber_exactly_once(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c", "d") as (a, b, c, d):
        got: Counter[tuple[int, bytes]] = Counter()
        for node in (a, b, c):
            node.subscribe(50, lambda ctx, me=node.id: got.update([(me, ctx.data)]))
        d.subscribe(51, lambda ctx: got.update([(d.id, ctx.data)]))
        await a.wait_subscribed(50, 3, 5)
        for number in range(100):
            assert a.publish(50, b"%d" % number) == 3
        await until(lambda: got.total() == 300)
        for node in (b, c):
            # What came after the publishes shows that nothing more was under way.
            assert a.publish(50, b"last", to=node.id) == 1
        await until(lambda: got.total() == 302)
        assert got == Counter(
            [(n.id, b"%d" % i) for n in (a, b, c) for i in range(100)]
            + [(b.id, b"last"), (c.id, b"last")]
        )


async def test_publish_to_nobody_counts_nobody(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, _):
        assert a.publish(50, b"") == 0


async def test_publish_goes_on_when_one_subscriber_is_full(registry_url: str) -> None:
    errors: list[tuple[DomiError, Any]] = []
    async with nodes(registry_url, "a", "b", queue_limit=64 << 10) as (a, b):
        a.on_error = lambda error, frame: errors.append((error, frame))
        got: list[bytes] = []
        a.subscribe(50, lambda ctx: None)
        b.subscribe(50, lambda ctx: got.append(ctx.data))
        await a.wait_subscribed(50, 2, 5)
        # The node's own queue is emptied only when the loop turns.
        with contextlib.suppress(Overloaded):
            while True:
                a.notify(50, bytes(4096), to=a.id)
        assert a.publish(50, b"news") == 1
        await until(lambda: got)
        assert got == [b"news"]
        assert len(errors) == 1
        error, frame = errors[0]
        assert isinstance(error, Overloaded)
        assert (error.peer, error.channel) == (a.id, 50)
        assert (frame.channel, frame.data) == (50, b"news")


# -------------------------------------------------------------------------------------------- call


async def test_call_is_answered_on_the_reply_channel(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        replies: list[tuple[bytes, int]] = []
        for node in (a, b):
            node.subscribe(50, lambda ctx, me=node.id: ctx.reply(b"%d to " % me + ctx.data))
        a.subscribe(60, lambda ctx: replies.append((ctx.data, ctx.sender)))
        await a.wait_subscribed(50, 2, 5)
        for node in (a, b):
            assert a.call(50, b"x", 60, to=node.id) is None
        await until(lambda: len(replies) == 2)
        assert sorted(replies) == sorted((b"%d to x" % n.id, n.id) for n in (a, b))


async def test_a_call_may_be_answered_where_nobody_subscribes(registry_url: str) -> None:
    """The reply of a call whose asker has no handler is refused, and nobody is hurt."""
    async with nodes(registry_url, "a", "b") as (a, b):
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        a.call(50, b"x", 60)
        await until(lambda: a.counters().get("dropped_no_subscriber"))
        assert await a.request(50, b"y") == b"y"


# ---------------------------------------------------------------------------- request: its outcomes


async def test_outcome_answer(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        request = a.request(50, b"question")
        assert isinstance(request, Request)
        assert not request.done()
        found = endings(request)
        with pytest.raises(asyncio.InvalidStateError):
            request.result()
        with pytest.raises(asyncio.InvalidStateError):
            request.exception()
        assert await request == b"question"
        assert request.done()
        assert not request.cancelled()
        assert request.exception() is None
        assert request.result() == b"question"
        assert request.cancel() is False
        await until(lambda: found)
        assert found == ["answer"]
        assert a.counters()["in_flight"] == 0


async def test_outcome_remote_error(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):

        def fails(ctx: Context) -> None:
            raise ValueError("bad wörd")

        async def fails_later(ctx: Context) -> None:
            await asyncio.sleep(0)
            raise KeyError("nothing")

        b.subscribe(50, fails)
        b.subscribe(51, fails_later)
        b.subscribe(52, lambda ctx: ctx.error("not today"))
        await a.wait_subscribed(52, timeout=5)
        for channel, kind, message in (
            (50, "ValueError", "bad wörd"),
            (51, "KeyError", "'nothing'"),
            (52, "Error", "not today"),
        ):
            request = a.request(channel, b"x")
            found = endings(request)
            with pytest.raises(RemoteError) as raised:
                await request
            assert (raised.value.type, raised.value.message) == (kind, message)
            assert (raised.value.channel, raised.value.peer) == (channel, b.id)
            assert "Traceback" not in str(raised.value)
            assert __file__ not in str(raised.value)
            await until(lambda found=found: found)
            assert found == ["RemoteError"]


async def test_an_error_with_a_text_of_any_kind(registry_url: str) -> None:
    """A text that is long, empty or not encodable still ends the request."""
    texts = ["", "x" * 200_000, "half a pair \ud800", "with \0 in it"]
    async with nodes(registry_url, "a", "b") as (a, b):

        def fails(ctx: Context) -> None:
            raise RuntimeError(texts[int(ctx.data)])

        b.subscribe(50, fails)
        b.subscribe(51, lambda ctx: ctx.error(texts[int(ctx.data)]))
        await a.wait_subscribed(51, timeout=5)
        for number in range(len(texts)):
            for channel in (50, 51):
                with pytest.raises(RemoteError):
                    await a.request(channel, b"%d" % number, 2)


async def test_outcome_deadline(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        b.subscribe(50, kept.append)
        await a.wait_subscribed(50, timeout=5)
        begun = time.monotonic()
        request = a.request(50, b"", timeout=0.05)
        found = endings(request)
        with pytest.raises(DeadlineExceeded) as raised:
            await request
        assert 0.05 <= time.monotonic() - begun < 0.5
        assert isinstance(raised.value, TimeoutError)
        assert (raised.value.channel, raised.value.peer) == (50, b.id)
        assert raised.value.limit == 0.05
        # The answer that comes too late changes nothing any more.
        kept[0].reply(b"late")
        await until(lambda: a.counters().get("late_answers") == 1)
        assert found == ["DeadlineExceeded"]
        assert isinstance(request.exception(), DeadlineExceeded)


@pytest.mark.parametrize("timeout", [0, 0.0, -1, -0.001, float("-inf")])
async def test_a_deadline_that_has_passed(registry_url: str, timeout: float) -> None:
    async with nodes(registry_url, "a") as (a,):
        got: list[Context] = []
        a.subscribe(50, got.append)
        with pytest.raises(DeadlineExceeded) as raised:
            a.request(50, b"", timeout)
        assert raised.value.limit == timeout
        assert a.counters()["in_flight"] == 0
        a.subscribe(51, echo)
        await a.request(51, b"")
        assert not got


async def test_a_deadline_that_is_no_number(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(50, echo)
        with pytest.raises(ValueError, match="timeout"):
            a.request(50, b"", float("nan"))
        with pytest.raises(TypeError):
            a.request(50, b"", "soon")
        assert a.counters()["in_flight"] == 0


@pytest.mark.parametrize("timeout", [None, float("inf"), 1e300])
async def test_without_a_deadline(registry_url: str, timeout: float | None) -> None:
    async with nodes(registry_url, "a", "b", request_timeout=0.05) as (a, b):
        kept: list[Context] = []
        b.subscribe(50, kept.append)
        await a.wait_subscribed(50, timeout=5)
        request = a.request(50, b"", timeout)
        await until(lambda: kept)
        with pytest.raises(DeadlineExceeded):
            await a.request(50, b"")
        assert not request.done()
        if timeout is None:
            assert kept[0].deadline is None
        kept[0].reply(b"at last")
        assert await request == b"at last"


async def test_outcome_peer_lost(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        b.subscribe(50, kept.append)
        await a.wait_subscribed(50, timeout=5)
        requests = [a.request(50, b"", None) for _ in range(3)]
        found = [endings(request) for request in requests]
        await until(lambda: len(kept) == 3)
        session(b, a.id).close("for the test")
        for request in requests:
            with pytest.raises(PeerLost) as raised:
                await asyncio.wait_for(request, 1)
            assert (raised.value.peer, raised.value.channel) == (b.id, 50)
        await until(lambda: all(found))
        assert found == [["PeerLost"]] * 3
        assert a.counters()["in_flight"] == 0


async def test_outcome_overloaded_by_the_handler(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):

        def full(ctx: Context) -> None:
            raise Overloaded("the database has too much to do")

        async def full_later(ctx: Context) -> None:
            await asyncio.sleep(0)
            raise Overloaded("still too much")

        b.subscribe(50, full)
        b.subscribe(51, full_later)
        await a.wait_subscribed(51, timeout=5)
        for channel, text in ((50, "the database has too much"), (51, "still too much")):
            request = a.request(channel, b"")
            found = endings(request)
            with pytest.raises(Overloaded, match=text) as raised:
                await request
            assert (raised.value.channel, raised.value.peer) == (channel, b.id)
            await until(lambda found=found: found)
            assert found == ["Overloaded"]


async def test_outcome_overloaded_by_the_queue(registry_url: str) -> None:
    async with nodes(registry_url, "a", queue_limit=64 << 10) as (a,):
        a.subscribe(50, echo)
        sent: list[Request] = []

        def fill() -> None:
            while True:
                sent.append(a.request(50, bytes(1024), None))

        with pytest.raises(Overloaded) as raised:
            fill()
        assert (raised.value.channel, raised.value.peer) == (50, a.id)
        assert raised.value.limit == 64 << 10
        assert a.counters()["in_flight"] == len(sent)
        # The answers queue up behind the requests, and some of them find no room: the asker
        # hears of that too.
        done, pending = await asyncio.wait(sent, timeout=2)
        assert not pending, f"{len(pending)} of {len(sent)} requests never end"
        assert {type(request.exception()) for request in done} <= {type(None), Overloaded}
        assert a.counters()["in_flight"] == 0


async def test_outcome_no_subscriber_when_it_went_meanwhile(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        b.unsubscribe(50)
        request = a.request(50, b"under way", None)
        found = endings(request)
        with pytest.raises(NoSubscriber) as raised:
            await asyncio.wait_for(request, 2)
        assert (raised.value.channel, raised.value.peer) == (50, b.id)
        await until(lambda: found)
        assert found == ["NoSubscriber"]


async def test_outcome_cancelled(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        b.subscribe(50, kept.append)
        await a.wait_subscribed(50, timeout=5)
        request = a.request(50, b"", None)
        found = endings(request)
        assert request.cancel("changed my mind") is True
        assert request.cancelled()
        assert request.cancel() is False
        with pytest.raises(asyncio.CancelledError, match="changed my mind"):
            await request
        with pytest.raises(asyncio.CancelledError):
            request.exception()
        assert a.counters()["in_flight"] == 0
        await until(lambda: kept)
        kept[0].reply(b"late")
        await until(lambda: a.counters().get("late_answers") == 1)
        assert found == ["cancelled"]


async def test_a_cancelled_task_cancels_its_request(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        kept: list[Context] = []
        a.subscribe(50, kept.append)

        async def ask() -> bytes:
            return await a.request(50, b"", None)

        task = asyncio.ensure_future(ask())
        await until(lambda: kept)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert a.counters()["in_flight"] == 0


async def test_a_task_cancelled_in_the_turn_of_its_answer(registry_url: str) -> None:
    """Cancelling a task whose answer has just come must not lose the cancellation."""
    async with nodes(registry_url, "a") as (a,):
        steps: list[str] = []

        async def ask() -> None:
            try:
                await a.request(50, b"", None)
                steps.append("answered")
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                steps.append("cancelled")
                raise

        task: asyncio.Task[None] | None = None

        def answer_and_cancel(ctx: Context) -> None:
            ctx.reply(b"")
            assert task is not None
            task.cancel()

        a.subscribe(50, answer_and_cancel)
        task = asyncio.ensure_future(ask())
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 2)
        assert steps[-1] == "cancelled"


async def test_a_request_that_was_refused_holds_nothing(registry_url: str) -> None:
    async with nodes(registry_url, "a", frame_limit=8192) as (a,):
        a.subscribe(50, echo)
        for data, kind in ((bytes(8192), FrameError), ("text", TypeError), (None, TypeError)):
            with pytest.raises(kind):
                a.request(50, data)
        assert a.counters()["in_flight"] == 0
        assert await a.request(50, b"x") == b"x"


async def test_many_requests_each_get_their_own_answer(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        waiting: list[Context] = []

        def shuffled(ctx: Context) -> None:
            waiting.append(ctx)
            if len(waiting) == 100:
                for one in waiting[::2] + waiting[1::2][::-1]:
                    one.reply(one.data)
                waiting.clear()

        b.subscribe(50, shuffled)
        await a.wait_subscribed(50, timeout=5)
        for _ in range(20):
            payloads = [b"%d" % number for number in range(100)]
            assert await asyncio.gather(*(a.request(50, p) for p in payloads)) == payloads
        assert a.counters()["in_flight"] == 0


# ---------------------------------------------------------------- request: asyncio's way of waiting


async def test_gather_shield_wait_for_and_wait(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        b.subscribe(50, echo)
        b.subscribe(51, kept.append)
        b.subscribe(52, lambda ctx: ctx.error("no"))
        await a.wait_subscribed(52, timeout=5)

        assert await asyncio.gather(a.request(50, b"1"), a.request(50, b"2")) == [b"1", b"2"]
        mixed = await asyncio.gather(
            a.request(50, b"1"), a.request(52, b""), return_exceptions=True
        )
        assert mixed[0] == b"1"
        assert isinstance(mixed[1], RemoteError)
        with pytest.raises(RemoteError):
            await asyncio.gather(a.request(50, b"1"), a.request(52, b""))

        assert await asyncio.wait_for(a.request(50, b"3"), 5) == b"3"
        slow = a.request(51, b"", None)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(slow, 0.02)
        assert slow.cancelled()

        kept.clear()
        inner = a.request(51, b"", None)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(inner), 0.02)
        assert not inner.done()
        kept[0].reply(b"still here")
        assert await inner == b"still here"

        kept.clear()
        quick, never = a.request(50, b"4"), a.request(51, b"", None)
        done, pending = await asyncio.wait(
            {quick, never}, return_when=asyncio.FIRST_COMPLETED, timeout=5
        )
        assert done == {quick}
        assert pending == {never}
        assert quick.result() == b"4"
        never.cancel()

        order = [await next_one for next_one in asyncio.as_completed([a.request(50, b"5")])]
        assert order == [b"5"]


async def test_gather_with_a_cancelled_request(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(50, echo)
        a.subscribe(51, [].append)
        one, other = a.request(50, b""), a.request(51, b"", None)
        both = asyncio.gather(one, other)
        other.cancel("the other one")
        assert (await asyncio.wait({both}, timeout=2))[0] == {both}
        with pytest.raises(asyncio.CancelledError):
            await both
        one, other = a.request(50, b"x"), a.request(51, b"", None)
        with_errors = asyncio.gather(one, other, return_exceptions=True)
        other.cancel()
        assert (await asyncio.wait({with_errors}, timeout=2))[0] == {with_errors}
        answer, cancelled = await with_errors
        assert answer == b"x"
        assert isinstance(cancelled, asyncio.CancelledError)


async def test_cancelling_a_gather_cancels_its_requests(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(50, [].append)
        requests = [a.request(50, b"", None) for _ in range(3)]
        both = asyncio.gather(*requests)
        await asyncio.sleep(0)
        both.cancel()
        with pytest.raises(asyncio.CancelledError):
            await both
        assert all(request.cancelled() for request in requests)
        assert a.counters()["in_flight"] == 0


async def test_awaiting_twice(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        kept: list[Context] = []
        a.subscribe(50, kept.append)
        a.subscribe(51, lambda ctx: ctx.error("no"))
        request = a.request(50, b"")

        async def wait() -> bytes:
            return await request

        tasks = [asyncio.ensure_future(wait()) for _ in range(3)]
        await until(lambda: kept)
        kept[0].reply(b"for all")
        assert await asyncio.gather(*tasks) == [b"for all"] * 3
        assert await request == b"for all"
        assert await request == b"for all"
        failing = a.request(51, b"")
        for _ in range(2):
            with pytest.raises(RemoteError):
                await failing


async def test_done_callbacks(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        kept: list[Context] = []
        a.subscribe(50, kept.append)
        request = a.request(50, b"")
        ran: list[tuple[str, Any]] = []
        callbacks: dict[str, Callable[[Any], None]] = {
            name: (lambda done, name=name: ran.append((name, done))) for name in "xyz"
        }
        for name in "xyzyx":
            request.add_done_callback(callbacks[name])
        assert request.remove_done_callback(callbacks["y"]) == 2
        assert request.remove_done_callback(callbacks["y"]) == 0
        await until(lambda: kept)
        assert not ran
        kept[0].reply(b"")
        await request
        await until(lambda: len(ran) == 3)
        assert sorted(ran, key=lambda entry: entry[0]) == [
            ("x", request),
            ("x", request),
            ("z", request),
        ]
        # To one that has ended: never within the call.
        request.add_done_callback(callbacks["y"])
        assert len(ran) == 3
        await until(lambda: len(ran) == 4)
        assert ran[3] == ("y", request)


async def test_done_callbacks_run_in_the_order_they_were_added(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(50, echo)
        request = a.request(50, b"")
        order: list[int] = []
        for number in range(5):
            request.add_done_callback(lambda _, number=number: order.append(number))
        await until(lambda: len(order) == 5)
        assert order == list(range(5))


async def test_a_done_callback_that_raises_hurts_nobody(registry_url: str) -> None:
    loop = asyncio.get_running_loop()
    problems: list[dict[str, Any]] = []
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(50, echo)
        previous = loop.get_exception_handler()
        loop.set_exception_handler(lambda _, context: problems.append(context))
        try:
            request = a.request(50, b"")
            request.add_done_callback(lambda _: 1 / 0)
            assert await request == b""
            await until(lambda: problems)
        finally:
            loop.set_exception_handler(previous)
        assert isinstance(problems[0]["exception"], ZeroDivisionError)
        assert await a.request(50, b"still") == b"still"


async def test_context_variables_are_kept(registry_url: str) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(50, echo)
        seen: dict[str, str] = {}

        async def ask(name: str) -> None:
            variable.set(name)
            request = a.request(50, b"")
            request.add_done_callback(lambda _: seen.update({f"{name} callback": variable.get()}))
            await request
            seen[name] = variable.get()

        await asyncio.gather(ask("one"), ask("two"))
        own = contextvars.Context()
        own.run(variable.set, "own")
        request = a.request(50, b"")
        request.add_done_callback(lambda _: seen.update(own=variable.get()), context=own)
        await request
        await until(lambda: len(seen) == 5)
        assert seen == {
            "one": "one",
            "one callback": "one",
            "two": "two",
            "two callback": "two",
            "own": "own",
        }
        assert variable.get() == "unset"


# --------------------------------------------------------------------------------------- pipelines


async def test_a_pipeline_across_nodes(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c") as (a, b, c):
        results: list[tuple[bytes, int]] = []
        b.subscribe(60, lambda ctx: ctx.next(ctx.data + b" b"))
        c.subscribe(61, lambda ctx: ctx.next(ctx.data + b" c"))

        async def later(ctx: Context) -> None:
            await asyncio.sleep(0)
            ctx.next(ctx.data + b" a")

        a.subscribe(62, later)
        c.subscribe(63, lambda ctx: results.append((ctx.data, ctx.sender)))
        for node in (a, b, c):
            for channel in range(60, 64):
                await node.wait_subscribed(channel, timeout=5)
        assert a.ventilator([60, 61, 62, 63], b"start") is None
        await until(lambda: results)
        assert results == [(b"start b c a", a.id)]
        b.ventilator((63,), b"one stage")
        await until(lambda: len(results) == 2)
        assert results[1] == (b"one stage", b.id)


async def test_a_pipeline_may_visit_a_stage_again(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        result: list[bytes] = []
        b.subscribe(60, lambda ctx: ctx.next(b"%d" % (int(ctx.data) + 1)))
        a.subscribe(61, lambda ctx: result.append(ctx.data))
        await a.wait_subscribed(60, timeout=5)
        await b.wait_subscribed(61, timeout=5)
        a.ventilator([60] * 500 + [61], b"0")
        await until(lambda: result)
        assert result == [b"500"]


async def test_what_is_not_a_pipeline(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(60, echo)
        with pytest.raises(ValueError, match="at least one"):
            a.ventilator([], b"")
        with pytest.raises(ValueError, match="16384"):
            a.ventilator([60] * 16385, b"")
        with pytest.raises(TypeError):
            a.ventilator(60, b"")


async def test_next_without_a_subscriber_tells_the_stage(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        told: list[NoSubscriber] = []

        def stage(ctx: Context) -> None:
            try:
                ctx.next(ctx.data)
            except NoSubscriber as error:
                told.append(error)

        b.subscribe(60, stage)
        await a.wait_subscribed(60, timeout=5)
        a.ventilator([60, 61], b"x")
        await until(lambda: told)
        assert told[0].channel == 61


async def test_a_stage_that_went_meanwhile_is_told_to_who_called_next(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c") as (a, b, c):
        told: dict[str, list[tuple[DomiError, Any]]] = {"a": [], "b": []}
        a.on_error = lambda error, frame: told["a"].append((error, frame))
        b.on_error = lambda error, frame: told["b"].append((error, frame))

        def stage(ctx: Context) -> None:
            c.unsubscribe(61)
            ctx.next(ctx.data)

        b.subscribe(60, stage)
        c.subscribe(61, echo)
        await a.wait_subscribed(60, timeout=5)
        await b.wait_subscribed(61, timeout=5)
        a.ventilator([60, 61, 62], b"x")
        await until(lambda: told["b"])
        error, frame = told["b"][0]
        assert isinstance(error, NoSubscriber)
        assert (error.channel, error.peer) == (61, c.id)
        assert (frame.channel, frame.data) == (61, b"x")
        assert not told["a"]


async def test_next_where_there_is_none(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        b.subscribe(60, kept.append)
        await a.wait_subscribed(60, timeout=5)
        a.ventilator([60], b"last stage")
        a.notify(60, b"notify")
        a.request(60, b"request").cancel()
        await until(lambda: len(kept) == 3)
        with pytest.raises(DomiError, match="last stage"):
            kept[0].next(b"")
        with pytest.raises(DomiError):
            kept[1].next(b"")
        with pytest.raises(FrameError):
            kept[2].next(b"")


async def test_next_twice(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        kept: list[Context] = []
        result: list[bytes] = []
        a.subscribe(60, kept.append)
        a.subscribe(61, lambda ctx: result.append(ctx.data))
        a.ventilator([60, 61], b"")
        await until(lambda: kept)
        kept[0].next(b"once")
        with pytest.raises(AlreadyReplied):
            kept[0].next(b"twice")
        await until(lambda: result)
        assert result == [b"once"]


async def test_a_pipeline_cannot_be_replied_to(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        kept: list[Context] = []
        a.subscribe(60, kept.append)
        a.ventilator([60, 61], b"")
        await until(lambda: kept)
        with pytest.raises(DomiError):
            kept[0].reply(b"")
        with pytest.raises(DomiError):
            kept[0].error("no")


# -------------------------------------------------------------------------------------- addressing


async def test_to_names_the_receiver(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c") as (a, b, c):
        got: list[tuple[int, bytes]] = []
        for node in (a, b, c):
            node.subscribe(50, lambda ctx, me=node.id: got.append((me, ctx.data)))
            node.subscribe(51, lambda ctx, me=node.id: ctx.reply(b"%d" % me))
        a.subscribe(52, lambda ctx: got.append((-1, ctx.data)))
        await a.wait_subscribed(51, 3, 5)
        for node in (c, a, b, b):
            a.notify(50, b"notify", to=node.id)
            a.publish(50, b"publish", to=node.id)
            a.call(51, b"", 52, to=node.id)
            assert await a.request(51, b"", to=node.id) == b"%d" % node.id
        await until(lambda: len(got) == 12)
        assert Counter(got) == Counter(
            entry
            for node in (c, a, b, b)
            for entry in (
                (node.id, b"notify"),
                (node.id, b"publish"),
                (-1, b"%d" % node.id),
            )
        )


@pytest.mark.parametrize("machine", [1000, 1023, 1024, 65535, -1, 2**31 - 1])
async def test_to_a_node_that_is_not_there(registry_url: str, machine: int) -> None:
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(50, echo)
        for verb in (
            lambda: a.notify(50, b"", to=machine),
            lambda: a.publish(50, b"", to=machine),
            lambda: a.call(50, b"", 60, to=machine),
            lambda: a.request(50, b"", to=machine),
            lambda: a.drained(machine),
        ):
            with pytest.raises(PeerLost) as raised:
                verb()
            assert raised.value.peer == machine


async def test_to_a_node_that_does_not_subscribe(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        a.subscribe(50, echo)
        b.subscribe(51, echo)
        await a.wait_subscribed(51, timeout=5)
        for node, channel in ((b, 50), (a, 51)):
            for verb in (
                lambda node=node, channel=channel: a.notify(channel, b"", to=node.id),
                lambda node=node, channel=channel: a.publish(channel, b"", to=node.id),
                lambda node=node, channel=channel: a.call(channel, b"", 60, to=node.id),
                lambda node=node, channel=channel: a.request(channel, b"", to=node.id),
            ):
                with pytest.raises(NoSubscriber) as raised:
                    verb()
                assert (raised.value.channel, raised.value.peer) == (channel, node.id)


async def test_round_robin_includes_the_nodes_own_subscription(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c") as (a, b, c):
        got: list[int] = []
        for node in (a, b, c):
            node.subscribe(50, lambda ctx, me=node.id: ctx.reply(b"%d" % me))
            node.subscribe(51, lambda ctx, me=node.id: got.append(me))
        await a.wait_subscribed(50, 3, 5)
        await a.wait_subscribed(51, 3, 5)
        answers = [int(await a.request(50, b"")) for _ in range(9)]
        assert set(answers[:3]) == {a.id, b.id, c.id}
        assert answers == answers[:3] * 3
        for _ in range(9):
            a.notify(51, b"")
        await until(lambda: len(got) == 9)
        assert Counter(got) == {a.id: 3, b.id: 3, c.id: 3}
        # One leaves: the rest still take turns.
        b.unsubscribe(50)
        await until(lambda: len(a.subscribers(50)) == 2)
        answers = [int(await a.request(50, b"")) for _ in range(6)]
        assert answers == answers[:2] * 3
        assert set(answers) == {a.id, c.id}


# ---------------------------------------------------------------------------------------- on_error


async def test_on_error_hears_what_was_refused_later(registry_url: str) -> None:
    told: list[tuple[DomiError, Any]] = []
    async with nodes(registry_url, "a", "b") as (a, b):
        a.on_error = lambda error, frame: told.append((error, frame))
        assert callable(a.on_error)
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        b.unsubscribe(50)
        a.notify(50, b"a notify")
        a.call(50, b"a call", 60)
        a.ventilator([50, 51], b"a pipeline")
        await until(lambda: len(told) == 3)
        assert [frame.data for _, frame in told] == [b"a notify", b"a call", b"a pipeline"]
        for error, frame in told:
            assert isinstance(error, NoSubscriber)
            assert (error.channel, error.peer, frame.channel) == (50, b.id, 50)


async def test_a_refused_publish_is_nobodys_in_particular(registry_url: str) -> None:
    told: list[Any] = []
    async with nodes(registry_url, "a", "b") as (a, b):
        a.on_error = lambda error, frame: told.append(frame)
        b.subscribe(50, echo)
        b.subscribe(51, echo)
        await a.wait_subscribed(51, timeout=5)
        b.unsubscribe(50)
        assert a.publish(50, b"") == 1
        assert await a.request(51, b"after") == b"after"
        assert not told
        assert b.counters()["dropped_no_subscriber"] == 1


async def test_on_error_hears_of_frames_that_a_lost_peer_never_got(registry_url: str) -> None:
    told: list[tuple[DomiError, Any]] = []
    async with nodes(registry_url, "a") as (a,):
        a.on_error = lambda error, frame: told.append((error, frame))
        raw = await RawPeer.plain(a, 700, receive_buffer=4096)
        sent = 0
        while a.peers[700].queued < MIB:
            a.notify(50, sent.to_bytes(4, "big") + bytes(65532), to=700)
            sent += 1
            await asyncio.sleep(0)
        raw.reset()
        await a.wait_peers(0, 5)
        assert told
        numbers = [int.from_bytes(frame.data[:4], "big") for _, frame in told]
        # The newest ones, all of them, in order; each with what is needed to send it again.
        assert numbers == list(range(sent - len(told), sent))
        for error, frame in told:
            assert isinstance(error, PeerLost)
            assert (error.peer, error.channel, frame.channel) == (700, 50, 50)
            assert len(frame.data) == 65536


async def test_requests_that_a_lost_peer_never_got_are_told_once(registry_url: str) -> None:
    """Their awaiter hears of it; on_error does not hear it as well."""
    told: list[Any] = []
    async with nodes(registry_url, "a", "b") as (a, b):
        a.on_error = lambda error, frame: told.append(frame)
        b.subscribe(50, [].append)
        await a.wait_subscribed(50, timeout=5)
        requests = [a.request(50, bytes(MIB), None) for _ in range(12)]
        session(a, b.id).close("for the test")
        outcomes = await asyncio.gather(*requests, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {PeerLost}
        assert not told


async def test_on_error_that_raises_is_logged(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):

        def broken(error: DomiError, frame: Any) -> None:
            raise RuntimeError("broken")

        a.on_error = broken
        b.subscribe(50, echo)
        b.subscribe(51, echo)
        await a.wait_subscribed(51, timeout=5)
        b.unsubscribe(50)
        a.notify(50, b"")
        assert await a.request(51, b"x") == b"x"
        assert "on_error failed" in caplog.text
        a.on_error = None
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        b.unsubscribe(50)
        a.notify(50, b"seven b")
        assert await a.request(51, b"x") == b"x"
        assert re.search(r"lost: .*channel 50.*7 bytes", caplog.text)


def test_on_error_is_callable_or_none(registry_url: str) -> None:
    with pytest.raises(TypeError, match="callable"):
        Node("a", registry=registry_url, on_error=5)
    node = Node("a", registry=registry_url, on_error=print)
    assert node.on_error is print
    with pytest.raises(TypeError, match="callable"):
        node.on_error = "loud"
    node.on_error = None
    assert node.on_error is None


# ----------------------------------------------------------------------------------------- context


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


# ----------------------------------------------------------------------------------------- handlers


class Custom(BaseException):
    """Not an Exception."""


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


# ----------------------------------------------------------------------------------- watch_channel


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


async def anext_of(messages: Any) -> Context:
    return await asyncio.wait_for(messages.__anext__(), 5)


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


# ------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("receiver", ["other", "itself"])
async def test_order(registry_url: str, receiver: str) -> None:
    """notify, publish, call and request on one channel arrive in the order they were sent in."""
    async with nodes(registry_url, "a", "b") as (a, b):
        to = a if receiver == "itself" else b
        got: list[int] = []
        to.subscribe(50, lambda ctx: got.append(int.from_bytes(ctx.data[:4], "big")))
        a.subscribe(60, lambda ctx: None)
        await a.wait_subscribed(50, timeout=5)
        sizes = (4, 100, 8191, 8192, 20_000, 70_000, 300_000)
        total = 1500
        for number in range(total):
            data = number.to_bytes(4, "big").ljust(sizes[number * 7919 % 97 % len(sizes)], b".")
            kind = number * 31 % 4
            while True:
                try:
                    if kind == 0:
                        a.notify(50, data)
                    elif kind == 1:
                        if not a.publish(50, data):
                            raise Overloaded
                    elif kind == 2:
                        a.call(50, data, 60)
                    else:
                        a.request(50, data).add_done_callback(lambda r: r.exception())
                    break
                except Overloaded:
                    await a.drained(to.id)
            if number % 100 == 0:
                await asyncio.sleep(0)
        await until(lambda: len(got) == total, 20)
        assert got == list(range(total))


async def test_order_of_the_answers_to_calls(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        got: list[int] = []
        b.subscribe(50, echo)
        a.subscribe(60, lambda ctx: got.append(int(ctx.data)))
        await a.wait_subscribed(50, timeout=5)
        for number in range(2000):
            a.call(50, b"%d" % number, 60)
        await until(lambda: len(got) == 2000)
        assert got == list(range(2000))


async def test_a_message_to_oneself_is_not_handled_within_the_verb(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        got: list[bytes] = []
        a.subscribe(50, lambda ctx: got.append(ctx.data))
        a.notify(50, b"x")
        assert not got
        await until(lambda: got)


# ---------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize("size", [0, 1, 7, 8, 4096, 65_527, 65_536, 65_537, MIB, 15 * MIB])
async def test_data_of_any_size(registry_url: str, size: int) -> None:
    data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    async with nodes(registry_url, "a", "b") as (a, b):
        for node in (a, b):
            node.subscribe(50, echo)
        await a.wait_subscribed(50, 2, 5)
        for node in (a, b):
            assert await a.request(50, data, 20, to=node.id) == data


@pytest.mark.parametrize("size", [5, 9000, 100_000])
@pytest.mark.parametrize(
    "kind",
    [bytes, bytearray, memoryview, lambda data: memoryview(bytearray(data)), "array", "subclass"],
)
async def test_data_of_any_kind(registry_url: str, kind: Any, size: int) -> None:
    class Bytes(bytes):
        pass

    plain = bytes(range(256)) * (size // 256 + 1)
    plain = plain[:size]
    if kind == "array":
        data: Any = array.array("B", plain)
    elif kind == "subclass":
        data = Bytes(plain)
    else:
        data = kind(plain)
    async with nodes(registry_url, "a", "b") as (a, b):
        got: list[bytes] = []
        for node in (a, b):
            node.subscribe(50, lambda ctx: got.append(ctx.data))
            node.subscribe(51, lambda ctx: ctx.reply(data))
        await a.wait_subscribed(51, 2, 5)
        for node in (a, b):
            a.notify(50, data, to=node.id)
            a.publish(50, data, to=node.id)
            a.call(51, data, 50, to=node.id)
            answer = await a.request(51, data, to=node.id)
            assert answer == plain
            assert type(answer) is bytes
        assert a.publish(50, data) == 2
        await until(lambda: len(got) == 8)
        assert got == [plain] * 8
        assert {type(one) for one in got} == {bytes}


async def test_what_is_sent_does_not_change_any_more(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        got: list[bytes] = []
        for node in (a, b):
            node.subscribe(50, lambda ctx: got.append(ctx.data))
        await a.wait_subscribed(50, 2, 5)
        data = bytearray(b"x" * 300_000)
        for node in (a, b):
            a.notify(50, data, to=node.id)
        a.publish(50, data)
        data[:] = b"y" * 300_000
        data.clear()  # and no buffer is held any longer
        await until(lambda: len(got) == 4)
        assert set(got) == {b"x" * 300_000}


@pytest.mark.parametrize("data", ["text", None, 5, [b"x"], 1.5])
async def test_data_that_is_no_bytes(registry_url: str, data: Any) -> None:
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(50, echo)
        a.subscribe(51, echo)
        for verb in (
            lambda: a.notify(50, data),
            lambda: a.publish(50, data),
            lambda: a.publish(50, data, to=a.id),
            lambda: a.call(50, data, 51),
            lambda: a.request(50, data),
            lambda: a.ventilator([50], data),
        ):
            with pytest.raises(TypeError):
                verb()
        assert await a.request(51, b"fine") == b"fine"


async def test_a_memoryview_with_gaps_is_refused(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(50, echo)
        with pytest.raises(BufferError):
            a.notify(50, memoryview(bytes(100))[::2])


async def test_the_frame_limit(registry_url: str) -> None:
    limit = 100_000
    async with nodes(registry_url, "a", "b", frame_limit=limit) as (a, b):
        got: list[bytes] = []
        for node in (a, b):
            node.subscribe(50, lambda ctx: got.append(ctx.data))
        await a.wait_subscribed(50, 2, 5)
        ends = link(a, b)
        for node in (a, b):
            a.notify(50, bytes(limit - 8), to=node.id)
            for verb in (
                lambda node=node: a.notify(50, bytes(limit - 7), to=node.id),
                lambda node=node: a.publish(50, bytes(limit - 8), to=node.id),
                lambda node=node: a.call(50, bytes(limit - 8), 60, to=node.id),
                lambda node=node: a.request(50, bytes(limit - 8), to=node.id),
                lambda: a.publish(50, bytes(limit)),
            ):
                with pytest.raises(FrameError) as raised:
                    verb()
                assert (raised.value.limit, raised.value.channel) == (limit, 50)
        await until(lambda: len(got) == 2)
        a.notify(50, b"last", to=b.id)
        await until(lambda: len(got) == 3)
        assert link(a, b) == ends


async def test_a_frame_over_the_receivers_limit_ends_the_session_alone(registry_url: str) -> None:
    generous = Node("a", registry=registry_url)
    strict = Node("b", registry=registry_url, frame_limit=10_000)
    async with generous as a, strict as b:
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        with pytest.raises(PeerLost):
            await a.request(50, bytes(20_000))
        assert b.counters()["protocol_errors"] == 1
        await a.wait_subscribed(50, timeout=5)
        assert await a.request(50, b"again") == b"again"


async def test_many_subscriptions_fit_a_small_frame_limit(registry_url: str) -> None:
    """The library's own frames must not break the limit that a peer has set."""
    many = Node("a", registry=registry_url, frame_limit=4096, start_timeout=1)
    for channel in range(50, 4050):
        many.subscribe(channel, echo)
    async with many as a, Node("b", registry=registry_url, frame_limit=4096) as b:
        await b.wait_peers(1, 3)
        assert b.subscribers(4049) == [a.id]
        assert await b.request(4049, b"x") == b"x"


async def test_the_queue_limit_and_drained(registry_url: str) -> None:
    limit = 256 << 10
    async with nodes(registry_url, "a", queue_limit=limit) as (a,):
        raw = await RawPeer.plain(a, 700)
        try:
            assert a.drained(700).done()
            sent = 0

            async def fill() -> None:
                nonlocal sent
                while True:
                    a.notify(50, sent.to_bytes(4, "big") + bytes(9996), to=700)
                    sent += 1
                    await asyncio.sleep(0)

            with pytest.raises(Overloaded) as raised:
                await fill()
            assert (raised.value.peer, raised.value.channel) == (700, 50)
            assert raised.value.limit == limit
            assert limit <= a.peers[700].queued < limit + 10_008
            room = a.drained(700)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(room), 0.05)
            got = [(await raw.frame_on(50)).data[:4] for _ in range(sent)]
            assert got == [number.to_bytes(4, "big") for number in range(sent)]
            await asyncio.wait_for(room, 5)
            assert a.peers[700].queued <= limit // 4
            a.notify(50, b"again", to=700)
            assert (await raw.frame_on(50)).data == b"again"
            assert a.counters()["refused_queue_full"] == 1
        finally:
            raw.close()


async def test_drained_when_the_peer_goes(registry_url: str) -> None:
    async with nodes(registry_url, "a", queue_limit=64 << 10) as (a,):
        raw = await RawPeer.plain(a, 700, receive_buffer=4096)
        with contextlib.suppress(Overloaded):
            while True:
                a.notify(50, bytes(60_000), to=700)
                await asyncio.sleep(0)
        room = a.drained(700)
        raw.reset()
        with pytest.raises(PeerLost) as raised:
            await asyncio.wait_for(room, 5)
        assert raised.value.peer == 700
        with pytest.raises(PeerLost):
            await a.drained(700)


async def test_drained_for_oneself(registry_url: str) -> None:
    async with nodes(registry_url, "a", queue_limit=64 << 10) as (a,):
        got: list[int] = []
        a.subscribe(50, lambda ctx: got.append(1))
        sent = 0

        def fill() -> None:
            nonlocal sent
            while True:
                a.notify(50, bytes(1000))
                sent += 1

        for _ in range(5):
            with pytest.raises(Overloaded):
                fill()
            await asyncio.wait_for(a.drained(a.id), 5)
        await until(lambda: len(got) == sent)


async def test_close_gives_up_on_a_peer_that_does_not_read(registry_url: str) -> None:
    """And nobody hears of a future that no one has waited for."""
    async with nodes(registry_url, "a", drain_timeout=0.1) as (a,):
        raw = await RawPeer.plain(a, 700, receive_buffer=4096)
        try:
            while a.peers[700].queued < MIB:
                a.notify(50, bytes(60_000), to=700)
                await asyncio.sleep(0)
            begun = time.monotonic()
            await a.close()
            assert 0.05 < time.monotonic() - begun < 2
            gc.collect()
            await asyncio.sleep(0)
        finally:
            raw.close()


async def test_close_sends_what_is_queued(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        got: list[int] = []
        b.subscribe(50, lambda ctx: got.append(len(ctx.data)))
        await a.wait_subscribed(50, timeout=5)
        for _ in range(12):
            a.notify(50, bytes(MIB))
        await a.close()
        await b.wait_peers(0, 5)
        assert got == [MIB] * 12


# ----------------------------------------------------------------------------------- life of a node


def verbs(node: Node) -> list[Callable[[], Any]]:
    return [
        lambda: node.notify(50, b""),
        lambda: node.publish(50, b""),
        lambda: node.call(50, b"", 51),
        lambda: node.request(50, b""),
        lambda: node.ventilator([50], b""),
        lambda: node.drained(0),
    ]


async def test_verbs_before_the_start_and_after_the_close(registry_url: str) -> None:
    node = Node("a", registry=registry_url)
    node.subscribe(50, echo)
    assert (node.id, node.port, dict(node.peers)) == (-1, 0, {})
    for verb in verbs(node):
        with pytest.raises(DomiError, match="start"):
            verb()
    await node.start()
    assert node.id == 0
    assert node.port > 0
    assert await node.request(50, b"x") == b"x"
    with pytest.raises(DomiError):
        await node.start()
    await node.close()
    await node.close()
    for verb in verbs(node):
        with pytest.raises(DomiError):
            verb()
    with pytest.raises(DomiError):
        await node.start()


async def test_verbs_without_any_loop_or_start(registry_url: str) -> None:
    node = Node("a", registry=registry_url)
    await node.close()
    with pytest.raises(DomiError):
        await node.start()


async def test_verbs_from_another_thread(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(50, echo)
        for verb in [
            *verbs(a),
            lambda: a.subscribe(60, echo),
            lambda: a.unsubscribe(50),
        ]:
            with pytest.raises(DomiError, match="thread"):
                await asyncio.to_thread(verb)
        assert await a.request(50, b"x") == b"x"
        assert a.subscribers(60) == []
        # The way that the message names works.
        loop = asyncio.get_running_loop()
        got: list[bytes] = []
        a.subscribe(61, lambda ctx: got.append(ctx.data))
        await asyncio.to_thread(loop.call_soon_threadsafe, a.notify, 61, b"posted")
        await until(lambda: got)


async def test_a_closed_node_can_be_forgotten(registry_url: str) -> None:
    """Also when its handlers know it, as handlers mostly do."""
    gone: list[weakref.ref[Any]] = []

    async def use() -> None:
        async with nodes(registry_url, "a", "b") as (a, b):

            async def ask_on(ctx: Context) -> None:
                ctx.reply(await a.request(51, ctx.data))

            a.subscribe(50, ask_on)
            b.subscribe(51, lambda ctx: ctx.reply(b"%d" % b.id))
            await a.wait_subscribed(51, timeout=5)
            assert await a.request(50, b"") == b"%d" % b.id
            gone.extend(weakref.ref(one) for one in (a, b, session(a, b.id), session(b, a.id)))

    await use()
    await asyncio.sleep(0)
    gc.collect()
    gc.collect()
    assert [one() for one in gone] == [None] * 4


async def test_requests_in_flight_when_their_node_closes(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        for node in (a, b):
            node.subscribe(50, [].append)
        await a.wait_subscribed(50, 2, 5)
        requests = [a.request(50, b"", None, to=node.id) for node in (a, b)]
        found = [endings(request) for request in requests]
        await a.close()
        outcomes = await asyncio.gather(*requests, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {PeerLost}
        assert found == [["PeerLost"]] * 2


async def test_peers_shows_the_others(registry_url: str) -> None:
    first = Node("first", registry=registry_url, version="1.2")
    second = Node("second", registry=registry_url, version="v3")
    async with first as a, second as b:
        b.subscribe(50, echo)
        await a.wait_peers(1, 5)
        await a.wait_subscribed(50, timeout=5)
        assert set(a.peers) == {b.id}
        assert a.id not in a.peers
        peer = a.peers[b.id]
        assert (peer.id, peer.name, peer.version, peer.plain) == (b.id, "second", "v3", False)
        assert peer.channels == {50}
        assert peer.queued == 0
        with pytest.raises(TypeError):
            a.peers[7] = peer  # type: ignore[index]
    assert not a.peers


async def test_waiting_for_what_does_not_come(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        with pytest.raises(asyncio.TimeoutError):
            await a.wait_subscribed(50, timeout=0.02)
        with pytest.raises(asyncio.TimeoutError):
            await a.wait_peers(1, 0.02)


async def test_counters(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        before = a.counters()
        await asyncio.gather(*(a.request(50, bytes(100)) for _ in range(10)))
        after = a.counters()
        assert after["frames_out"] - before["frames_out"] == 10
        assert after["frames_in"] - before["frames_in"] >= 10
        assert after["bytes_out"] - before["bytes_out"] == 10 * (8 + 100 + 13)
        assert after["in_flight"] == 0


# ---------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("name", ""),
        ("name", "x" * 256),
        ("name", b"bytes"),
        ("version", "one"),
        ("version", ""),
        ("version", None),
        ("cluster", ""),
        ("cluster", "a/b"),
        ("cluster", "x" * 65),
        ("cluster", None),
        ("host", ""),
        ("host", None),
        ("host", "0.0.0.0"),
        ("host", "::"),
        ("host", "192.168.1.1"),
        ("host", "example.com"),
        ("port", -1),
        ("port", 65536),
        ("port", "80"),
        ("port", 1.5),
        ("port", None),
        ("unix_path", "/tmp/" + "x" * 103),
        ("unix_path", 5),
        ("heartbeat_interval", 0.05),
        ("heartbeat_interval", 0),
        ("heartbeat_interval", float("nan")),
        ("heartbeat_interval", "5"),
        ("heartbeat_interval", 3601),
        ("heartbeat_interval", 10.0),
        ("heartbeat_timeout", 5.0),
        ("heartbeat_timeout", 1.0),
        ("heartbeat_timeout", 86401),
        ("heartbeat_timeout", None),
        ("handshake_timeout", 0),
        ("handshake_timeout", 61),
        ("request_timeout", 0),
        ("request_timeout", -1),
        ("request_timeout", float("inf")),
        ("request_timeout", None),
        ("start_timeout", -0.1),
        ("start_timeout", float("nan")),
        ("drain_timeout", -1),
        ("lease_ttl", 0.05),
        ("lease_ttl", float("inf")),
        ("queue_limit", 65535),
        ("queue_limit", 0),
        ("queue_limit", None),
        ("frame_limit", 4095),
        ("frame_limit", 1 << 32),
        ("registry", "sqlite://relative/path"),
        ("registry", "redis://localhost"),
        ("registry", "etcd://localhost:2379"),
        ("registry", 5),
        ("on_error", 5),
        ("http_port", 8080),
        ("secret", "hush"),
        ("secret", b""),
        ("tls", object()),
        ("busy_poll", 0.001),
    ],
)
def test_settings_that_are_refused(registry_url: str, setting: str, value: Any) -> None:
    settings: dict[str, Any] = {"name": "a", "registry": registry_url, setting: value}
    with pytest.raises((ValueError, TypeError, DomiError)) as refused:
        Node(**settings)
    # The message says which setting it is about.
    assert setting in str(refused.value) or isinstance(refused.value, RegistryError)


@pytest.mark.parametrize("feature", ["secret", "tls", "busy_poll", "http_port"])
def test_what_is_not_built_yet_says_so(registry_url: str, feature: str) -> None:
    with pytest.raises(DomiError, match=f"{feature}.*yet"):
        Node("a", registry=registry_url, **{feature: 1})


def test_a_setting_that_does_not_exist(registry_url: str) -> None:
    with pytest.raises(TypeError, match=r"no setting colour.*heartbeat_interval"):
        Node("a", registry=registry_url, colour="red")


def test_the_defaults_are_the_documented_ones() -> None:
    config = NodeConfig("a")
    assert (config.heartbeat_interval, config.heartbeat_timeout, config.lease_ttl) == (5, 10, 3)
    assert (config.queue_limit, config.frame_limit) == (16 * MIB, 16 * MIB)
    with pytest.raises(AttributeError):
        config.name = "b"  # type: ignore[misc]


def test_an_open_address_needs_a_word(registry_url: str) -> None:
    with pytest.raises(DomiError, match="insecure=True"):
        Node("a", registry=registry_url, host="0.0.0.0")
    Node("a", registry=registry_url, host="0.0.0.0", insecure=True)
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        Node("a", registry=registry_url, host=host)


async def test_a_port_that_is_taken(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        other = Node("b", registry=registry_url, port=a.port)
        with pytest.raises(OSError, match=str(a.port)):
            await other.start()
        with pytest.raises(DomiError):
            other.notify(50, b"")


async def test_a_node_on_a_unix_socket(registry_url: str, tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    async with nodes(registry_url, "a", unix_path=path) as (a,):
        assert Path(path).is_socket()
        async with Node("b", registry=registry_url) as b:
            await b.wait_peers(1, 5)
            assert b.peers[a.id].address == f"unix:{path}"
            a.subscribe(50, echo)
            await b.wait_subscribed(50, timeout=5)
            assert await b.request(50, bytes(100_000)) == bytes(100_000)
    assert not Path(path).exists()


async def test_a_unix_socket_that_somebody_serves(registry_url: str, tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    async with nodes(registry_url, "a", unix_path=path):
        other = Node("b", registry=registry_url, unix_path=path)
        with pytest.raises(OSError, match=re.escape(path)):
            await other.start()
        assert Path(path).is_socket()


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.INFO, "domi_fast")
    yield
    forget_records(caplog)


# ------------------------------------------------------------------- settings that are put in order


async def awaited(error: DomiError, frame: Any) -> None:
    """Nobody awaits it."""


class Awaited:
    async def __call__(self, error: DomiError, frame: Any) -> None:
        """Nobody awaits it."""


@pytest.mark.parametrize(
    ("setting", "value", "kind", "words"),
    [
        ("on_error", awaited, TypeError, "async def"),
        ("on_error", functools.partial(awaited), TypeError, "async def"),
        ("on_error", Awaited(), TypeError, "async def"),
        ("registry", "", ValueError, "None"),
        ("unix_path", "", ValueError, "1 to 107 bytes"),
        ("unix_path", "/tmp/a\0b", ValueError, "NUL"),
        ("unix_path", "\0abstract", ValueError, "NUL"),
        ("unix_path", "/tmp/\ud800", ValueError, "1 to 107 bytes"),
        ("unix_path", "x" * 107, ValueError, "absolute path"),
        ("host", "[::1", ValueError, "::1"),
        ("host", "::1]", ValueError, "::1"),
        ("host", "[]", ValueError, "::1"),
        ("host", "[localhost]", ValueError, "127.0.0.1"),
        ("host", "", ValueError, "127.0.0.1"),
        ("host", "127.0.0.1\0", ValueError, "127.0.0.1"),
        ("host", "127.0.0.1 ", ValueError, "127.0.0.1"),
        ("name", "\ud800", ValueError, "1 to 255 bytes"),
        ("version", "1" * 256, ValueError, "255"),
        ("request_timeout", True, ValueError, "0.001 to 86400"),
        ("request_timeout", 10**400, ValueError, "0.001 to 86400"),
        ("frame_limit", 1, ValueError, "4096 to 4294967295"),
    ],
)
def test_settings_that_are_refused_with_advice(
    registry_url: str, setting: str, value: Any, kind: type[Exception], words: str
) -> None:
    given: dict[str, Any] = {"name": "a", "registry": registry_url, "insecure": True}
    with pytest.raises(kind, match=f"(?s)^{setting} .*{re.escape(words)}"):
        Node(**given | {setting: value})


async def test_an_ipv6_host_may_have_brackets(registry_url: str) -> None:
    assert NodeConfig("a", host="[::]", insecure=True).host == "::"
    node = Node("a", registry=registry_url, host="[::1]")
    assert node.config.host == "::1"
    addresses = Path("/proc/net/if_inet6")
    if addresses.exists() and f"{1:032x}" in addresses.read_text():
        async with node, Node("b", registry=registry_url, host="::1") as other:
            await other.wait_peers(1, 5)


async def test_a_relative_unix_path_outlives_a_chdir(
    registry_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    node = Node("a", registry=registry_url, unix_path="a.sock")
    assert node.config.unix_path == str(tmp_path / "a.sock")
    monkeypatch.chdir("elsewhere")
    async with node, Node("b", registry=registry_url) as other:
        await other.wait_peers(1, 5)
        assert (tmp_path / "a.sock").is_socket()
        assert other.peers[node.id].address == f"unix:{tmp_path}/a.sock"
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_the_order_of_a_nodes_settings_is_public() -> None:
    config = NodeConfig("a", "1.0", "cluster", "localhost", 7000)
    assert (config.version, config.cluster, config.host, config.port) == (
        "1.0",
        "cluster",
        "localhost",
        7000,
    )


@pytest.mark.parametrize("machine", [0.9, True, False, "1", b"\1", [1]])
async def test_a_machine_id_that_is_no_int(registry_url: str, machine: Any) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        b.subscribe(60, echo)
        await a.wait_subscribed(60, timeout=5)
        for verb in (
            lambda: a.notify(60, b"", to=machine),
            lambda: a.publish(60, b"", to=machine),
            lambda: a.call(60, b"", 61, to=machine),
            lambda: a.request(60, b"", to=machine),
            lambda: a.drained(machine),
        ):
            with pytest.raises(TypeError, match="an int of 0-1023 is wanted"):
                verb()


@pytest.mark.parametrize("machine", [-1, 900, 1023, 1024, 2**31, 2**32, 2**64, -(2**70)])
async def test_a_machine_id_that_no_node_has(registry_url: str, machine: int) -> None:
    async with nodes(registry_url, "a") as (a,):
        for verb in (lambda: a.notify(60, b"", to=machine), lambda: a.drained(machine)):
            with pytest.raises(PeerLost) as caught:
                verb()
            assert caught.value.peer == machine
        with pytest.raises(ValueError, match="channel"):
            a.subscribers(machine if machine < 0 else machine + 2**16)


async def test_publish_takes_what_notify_takes(registry_url: str) -> None:
    """Also when nobody subscribes, and it would not be sent."""
    async with nodes(registry_url, "a") as (a,):
        for handler in (None, print):
            if handler is not None:
                a.subscribe(60, handler)
            for data, error in ((memoryview(b"gapped")[::2], BufferError), ("text", TypeError)):
                for verb in (a.notify, a.publish):
                    if handler is None and verb == a.notify:
                        continue
                    with pytest.raises(error):
                        verb(60, data)  # type: ignore[arg-type]
            assert a.publish(60, array.array("H", [1, 2])) == (0 if handler is None else 1)


async def test_infinity_is_no_deadline(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        deadlines: list[float | None] = []

        def answer(ctx: Context) -> None:
            deadlines.append(ctx.deadline)
            ctx.reply(b"")

        b.subscribe(60, answer)
        await a.wait_subscribed(60, timeout=5)
        await a.request(60, b"", float("inf"))
        assert deadlines == [None]
