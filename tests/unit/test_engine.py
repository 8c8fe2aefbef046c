"""The engine: one timer for all deadlines, one dispatch at a time, little memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bench.two_process.memory import resident, trim
from domi_fast import Context, DeadlineExceeded, Node, encode_frame
from domi_fast._core import ROLE_DIALLER, Session, engine_of
from tests.conftest import LOOPS
from tests.support import (
    RawPeer,
    echo,
    forget_records,
    guest_greeting,
    link,
    no_collector,
    nodes,
    session,
    slowness,
    until,
    until_now,
    workers,
)

SANITIZED = os.environ.get("DOMI_SANITIZE") == "1"


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


# --------------------------------------------------------------------------------------- the wheel


@pytest.mark.parametrize("order", ["later and later", "earlier and earlier", "all alike"])
def test_the_wheel_carries_the_deadlines(
    registry_url: str, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """10,000 requests in flight: asyncio has a handful of timers, not one for each."""

    async def work() -> None:
        loop = asyncio.get_running_loop()
        async with nodes(registry_url, "a", "b") as (a, b):
            kept: list[Context] = []
            b.subscribe(50, kept.append)
            await a.wait_subscribed(50, timeout=5)
            calls = []
            for name in ("call_at", "call_later"):
                inner = getattr(loop, name)
                monkeypatch.setattr(
                    loop,
                    name,
                    lambda *args, inner=inner, **kw: (calls.append(1), inner(*args, **kw))[1],
                )
            total = 10_000
            timeouts = {
                "later and later": lambda number: 20 + number / 1000,
                "earlier and earlier": lambda number: 40 - number / 1000,
                "all alike": lambda number: 30.0,
            }[order]
            requests = [a.request(50, b"x", timeouts(number)) for number in range(total)]
            assert a.counters()["in_flight"] == total
            assert engine_of(loop).timers >= total
            made = len(calls)
            # The wheel's own timer moves only to be earlier, tick by tick at most.
            await until(lambda: len(kept) == total)
            for ctx in kept:
                ctx.reply(b"")
            await asyncio.gather(*requests)
            assert a.counters()["in_flight"] == 0
            if order == "earlier and earlier":
                assert made < total * 0.7
            else:
                assert made < 10
            assert engine_of(loop).timers < 100

    loop = LOOPS["asyncio"]()
    try:
        loop.run_until_complete(asyncio.wait_for(work(), 60))
    finally:
        loop.close()


async def test_deadlines_are_not_early_and_prompt(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(50, [].append)
        late: list[float] = []
        before = slowness()

        async def ask(timeout: float) -> None:
            begun = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await a.request(50, b"", timeout)
            late.append(time.monotonic() - begun - timeout)

        with no_collector():
            await asyncio.gather(*(ask(0.001 * number) for number in range(1, 300)))
        assert min(late) >= 0
        late.sort()
        # Most within two ticks of a millisecond; the worst may have been held up by others.
        assert late[len(late) // 2] < 0.005 * max(before, slowness())
        assert late[-1] < 0.1 * max(before, slowness())


async def test_deadlines_of_very_different_length(registry_url: str) -> None:
    """The long ones do not hold up the short ones, whichever came first."""
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(50, [].append)
        long = [a.request(50, b"", seconds) for seconds in (3600.0, 86400.0, 1e6)]
        for timeout in (0.2, 0.02, 0.1):
            begun = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await a.request(50, b"", timeout)
            assert timeout <= time.monotonic() - begun < timeout + 0.1 * slowness()
        assert not any(request.done() for request in long)
        for request in long:
            request.cancel()


async def test_a_deadline_passes_while_the_loop_is_held_up(registry_url: str) -> None:
    """An answer that is there in time but read too late is one outcome, not two."""
    async with nodes(registry_url, "a", "b") as (a, b):
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        for _ in range(5):
            ended: list[Any] = []
            request = a.request(50, b"x", 0.01)
            request.add_done_callback(ended.append)
            time.sleep(0.03)
            with contextlib.suppress(DeadlineExceeded):
                assert await request == b"x"
            await asyncio.sleep(0)
            assert ended == [request]
        assert await a.request(50, b"y") == b"y"


# ------------------------------------------------------------------------------------ one at a time


async def test_no_dispatch_within_a_dispatch(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c") as (a, b, c):
        depth = 0
        deepest = 0
        handled = 0

        def handler(ctx: Context) -> None:
            nonlocal depth, deepest, handled
            depth += 1
            deepest = max(deepest, depth)
            handled += 1
            left = int(ctx.data)
            if left:
                for node in (a, b, c):
                    node.notify(50, b"%d" % (left - 1))
            for one in (a, b, c):
                for other in one._router.sessions():
                    other.readable()  # a loop may call it at any time
            depth -= 1

        for node in (a, b, c):
            node.subscribe(50, handler)
        for node in (a, b, c):
            await node.wait_subscribed(50, 3, 5)
        a.notify(50, b"6")
        expected = sum(3**level for level in range(7))
        await until(lambda: handled == expected)
        assert deepest == 1


async def test_a_loop_that_is_run_within_a_handler_is_not_needed(registry_url: str) -> None:
    """What a waiter does when it is woken within the batch may send and answer as it likes."""
    async with nodes(registry_url, "a", "b") as (a, b):
        b.subscribe(50, echo)
        a.subscribe(51, echo)
        await a.wait_subscribed(50, timeout=5)
        await b.wait_subscribed(51, timeout=5)

        async def chain(node: Node, channel: int) -> int:
            total = 0
            for number in range(300):
                total += int(await node.request(channel, b"%d" % number))
                if number % 50 == 0:
                    await asyncio.sleep(0)
            return total

        sums = await asyncio.gather(
            *(chain(a, 50) for _ in range(3)), *(chain(b, 51) for _ in range(3))
        )
        assert sums == [sum(range(300))] * 6


async def test_inline_wake_up_keeps_current_task(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        seen: list[Any] = []

        def handler(ctx: Context) -> None:
            seen.append(asyncio.current_task())
            ctx.reply(b"")

        async def async_handler(ctx: Context) -> None:
            task = asyncio.current_task()
            await a.request(52, b"")
            assert asyncio.current_task() is task
            ctx.reply(b"")

        b.subscribe(50, handler)
        b.subscribe(51, async_handler)
        b.subscribe(52, echo)
        await a.wait_subscribed(52, timeout=5)

        async def ask() -> None:
            task = asyncio.current_task()
            for _ in range(20):
                await a.request(50, b"")
                assert asyncio.current_task() is task
                await a.request(51, b"")
                assert asyncio.current_task() is task
                await asyncio.wait_for(a.request(50, b""), 5)
                assert asyncio.current_task() is task

        await asyncio.gather(*(ask() for _ in range(5)))
        # A def handler runs in nobody's task.
        assert set(seen) == {None}


async def test_flushing_within_a_task_wakes_no_other_task_there(registry_url: str) -> None:
    """Dialling flushes within a task; what the node sent to itself must not be handled there."""
    async with nodes(registry_url, "a") as (a,):
        tasks: list[Any] = []

        def handler(ctx: Context) -> None:
            tasks.append(asyncio.current_task())
            ctx.reply(ctx.data)

        a.subscribe(50, handler)
        request = a.request(50, b"x", 1.0)
        request.add_done_callback(lambda _: tasks.append(asyncio.current_task()))
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        one = Session(a._router, ours.detach(), ROLE_DIALLER, "a test", peer=900)
        try:
            one.start()
            one.dial(65510, b"\x00\x00", b"")
        finally:
            one.close("the test is over")
            theirs.close()
        # A done callback may be a task's wake-up, and no task can run within another.
        await until(lambda: len(tasks) == 2)
        assert tasks == [None, None]
        assert request.result() == b"x"


# ------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("where", ["itself", "other"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("kind", list(LOOPS))
def test_an_interruption_in_a_handler(
    registry_url: str, kind: str, error: type[BaseException], where: str
) -> None:
    """It ends run_forever; the session goes on where it stopped when the loop runs again."""
    loop = LOOPS[kind]()
    a, b = Node("a", registry=registry_url), Node("b", registry=registry_url)
    got: list[bytes] = []

    def handler(ctx: Context) -> None:
        got.append(ctx.data)
        if ctx.data == b"3":
            raise error

    try:
        loop.run_until_complete(a.start())
        loop.run_until_complete(b.start())
        b.subscribe(50, handler)
        b.subscribe(51, echo)
        sender = b if where == "itself" else a
        loop.run_until_complete(sender.wait_subscribed(51, timeout=5))

        async def send() -> None:
            for number in range(6):
                sender.notify(50, b"%d" % number)

        loop.create_task(send())
        guard = loop.call_later(5, loop.stop)
        with pytest.raises(error):
            loop.run_forever()
        guard.cancel()
        # A loop may end its turn before it lets the interruption out.
        assert got[:4] == [b"0", b"1", b"2", b"3"]

        async def arrived() -> None:
            await until(lambda: len(got) == 6, 2)
            assert await asyncio.wait_for(sender.request(51, b"after"), 2) == b"after"

        loop.run_until_complete(arrived())
        assert got == [b"%d" % number for number in range(6)]
    finally:
        loop.run_until_complete(a.close())
        loop.run_until_complete(b.close())
        loop.close()


@pytest.mark.parametrize("kind", list(LOOPS))
def test_an_interruption_in_an_async_handler(registry_url: str, kind: str) -> None:
    loop = LOOPS[kind]()
    a = Node("a", registry=registry_url)

    async def handler(ctx: Context) -> None:
        if ctx.data == b"stop":
            raise KeyboardInterrupt
        ctx.reply(ctx.data)

    try:
        loop.run_until_complete(a.start())
        a.subscribe(50, handler)

        async def send() -> None:
            a.notify(50, b"stop")

        loop.create_task(send())
        guard = loop.call_later(5, loop.stop)
        with pytest.raises(KeyboardInterrupt):
            loop.run_forever()
        guard.cancel()

        async def after() -> None:
            assert await a.request(50, b"after", 2) == b"after"

        loop.run_until_complete(after())
    finally:
        loop.run_until_complete(a.close())
        loop.close()


# --------------------------------------------------------------------------------------- two loops


def test_nodes_on_two_loops_in_two_threads(registry_url: str) -> None:
    """Each loop has an engine of its own."""
    ready, done = threading.Event(), threading.Event()
    failed: list[BaseException] = []

    async def serve() -> None:
        async with Node("server", registry=registry_url) as server:
            server.subscribe(50, echo)
            ready.set()
            await asyncio.to_thread(done.wait, 30)

    def thread() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            failed.append(error)

    async def ask() -> None:
        async with Node("client", registry=registry_url) as client:
            await client.wait_subscribed(50, timeout=5)
            for number in range(200):
                assert await client.request(50, b"%d" % number) == b"%d" % number

    server = threading.Thread(target=thread)
    server.start()
    try:
        assert ready.wait(5)
        asyncio.run(ask())
    finally:
        done.set()
        server.join(10)
    assert not failed


async def test_the_engine_goes_with_its_last_node(registry_url: str) -> None:
    loop = asyncio.get_running_loop()
    async with nodes(registry_url, "a", "b"):
        engine = engine_of(loop)
        assert engine.timers > 0
    assert engine.closed
    assert engine.timers == 0
    async with nodes(registry_url, "c") as (c,):
        c.subscribe(50, echo)
        assert await c.request(50, b"x", 1) == b"x"


# ------------------------------------------------------------------------------------------- memory


# A sanitizer puts red zones around, and keeps, all that is allocated; `-X dev`, with which the
# debug build is run, puts two or three words around each object.
SANITIZED, DEBUG = (os.environ.get(f"DOMI_{name}") == "1" for name in ("SANITIZE", "DEBUG"))
IDLE = 32768 if SANITIZED else 8192 if DEBUG else 4096


@pytest.mark.parametrize("kind", list(LOOPS))
def test_an_idle_session_costs_little(kind: str, sqlite_url: str) -> None:
    """Resident memory of a node with 1,000 idle sessions, without their peers' half."""
    count = 1000
    with workers(kind) as (process,):
        process.ask("start", registry=sqlite_url)
        [port] = process.ask("ports")
        sockets: list[socket.socket] = []

        def connect(number: int) -> None:
            for _ in range(number):
                one = socket.create_connection(("127.0.0.1", port), timeout=5)
                sockets.append(one)
                one.sendall(guest_greeting())
            until_now(lambda: process.ask("guests") == len(sockets))

        try:
            connect(50)  # pools and tables that are made once
            before = process.ask("memory")
            connect(count)
            each = (process.ask("memory") - before) / count
            assert 0 < each < IDLE
        finally:
            for one in sockets:
                one.close()
        until_now(lambda: process.ask("guests") == 0)


async def test_a_session_that_has_been_busy_is_small_again(registry_url: str) -> None:
    """Neither the queue nor the reader keeps what it needed for a large message."""
    size = 10 << 20
    async with nodes(registry_url, "a", "b") as (a, b):
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        trim()
        before = resident()
        for _ in range(3):
            assert len(await a.request(50, bytes(size), 20)) == size
        for end in link(a, b):
            assert end.queued == 0
        await asyncio.sleep(0)  # the last answer is in the hands of this turn
        trim()
        if not SANITIZED:  # it keeps what was freed
            assert resident() - before < size // 4


async def test_writes_of_one_turn_go_out_together(registry_url: str) -> None:
    """The first at once, the rest as one: by the sizes of what a bare socket receives."""
    async with nodes(registry_url, "a") as (a,):
        raw = await RawPeer.plain(a, 700)
        try:
            for _ in range(100):
                a.notify(50, b"x" * 92, to=700)
            assert session(a, 700).queued == 99 * 100
            await asyncio.sleep(0)
            assert session(a, 700).queued == 0
            for _ in range(100):
                assert len((await raw.frame_on(50)).data) == 92
        finally:
            raw.close()


async def test_what_a_handler_sends_goes_out_together(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        queued: list[int] = []

        def handler(ctx: Context) -> None:
            for _ in range(2):
                a.notify(51, b"answer", to=700)
                queued.append(session(a, 700).queued)

        a.subscribe(50, handler)
        raw = await RawPeer.plain(a, 700)
        frame = len(encode_frame(51, b"answer"))
        try:
            await raw.send(encode_frame(50, b"ask"))
            for _ in range(2):
                assert (await raw.frame_on(51)).data == b"answer"
            assert queued == [frame, 2 * frame]
        finally:
            raw.close()


async def test_what_a_long_batch_writes_goes_out_before_its_end(registry_url: str) -> None:
    """The first frames take 50 us by the next look at the clock, which is less than a turn."""
    async with nodes(registry_url, "a") as (a,):
        queued = []

        def handler(ctx: Context) -> None:
            queued.append(session(a, 700).queued)
            a.notify(51, b"answer", to=700)
            end = time.perf_counter_ns() + 3000
            while time.perf_counter_ns() < end:
                pass

        a.subscribe(50, handler)
        raw = await RawPeer.plain(a, 700)
        try:
            await raw.send(encode_frame(50, b"ask") * 40)
            for _ in range(40):
                assert (await raw.frame_on(51)).data == b"answer"
            first = queued.index(0, 1)
            assert first == 16
            assert queued[:first] == [number * queued[1] for number in range(first)]
        finally:
            raw.close()
