"""Requests: every outcome, each exactly once, and asyncio's ways of waiting for it."""

from __future__ import annotations

import asyncio
import contextvars
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from domi_fast import (
    Context,
    DeadlineExceeded,
    FrameError,
    NoSubscriber,
    Overloaded,
    PeerLost,
    RemoteError,
    Request,
    Serial,
)
from tests.support import echo, endings, forget_records, nodes, session, until


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


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


@pytest.mark.parametrize(
    ("timeout", "kind"),
    [
        ("5", TypeError),
        (b"5", TypeError),
        ([5], TypeError),
        (True, ValueError),
        (float("nan"), ValueError),
        (10**400, ValueError),
    ],
)
async def test_timeouts_that_are_none(
    registry_url: str, timeout: Any, kind: type[Exception]
) -> None:
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(50, echo)
        given = re.escape(f"timeout {timeout!r:.100}: seconds, or None for no deadline, are wanted")
        with pytest.raises(kind, match=given):
            a.request(50, b"", timeout)
        async with Serial(a, thread=True) as serial:
            done: list[Exception] = []

            def ask(ctx: Context) -> None:
                try:
                    serial.request(50, b"", timeout)
                except Exception as error:
                    done.append(error)

            serial.subscribe(51, ask)
            a.notify(51, b"")
            await until(lambda: done)
            assert type(done[0]) is kind
            assert re.match(given, str(done[0]))
