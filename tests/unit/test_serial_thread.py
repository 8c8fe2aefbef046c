"""Serial mode on a thread of its own: what runs where, and what goes between it and the loop.

Everything that both ways of running have in common is in test_serial.py.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from domi_fast import (
    Context,
    DeadlineExceeded,
    DomiError,
    FrameError,
    Node,
    NoSubscriber,
    Overloaded,
    PeerLost,
    RemoteError,
    RingFull,
    Serial,
)
from tests.support import ROOT, echo, forget_records, nodes, slowness, until


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


@asynccontextmanager
async def pair(url: str, **settings: Any) -> AsyncIterator[tuple[Node, Node, Serial]]:
    """Two nodes, and a serial thread at the second, which has not started."""
    async with nodes(url, "a", "b", **settings.pop("node", {})) as (a, b):
        serial = Serial(b, thread=True, **settings)
        try:
            yield a, b, serial
        finally:
            await serial.close()


async def within(serial: Serial, work: Callable[[], Any]) -> Any:
    """What ``work`` returns or raises, run on the serial thread."""
    ended: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            ended.set_result(work())
        except BaseException as error:
            ended.set_exception(error)

    serial.call_later(0.0, run)
    return await asyncio.wait_for(asyncio.wrap_future(ended), 10)


# ---------------------------------------------------------------------------------- what runs where


async def test_everything_of_it_runs_on_one_thread(registry_url: str) -> None:
    async with pair(registry_url) as (a, b, serial):
        seen: list[tuple[str, int]] = []

        def saw(what: str) -> Callable[..., None]:
            return lambda *_: seen.append((what, threading.get_ident()))

        def failing(ctx: Context) -> None:
            saw("handler")()
            serial.request(60, b"").add_done_callback(saw("answer"))
            serial.notify_many(61, [b"", b"refused"])

        a.subscribe(60, echo)
        a.subscribe(61, lambda ctx: a.unsubscribe(61))
        serial.subscribe(50, failing)
        serial.subscribe(51, saw("batch"), batch=True)
        serial.subscribe_race([52, 53], saw("race"))
        serial.subscribe_all([54, 55], saw("join"))
        serial.on_error = saw("on_error")
        await serial.start()
        beat = serial.every(0.001, saw("every"))
        serial.call_later(0.0, saw("call_later"))
        await a.wait_subscribed(55, timeout=5)
        await b.wait_subscribed(61, timeout=5)
        for channel in range(50, 56):
            a.notify(channel, b"")
        names = {"handler", "answer", "batch", "race", "join", "on_error", "every", "call_later"}
        await until(lambda: {what for what, _ in seen} >= names)
        beat.cancel()
        threads = {thread for _, thread in seen}
        assert len(threads) == 1
        assert threads != {threading.get_ident()}
        assert [each.name for each in threading.enumerate() if each.ident in threads] == [
            "serial-b"
        ]


async def test_a_handler_that_waits_holds_up_nobody_else(registry_url: str) -> None:
    async with pair(registry_url) as (a, b, serial):
        gate = threading.Event()
        ran: list[bytes] = []

        def wait(ctx: Context) -> None:
            assert gate.wait(10)
            ran.append(ctx.data)

        serial.subscribe(50, wait)
        b.subscribe(60, echo)
        await serial.start()
        await a.wait_subscribed(60, timeout=5)
        a.notify(50, b"1")
        a.notify(50, b"2")
        await until(lambda: serial.backlog == 1)
        for _ in range(100):
            assert await a.request(60, b"x", timeout=2) == b"x"
        assert ran == []
        gate.set()
        await until(lambda: ran == [b"1", b"2"])


async def test_it_sleeps_when_there_is_nothing_to_do(registry_url: str) -> None:
    """It is woken, and does not poll: an idle thread uses no processor."""
    async with pair(registry_url) as (a, _, serial):
        clocks: list[int] = []
        serial.subscribe(50, lambda ctx: clocks.append(time.thread_time_ns()))
        await serial.start()
        await a.wait_subscribed(50, timeout=5)
        for count in range(1, 4):
            a.notify(50, b"")
            await until(lambda count=count: len(clocks) == count)  # type: ignore[misc]
            await asyncio.sleep(0.3)
        assert clocks[2] - clocks[1] < 30_000_000


async def test_a_timer_wakes_it(registry_url: str) -> None:
    """One that the loop sets while the thread sleeps, too; and one before another."""
    async with pair(registry_url) as (_, _, serial):
        fired: list[str] = []
        await serial.start()
        serial.call_later(30.0, lambda: fired.append("late"))
        await asyncio.sleep(0.05)
        serial.call_later(0.01, lambda: fired.append("early"))
        await until(lambda: fired == ["early"])


async def test_timers_are_on_time(registry_url: str) -> None:
    async with pair(registry_url, tick=0.0001) as (_, _, serial):
        late: list[float] = []
        await serial.start()

        def at(due: float) -> Callable[[], None]:
            return lambda: late.append(time.monotonic() - due)

        for number in range(20):
            serial.call_later(0.005 * number, at(time.monotonic() + 0.005 * number))
        await until(lambda: len(late) == 20)
        assert min(late) >= 0.0
        assert sorted(late)[10] < 0.005 * slowness()


# --------------------------------------------------------------------------------------- the verbs


async def test_every_verb_from_the_serial_thread(registry_url: str) -> None:
    async with pair(registry_url) as (a, b, serial):
        seen: list[tuple[int, bytes, int]] = []

        def see(ctx: Context) -> None:
            seen.append((ctx.channel, ctx.data, ctx.sender))

        for channel in (60, 61):
            a.subscribe(channel, see)
        a.subscribe(62, echo)
        a.subscribe(63, lambda ctx: ctx.next(ctx.data + b"+"))
        serial.subscribe(50, see)
        await serial.start()
        await b.wait_subscribed(63, timeout=5)

        def send() -> list[Any]:
            many = [b"1", bytearray(b"2"), memoryview(b"3")]
            return [
                serial.notify(60, b"notified"),
                serial.publish(60, b"published"),
                serial.notify(61, b"to", to=a.id),
                serial.publish(61, b"published to", to=a.id),
                serial.call(62, b"called", 50),
                serial.ventilator([63, 60], b"piped"),
                serial.notify_many(60, many),
                serial.publish_many(60, many),
                serial.call_many(62, many, 50, to=a.id),
                serial.publish(64, b"to nobody"),
            ]

        assert await within(serial, send) == [None, 1, None, 1, None, None, 3, 3, 3, 0]
        await until(lambda: len(seen) == 15)
        assert [each for each in seen if each[0] == 60] == [
            (60, data, b.id)
            for data in (b"notified", b"published", b"1", b"2", b"3", b"1", b"2", b"3")
        ] + [(60, b"piped+", a.id)]
        assert [data for channel, data, _ in seen if channel == 61] == [b"to", b"published to"]
        assert [data for channel, data, _ in seen if channel == 50] == [b"called", b"1", b"2", b"3"]


@pytest.mark.parametrize("size", [0, 1, 1000, 65_000, 65_536, 70_000, 1_000_000])
@pytest.mark.parametrize("ring_size", [4096, 2**21])
async def test_what_it_sends_may_be_of_every_size(
    registry_url: str, size: int, ring_size: int
) -> None:
    async with pair(registry_url, ring_size=ring_size) as (a, b, serial):
        seen: list[bytes] = []
        a.subscribe(60, lambda ctx: seen.append(ctx.data))
        await serial.start()
        await b.wait_subscribed(60, timeout=5)
        message = bytes(range(256)) * (size // 256) + bytes(size % 256)
        changing = bytearray(message)

        def send() -> None:
            serial.notify(60, b"before")
            serial.notify(60, message)
            serial.notify(60, changing)
            changing[:1] = b"?"  # it was copied
            serial.notify(60, b"after")

        await within(serial, send)
        await until(lambda: len(seen) == 4)
        assert seen == [b"before", message, message, b"after"]


async def test_a_message_is_answered_in_every_way(registry_url: str) -> None:
    async with pair(registry_url) as (a, _, serial):
        kept: list[Context] = []

        def later(ctx: Context) -> None:
            kept.append(ctx)
            serial.call_later(0.001, lambda: ctx.reply(b"later"))

        def twice(ctx: Context) -> None:
            ctx.reply(b"once")
            ctx.reply(b"twice")

        serial.subscribe(50, later)
        serial.subscribe(51, twice)
        serial.subscribe(52, lambda ctx: ctx.error("no"))
        serial.subscribe(53, lambda ctx: None)
        serial.subscribe(54, lambda many: serial.reply_many(many, b"many"), batch=True)
        serial.subscribe(55, kept.append)
        await serial.start()
        await a.wait_subscribed(55, timeout=5)
        assert await a.request(50, b"") == b"later"
        assert await a.request(51, b"") == b"once"
        with pytest.raises(RemoteError, match="no"):
            await a.request(52, b"")
        with pytest.raises(RemoteError, match="nobody is left to answer"):
            await a.request(53, b"")
        asked = [a.request(54, b"") for _ in range(10)]
        assert await asyncio.gather(*asked) == [b"many"] * 10
        request = a.request(55, b"")
        await until(lambda: len(kept) == 2)
        kept[1].reply(b"from the loop")
        assert await request == b"from the loop"
        assert kept[0].answered
        assert kept[1].answered


async def test_what_is_known_at_once_is_raised_at_once(registry_url: str) -> None:
    async with pair(registry_url, ring_size=4096) as (a, b, serial):
        taken: list[Context] = []
        b.subscribe(60, taken.append)
        kept: list[Context] = []
        serial.subscribe_race([70, 71], kept.append)
        await serial.start()
        await a.wait_subscribed(71, timeout=5)
        a.ventilator([70, 60], b"")
        request = a.request(71, b"")
        await until(lambda: len(kept) == 2)
        verbs: list[tuple[type[Exception], str, Callable[[], Any]]] = [
            (NoSubscriber, "nobody subscribes to channel 99", lambda: serial.notify(99, b"")),
            (NoSubscriber, "channel 99", lambda: serial.call(99, b"", 50)),
            (NoSubscriber, "channel 99", lambda: serial.request(99, b"")),
            (NoSubscriber, "channel 99", lambda: serial.ventilator([99, 50], b"")),
            (NoSubscriber, f"node {a.id} does not", lambda: serial.notify(60, b"", to=a.id)),
            (PeerLost, "no session with node 77", lambda: serial.notify(60, b"", to=77)),
            (PeerLost, "no session with node 77", lambda: serial.publish(60, b"", to=77)),
            (FrameError, "at most", lambda: serial.notify(60, bytes(17 << 20))),
            (FrameError, "at most", lambda: serial.request(60, bytes(17 << 20))),
            (FrameError, "at most", lambda: serial.ventilator([60], bytes(17 << 20))),
            (DeadlineExceeded, "timeout=0", lambda: serial.request(60, b"", 0)),
            (TypeError, "not str", lambda: serial.notify(60, "text")),  # type: ignore[arg-type]
            (TypeError, "bytes-like", lambda: serial.notify(60, 5)),  # type: ignore[arg-type]
            (ValueError, "users have 50-65499", lambda: serial.notify(3, b"")),
            (ValueError, "not a number", lambda: serial.request(60, b"", float("nan"))),
        ]
        for kind, text, verb in verbs:
            with pytest.raises(kind, match=text):
                await within(serial, verb)

        def flood() -> Any:
            with pytest.raises(RingFull) as full:
                serial.notify_many(60, [b"x"] * 7000)
            for verb in (
                lambda: [serial.request(60, b"") for _ in range(10)],  # smaller in the ring
                lambda: serial.request(60, b""),
                lambda: serial.ventilator([60], b""),
                lambda: kept[0].next(b""),
                lambda: kept[1].reply(b""),
            ):
                with pytest.raises(RingFull):
                    verb()
            return full.value

        raised: list[Any] = []
        done = threading.Event()
        serial.call_later(0.0, lambda: (raised.append(flood()), done.set()))
        assert done.wait(10)  # the loop stands still, and takes nothing out
        assert isinstance(raised[0], Overloaded)
        assert isinstance(raised[0].sent, int)
        assert 20 < raised[0].sent < 200
        assert b.counters()["outbound_full"] == 6
        kept[1].reply(b"once there is room")
        assert await request == b"once there is room"
        # It goes on, once the loop has taken them out.
        await until(lambda: len(taken) >= raised[0].sent)
        assert await within(serial, lambda: serial.notify(60, b"")) is None


async def test_a_busy_thread_is_waited_for(registry_url: str) -> None:
    """Both ways: more than a ring has room for, and none is refused or lost."""
    async with pair(registry_url, ring_size=4096) as (a, b, serial):
        seen: list[bytes] = []
        sums = [0]
        b.subscribe(60, lambda ctx: seen.append(ctx.data))
        serial.subscribe(50, lambda ctx: sums.append(sums.pop() + int(ctx.data)))
        await serial.start()
        await a.wait_subscribed(50, timeout=5)
        count = 20_000
        messages = [b"%d" % number for number in range(count)]
        serial.call_later(0.0, lambda: serial.notify_many(60, messages))
        await until(lambda: len(seen) == count)
        assert seen == messages
        a.notify_many(50, messages)
        await until(lambda: sums == [count * (count - 1) // 2])
        assert b.counters().get("ring_full", 0) == b.counters().get("outbound_full", 0) == 0


async def test_a_thread_that_waits_is_not_waited_for(registry_url: str) -> None:
    async with pair(registry_url, ring_size=4096) as (a, b, serial):
        gate = threading.Event()
        refused: list[DomiError] = []
        a.on_error = lambda error, frame: refused.append(error)
        serial.subscribe(50, lambda ctx: gate.wait(10) and None)
        b.subscribe(60, echo)
        await serial.start()
        await a.wait_subscribed(60, timeout=5)
        try:
            a.notify_many(50, [b"x"] * 1000)
            began = time.monotonic()
            assert await a.request(60, b"x") == b"x"
            assert time.monotonic() - began < 0.5 * slowness()
            await until(lambda: b.counters().get("ring_full", 0) > 800)
        finally:
            gate.set()
        await until(lambda: serial.backlog == 0)
        await until(lambda: len(refused) == b.counters()["ring_full"])


async def test_what_is_refused_later_goes_to_on_error(registry_url: str) -> None:
    node = {"queue_limit": 65536}
    async with pair(registry_url, node=node) as (a, b, serial):
        heard: list[tuple[type, bytes, int]] = []
        serial.on_error = lambda error, frame: heard.append(
            (type(error), frame.data[:1], threading.get_ident())
        )
        a.subscribe(60, lambda ctx: None)
        await serial.start()
        await b.wait_subscribed(60, timeout=5)

        done = threading.Event()

        def flood() -> None:
            for number in range(100):
                serial.notify(60, bytes([number]) + bytes(1_000_000))
            done.set()

        serial.call_later(0.0, flood)
        assert done.wait(10)  # the loop finds them all at once
        await until(lambda: len(heard) >= 10)
        assert {kind for kind, _, _ in heard} == {Overloaded}
        assert {thread for _, _, thread in heard}.isdisjoint({threading.get_ident()})


async def test_requests_of_the_serial_thread(registry_url: str) -> None:
    async with pair(registry_url) as (a, b, serial):
        held: list[Context] = []

        def fail(ctx: Context) -> None:
            raise KeyError("no")

        a.subscribe(60, echo)
        a.subscribe(61, fail)
        a.subscribe(62, held.append)
        await serial.start()
        await b.wait_subscribed(62, timeout=5)
        # It waits on its own thread.
        assert await within(serial, lambda: serial.request(60, b"x").result(5)) == b"x"
        assert await within(serial, lambda: serial.request(60, b"y", to=a.id).result(5)) == b"y"
        with pytest.raises(RemoteError, match="KeyError"):
            await within(serial, lambda: serial.request(61, b"").result(5))
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await within(serial, lambda: serial.request(62, b"", 0.05).result(5))
        assert 0.05 <= time.monotonic() - began < 1.0 * slowness()
        endless = await within(serial, lambda: serial.request(62, b"", None))
        await until(lambda: len(held) == 2)
        assert held[-1].deadline is None
        assert not endless.done()
        # Handlers that use callbacks never wait.
        outcomes: list[tuple[bytes, int]] = []

        def ask(number: int) -> None:
            serial.request(60, b"%d" % number).add_done_callback(
                lambda done: outcomes.append((done.result(), threading.get_ident()))
            )

        await within(serial, lambda: [ask(number) for number in range(100)])
        await until(lambda: len(outcomes) == 100)
        assert [answer for answer, _ in outcomes] == [b"%d" % number for number in range(100)]
        assert len({thread for _, thread in outcomes}) == 1
        # The loop thread awaits, as at the node.
        assert await serial.request(60, b"z") == b"z"
        held[-1].reply(b"late")
        assert await asyncio.wrap_future(endless) == b"late"


async def test_a_request_that_is_cancelled(registry_url: str) -> None:
    async with pair(registry_url) as (a, b, serial):
        held: list[Context] = []
        a.subscribe(62, held.append)
        await serial.start()
        await b.wait_subscribed(62, timeout=5)

        def at_once() -> Any:
            request = serial.request(62, b"")
            assert request.cancel()
            assert request.cancelled()
            return request

        await within(serial, at_once)
        request = await within(serial, lambda: serial.request(62, b""))
        await until(lambda: held)
        assert b.counters()["in_flight"] == 1
        assert await within(serial, request.cancel)
        await until(lambda: b.counters()["in_flight"] == 0)
        with pytest.raises(concurrent.futures.CancelledError):
            request.result()


async def test_a_request_ends_when_its_peer_goes(registry_url: str) -> None:
    async with pair(registry_url) as (a, b, serial):
        held: list[Context] = []
        a.subscribe(62, held.append)
        await serial.start()
        await b.wait_subscribed(62, timeout=5)
        request = await within(serial, lambda: serial.request(62, b"", None))
        await until(lambda: held)
        await a.close()
        with pytest.raises(PeerLost):
            await within(serial, lambda: request.result(5))


# ------------------------------------------------------------------------ subscriptions, threads


async def test_subscribing_from_both_threads(registry_url: str) -> None:
    async with pair(registry_url) as (a, b, serial):
        await serial.start()
        serial.subscribe(50, echo)
        await within(serial, lambda: serial.subscribe(51, echo))
        await a.wait_subscribed(50, timeout=5)
        await a.wait_subscribed(51, timeout=5)
        assert await a.request(50, b"x") == await a.request(51, b"x") == b"x"
        b.subscribe(52, echo)
        with pytest.raises(DomiError, match="has a handler already"):
            await within(serial, lambda: serial.subscribe(52, echo))
        serial.unsubscribe(51)
        await within(serial, lambda: serial.unsubscribe(50))
        await until(lambda: not a.subscribers(50) and not a.subscribers(51))
        await within(serial, lambda: serial.subscribe(50, echo))
        await a.wait_subscribed(50, timeout=5)
        assert await a.request(50, b"again") == b"again"


async def test_a_channel_that_changes_hands_in_one_handler(registry_url: str) -> None:
    """And between the threads: what was subscribed last is what runs."""
    async with pair(registry_url) as (a, _, serial):
        await serial.start()

        def answer(data: bytes) -> Callable[[Context], None]:
            return lambda ctx: ctx.reply(data)

        def change() -> None:
            serial.subscribe(50, answer(b"first"))
            serial.unsubscribe(50)
            serial.subscribe(50, answer(b"second"))

        await within(serial, change)
        await a.wait_subscribed(50, timeout=5)
        assert await a.request(50, b"") == b"second"
        done = threading.Event()

        def again() -> None:
            serial.unsubscribe(50)
            serial.subscribe(50, answer(b"third"))
            done.set()

        serial.call_later(0.0, again)
        assert done.wait(10)  # the loop has yet to hear of it
        serial.unsubscribe(50)
        serial.subscribe(50, answer(b"fourth"))
        await until(lambda: a.subscribers(50))
        assert await a.request(50, b"") == b"fourth"


async def test_a_subscription_while_it_closes_leaves_nothing(registry_url: str) -> None:
    async with pair(registry_url) as (_, b, serial):
        await serial.start()
        done = threading.Event()
        serial.call_later(0.0, lambda: (serial.subscribe(50, echo), done.set()))
        assert done.wait(10)
        await serial.close()
        assert 50 not in b._router.handlers()
        b.subscribe(50, echo)


async def test_a_thread_that_cannot_start(
    registry_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async with pair(registry_url) as (_, b, serial):
        serial.subscribe(50, echo)
        # The system has no limit here that a test could reach without harm to others.
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="can't start"):
                await serial.start()
        await asyncio.wait_for(serial.close(), 5)
        assert 50 not in b._router.handlers()


async def test_two_serials_share_on_error(registry_url: str) -> None:
    """It runs on the thread that started last, and then on the one that is left."""
    async with pair(registry_url) as (a, b, serial):
        threads: list[str] = []
        serial.on_error = lambda error, frame: threads.append(threading.current_thread().name)
        a.subscribe(60, lambda ctx: a.unsubscribe(60))
        await serial.start()
        names = []
        async with Serial(b, thread=True) as other:
            for each in (other, serial):
                if each is serial:
                    await other.close()
                    a.subscribe(60, lambda ctx: a.unsubscribe(60))
                ident = await within(each, threading.get_ident)
                names.append(ident)
                serial.on_error = lambda error, frame: threads.append(str(threading.get_ident()))
                await b.wait_subscribed(60, timeout=5)
                b.notify_many(60, [b"", b"refused"])
                await until(lambda: len(threads) == len(names))
        assert threads == [str(ident) for ident in names]


async def test_a_third_thread_may_not(registry_url: str) -> None:
    async with pair(registry_url) as (_, b, serial):
        b.subscribe(60, echo)
        await serial.start()
        for work in (
            lambda: serial.notify(60, b""),
            lambda: serial.request(60, b""),
            lambda: serial.subscribe(51, echo),
            lambda: serial.call_later(0.0, print),
            lambda: serial.every(1.0, print),
            lambda: serial.unsubscribe_group([60]),
        ):
            with pytest.raises(DomiError, match="another thread"):
                await asyncio.get_running_loop().run_in_executor(None, work)
        with pytest.raises(DomiError, match="another thread"):
            await within(serial, lambda: b.notify(60, b""))


async def test_two_threads_of_one_node(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        seen: list[tuple[bytes, int]] = []

        def see(ctx: Context) -> None:
            seen.append((ctx.data, threading.get_ident()))
            if len(ctx.data) < 6:
                (one if ctx.channel == 50 else other).notify(101 - ctx.channel, ctx.data + b".")

        async with Serial(a, thread=True) as one, Serial(a, thread=True) as other:
            one.subscribe(50, see)
            other.subscribe(51, see)
            await a.wait_subscribed(51, timeout=5)
            idents = [await within(each, threading.get_ident) for each in (one, other)]
            assert len({*idents, threading.get_ident()}) == 3
            a.notify(50, b"")
            await until(lambda: len(seen) == 7)
            assert seen == [(b"." * count, idents[count % 2]) for count in range(7)]


async def test_what_ends_the_loop_ends_it_from_there_too(registry_url: str) -> None:
    """And the thread lives on, for an orderly close."""
    script = """
import sys
from domi_fast import Node, Serial, run
node = Node("a", registry="memory://x")
serial = Serial(node, thread=True)
@serial.subscribe(50)
def handler(ctx):
    if ctx.data == b"1":
        sys.exit(7)
    print("after", flush=True)
    ctx.reply(b"")
serial.call_later(0.01, lambda: serial.notify_many(50, [b"1", b"2"]))
run(node, serial)
"""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, out) == (7, b"after\n"), err.decode()


async def test_a_program_that_does_not_close_it_ends_all_the_same() -> None:
    script = """
import asyncio
from domi_fast import Node, Serial
async def main():
    node = Node("a", registry="memory://x")
    await node.start()
    serial = Serial(node, thread=True)
    await serial.start()
    serial.every(0.001, lambda: None)
    await asyncio.sleep(0.05)
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, cwd=ROOT, stderr=subprocess.PIPE
    )
    _, err = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 0, err.decode()


async def test_close_waits_for_the_handler_that_runs(registry_url: str) -> None:
    async with pair(registry_url) as (a, _, serial):
        gate = threading.Event()
        ran: list[bytes] = []

        def wait(ctx: Context) -> None:
            assert gate.wait(10)
            ran.append(ctx.data)
            ctx.reply(ctx.data)

        serial.subscribe(50, wait)
        await serial.start()
        await a.wait_subscribed(50, timeout=5)
        requests = [a.request(50, b"%d" % number) for number in range(3)]
        await until(lambda: serial.backlog == 2)
        closing = asyncio.ensure_future(serial.close())
        await until(lambda: not a.subscribers(50))
        assert not closing.done()
        gate.set()
        await closing
        assert ran == [b"0", b"1", b"2"]
        # What it has answered last went out, too.
        assert await asyncio.gather(*requests) == ran
        assert not [each for each in threading.enumerate() if each.name == "serial-b"]


async def test_after_the_close(registry_url: str) -> None:
    async with pair(registry_url) as (_, b, serial):
        b.subscribe(60, echo)
        await serial.start()
        request = await within(serial, lambda: serial.request(60, b""))
        await serial.close()
        with pytest.raises(DomiError, match="closed"):
            serial.call_later(0.0, print)
        with pytest.raises(DomiError, match="closed"):
            serial.subscribe(51, echo)
        # The loop's own verbs are the node's, and go on.
        assert await serial.request(60, b"x") == b"x"
        assert request.result(5) == b""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
async def test_a_forked_child_hears_that_it_has_no_thread(registry_url: str) -> None:
    async with pair(registry_url) as (_, b, serial):
        b.subscribe(60, echo)
        await serial.start()

        def fork() -> int:
            child = os.fork()
            if child == 0:
                try:
                    serial.notify(60, b"")
                    os._exit(1)
                except DomiError as error:
                    os._exit(0 if "forked" in str(error) else 2)
            return os.waitpid(child, 0)[1]

        assert await within(serial, fork) == 0


async def test_busy_polling_still_runs_everything(registry_url: str) -> None:
    async with pair(registry_url, busy_poll=0.05) as (a, b, serial):
        fired: list[float] = []
        serial.subscribe(50, echo)
        b.subscribe(60, echo)
        with warnings.catch_warnings():
            # Whether the machine has processors enough is not what this is about.
            warnings.simplefilter("ignore", RuntimeWarning)
            await serial.start()
        await a.wait_subscribed(60, timeout=5)
        began = time.monotonic()
        serial.call_later(0.02, lambda: fired.append(time.monotonic() - began))
        for number in range(300):
            assert await a.request(50, b"%d" % number) == b"%d" % number
            assert await a.request(60, b"%d" % number) == b"%d" % number
        await until(lambda: fired)
        assert 0.02 <= fired[0] < 0.2 * slowness()
        await asyncio.sleep(0.1)  # it sleeps by now
        assert await a.request(50, b"x") == b"x"
