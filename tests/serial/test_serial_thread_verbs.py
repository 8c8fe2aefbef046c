"""Serial mode on a thread of its own: what it sends goes through the loop thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from domi_fast import (
    Context,
    DeadlineExceeded,
    DomiError,
    Frame,
    FrameError,
    NoSubscriber,
    Overloaded,
    PeerLost,
    RemoteError,
    RingFull,
)
from tests.serial.modes import pair, within
from tests.strangers import extended
from tests.support import echo, session, slowness, until

pytestmark = pytest.mark.usefixtures("threaded")


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
            (
                ValueError,
                "timeout nan: seconds, or None",
                lambda: serial.request(60, b"", float("nan")),
            ),
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


@pytest.mark.parametrize("kind", [KeyError, ValueError, None])
async def test_a_policy_that_fails_on_the_loop_is_told_to_on_error(
    registry_url: str, kind: type[Exception] | None
) -> None:
    """Of a request its future says so, and the loop's exception handler hears nothing."""

    class Failing:
        def choose(self, candidates: Any, key: Any) -> Any:
            if kind is not None:
                raise kind("mine")

    unhandled: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, what: unhandled.append(what))
    heard: list[tuple[DomiError, Frame]] = []
    async with pair(registry_url) as (a, b, serial):
        serial.on_error = lambda error, frame: heard.append((error, frame))
        a.subscribe(60, echo)
        serial.subscribe(61, lambda ctx: ctx.next(b"next"))
        await serial.start()
        await b.wait_subscribed(60, timeout=5)
        await a.wait_subscribed(61, timeout=5)
        b.balance(60, Failing())

        def send() -> Any:
            serial.notify(60, b"notify")
            serial.call(60, b"call", 62)
            serial.ventilator([60], b"ventilator")
            serial.notify_many(60, [b"many"])
            return serial.request(60, b"request", timeout=None)

        asked = await within(serial, send)
        told = kind or TypeError
        with pytest.raises(told):
            await asyncio.wait_for(asyncio.wrap_future(asked), 5)
        a.ventilator([61, 60], b"")
        await until(lambda: len(heard) == 5)
        assert [frame for _, frame in heard] == [
            Frame(60, b"notify", b""),
            Frame(60, b"call", b""),
            Frame(60, b"ventilator", b""),
            Frame(60, b"many", b""),
            Frame(61, b"next", b""),
        ]
        for error, _ in heard:
            assert isinstance(error, DomiError)
            assert isinstance(error.__cause__, told)
            assert f"could not be sent: {told.__name__}: " in str(error)
        assert b.counters()["in_flight"] == 0
    assert unhandled == []


async def test_what_is_refused_later_goes_to_on_error(registry_url: str) -> None:
    async with pair(registry_url) as (a, b, serial):
        heard: list[tuple[type, bytes, int]] = []
        serial.on_error = lambda error, frame: heard.append(
            (type(error), frame.data[:1], threading.get_ident())
        )
        a.subscribe(60, lambda ctx: None)
        await serial.start()
        await b.wait_subscribed(60, timeout=5)

        done = threading.Event()

        def flood() -> None:
            for number in range(60):
                serial.notify(60, bytes([number]) + bytes(30_000))
            done.set()

        serial.call_later(0.0, flood)
        assert done.wait(10)  # the loop finds them all at once
        session(b, a.id).close("the test ends it")
        await until(lambda: len(heard) >= 10)
        assert {kind for kind, _, _ in heard} == {NoSubscriber}
        assert {thread for _, _, thread in heard}.isdisjoint({threading.get_ident()})


async def test_on_error_does_not_hear_of_its_own_publishes(registry_url: str) -> None:
    """Nor on the thread, where they are refused after it has returned."""
    async with (
        pair(registry_url, node={"queue_limit": 65_536}) as (_, b, serial),
        extended(b, registry_url, 700, (60, 61)) as deaf,
    ):
        await deaf.settled()
        told: list[bytes] = []

        def again(error: DomiError, frame: Frame) -> None:
            told.append(frame.data[:5])
            if frame.data[:5] == b"later":
                serial.publish(60, b"alarm" + bytes(60_000))
                serial.notify(61, b"fails" + bytes(60_000), to=700)

        await serial.start()
        while b.publish(60, b"first" + bytes(60_000)):
            pass
        serial.on_error = again
        refused = b.counters()["refused_queue_full"]
        await within(serial, lambda: serial.publish(60, b"later" + bytes(60_000)))
        # Of the notify it is told after it would have been of the publish.
        await until(lambda: b"fails" in told)
        assert told == [b"later", b"fails"]
        assert b.counters()["refused_queue_full"] - refused == 3


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
