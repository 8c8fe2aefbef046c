"""Serial mode: handlers and timers that run one at a time, in their turn."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import itertools
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from domi_fast import (
    Context,
    DomiError,
    JoinContext,
    Master,
    Node,
    NoSubscriber,
    Overloaded,
    RemoteError,
    Serial,
)
from tests.support import RawPeer, echo, forget_records, nodes, until

MODE = {"thread": False}


@pytest.fixture(autouse=True, params=[False, True], ids=["loop", "thread"])
def mode(request: pytest.FixtureRequest) -> None:
    """Every test with handlers on the node's loop, and on a thread of their own."""
    MODE["thread"] = request.param


def make_serial(node: Node, **settings: Any) -> Serial:
    return Serial(node, **{**MODE, **settings})


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


@asynccontextmanager
async def pair(url: str, **settings: Any) -> AsyncIterator[tuple[Node, Node, Serial]]:
    """Two nodes, and serial mode at the second, which has not started."""
    async with nodes(url, "a", "b") as (a, b):
        serial = make_serial(b, **settings)
        try:
            yield a, b, serial
        finally:
            await serial.close()


def data(joined: JoinContext) -> list[bytes]:
    return [context.data for context in joined.requests]


# ------------------------------------------------------------------------------------ subscriptions


async def test_what_a_handler_gets_and_answers(registry_url: str) -> None:
    async with pair(registry_url) as (a, b, serial):
        seen: list[tuple[int, int, bytes]] = []
        a.subscribe(60, lambda ctx: seen.append((ctx.channel, ctx.sender, ctx.data)))

        @serial.subscribe(50)
        def handler(ctx: Context) -> None:
            seen.append((ctx.channel, ctx.sender, ctx.data))

        serial.subscribe(51, echo)
        serial.subscribe(52, lambda ctx: ctx.next(ctx.data + b"+"))
        await serial.start()
        await a.wait_subscribed(52, timeout=5)
        a.notify(50, b"notified")
        assert a.publish(50, b"published") == 1
        assert await a.request(51, b"requested") == b"requested"
        a.call(51, b"called", 60)
        a.ventilator([52, 50], b"piped")
        await until(lambda: len(seen) == 4)
        assert sorted(seen) == sorted(
            [
                (50, a.id, b"notified"),
                (50, a.id, b"published"),
                (60, b.id, b"called"),
                (50, b.id, b"piped+"),
            ]
        )


@pytest.mark.parametrize("size", [0, 1, 40, 1000, 20_000, 65_535, 65_536, 65_537, 1_000_000])
@pytest.mark.parametrize("ring_size", [4096, 2**21])
async def test_messages_of_every_size(registry_url: str, size: int, ring_size: int) -> None:
    """None is too large for the ring, and all keep their order."""
    async with pair(registry_url, ring_size=ring_size) as (a, _, serial):
        seen: list[bytes] = []
        serial.subscribe(50, echo)
        serial.subscribe(51, lambda ctx: seen.append(ctx.data))
        await serial.start()
        await a.wait_subscribed(51, timeout=5)
        message = bytes(range(256)) * (size // 256) + bytes(size % 256)
        assert await a.request(50, message) == message
        sent = [b"before", message, b"between", message, b"after"]
        for each in sent:
            a.notify(51, each)
        await until(lambda: len(seen) == 5)
        assert seen == sent


async def test_messages_that_are_kept_stay_as_they_were(registry_url: str) -> None:
    async with pair(registry_url) as (a, _, serial):
        kept: list[Context] = []
        serial.subscribe(50, lambda ctx: kept.append(ctx) if len(ctx.data) % 2 else None)
        serial.subscribe(51, echo)
        await serial.start()
        await a.wait_subscribed(51, timeout=5)
        for size in range(200):
            a.notify(50, bytes([size]) * size)
        await a.request(51, b"")
        assert [ctx.data for ctx in kept] == [bytes([size]) * size for size in range(1, 200, 2)]


async def test_a_race_gets_every_message_of_its_channels(registry_url: str) -> None:
    async with pair(registry_url) as (a, _, serial):
        seen: list[tuple[int, bytes]] = []

        @serial.subscribe_race([1201, 1202, 1203])
        def handler(ctx: Context) -> None:
            seen.append((ctx.channel, ctx.data))

        await serial.start()
        await a.wait_subscribed(1203, timeout=5)
        sent = [(1201 + number % 3, b"%d" % number) for number in range(300)]
        for channel, message in sent:
            a.notify(channel, message)
        await until(lambda: len(seen) == 300)
        assert seen == sent  # one sender's, in one ring


async def test_a_join_gets_one_message_of_each_channel(registry_url: str) -> None:
    """In the order in which the channels were given, and each channel first in, first out."""
    async with pair(registry_url) as (a, _, serial):
        joined: list[JoinContext] = []
        serial.subscribe_all([1203, 1201, 1202], joined.append)
        serial.subscribe(50, echo)
        await serial.start()
        await a.wait_subscribed(1202, timeout=5)
        for channel, count in ((1202, 5), (1201, 3), (1203, 4)):
            for number in range(count):
                a.notify(channel, b"%d.%d" % (channel, number))
        await a.request(50, b"")
        assert [join.channels for join in joined] == [(1203, 1201, 1202)] * 3
        assert [data(join) for join in joined] == [
            [b"1203.%d" % number, b"1201.%d" % number, b"1202.%d" % number] for number in range(3)
        ]
        assert {ctx.sender for join in joined for ctx in join.requests} == {a.id}
        assert serial.waiting == 3
        assert "1203" in repr(joined[0])
        with pytest.raises(AttributeError):
            joined[0].channels = ()  # type: ignore[misc]


async def test_each_message_of_a_join_is_answered_by_itself(registry_url: str) -> None:
    async with pair(registry_url) as (a, _, serial):

        @serial.subscribe_all([60, 61, 62])
        def handler(joined: JoinContext) -> None:
            joined.requests[0].reply(b"first")
            joined.requests[1].error("second")

        await serial.start()
        await a.wait_subscribed(62, timeout=5)
        asked = [a.request(channel, b"") for channel in (60, 61, 62)]
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert outcomes[0] == b"first"
        assert isinstance(outcomes[1], RemoteError)
        assert outcomes[1].message == "second"
        assert isinstance(outcomes[2], RemoteError)
        assert outcomes[2].type == "NoAnswer"


async def test_a_join_whose_handler_raises(registry_url: str) -> None:
    async with pair(registry_url) as (a, b, serial):

        @serial.subscribe_all([60, 61])
        def handler(joined: JoinContext) -> None:
            joined.requests[0].reply(b"in time")
            raise LookupError("inside")

        await serial.start()
        await a.wait_subscribed(61, timeout=5)
        for _ in range(2):
            asked = [a.request(channel, b"") for channel in (60, 61)]
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
            assert outcomes[0] == b"in time"
            assert isinstance(outcomes[1], RemoteError)
            assert (outcomes[1].type, outcomes[1].message) == ("LookupError", "inside")
        assert b.counters()["handler_errors"] == 2


async def test_a_channel_of_a_join_holds_so_many(registry_url: str) -> None:
    """The newest is refused and counted; a request among them gets Overloaded."""
    async with pair(registry_url, max_pending=5) as (a, b, serial):
        joined: list[JoinContext] = []
        serial.subscribe_all([60, 61], joined.append)
        serial.subscribe(50, echo)
        await serial.start()
        await a.wait_subscribed(61, timeout=5)
        for number in range(8):
            a.notify(60, b"%d" % number)
        with pytest.raises(Overloaded, match="5 messages of channel 60 wait"):
            await a.request(60, b"8")
        assert b.counters()["joins_overloaded"] == 4
        assert serial.waiting == 5
        for number in range(7):
            a.notify(61, b"%d" % number)
        await a.request(50, b"")
        assert [data(join) for join in joined] == [[b"%d" % n, b"%d" % n] for n in range(5)]
        a.notify(60, b"9")
        await a.request(50, b"")
        assert data(joined[-1]) == [b"9", b"5"]
        assert b.counters()["joins_overloaded"] == 4


async def test_races_and_joins_are_made_before_the_start(registry_url: str) -> None:
    async with pair(registry_url) as (_, _, serial):
        await serial.start()
        with pytest.raises(DomiError, match=r"subscribe_all\(\) after the start"):
            serial.subscribe_all([60, 61], print)
        with pytest.raises(DomiError, match=r"subscribe_race\(\) after the start"):
            serial.subscribe_race([60, 61], print)
        serial.subscribe(60, print)


async def test_a_subscription_while_it_runs(registry_url: str) -> None:
    async with pair(registry_url) as (a, _, serial):
        await serial.start()
        serial.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        assert await a.request(50, b"x") == b"x"


@pytest.mark.parametrize(
    ("channels", "handler", "error", "text"),
    [
        ([], print, ValueError, "at least one"),
        ([60, 60], print, ValueError, "there twice"),
        ([49], print, ValueError, "50-65499"),
        (["60"], print, TypeError, "a channel is an int"),
        (60, print, TypeError, "an iterable of channels is wanted"),
        ([60], 5, TypeError, "not callable"),
        ([59, 60], print, DomiError, "channel 59 has a handler already"),
        ([60, 58], print, DomiError, "channel 58 has a handler already"),
    ],
)
async def test_subscriptions_that_cannot_be(
    registry_url: str, channels: list[Any], handler: Any, error: type[Exception], text: str
) -> None:
    async with pair(registry_url) as (_, b, serial):
        b.subscribe(58, print)
        serial.subscribe(59, print)
        for subscribe in (serial.subscribe_race, serial.subscribe_all):
            with pytest.raises(error, match=text):
                subscribe(channels, handler)
        await serial.start()
        assert set(b._router.handlers()) == {58, 59}


async def test_a_handler_that_would_not_end_before_the_next_begins() -> None:
    async def handler(ctx: Context) -> None:
        pass

    class Callable:
        async def __call__(self, ctx: Context) -> None:
            pass

    def generator(ctx: Context) -> Iterator[None]:
        yield

    serial = Serial(Node("a", registry="memory://unused"))
    for each in (handler, Callable()):
        with pytest.raises(TypeError, match="is an async def: one handler at a time"):
            serial.subscribe(50, each)
    with pytest.raises(TypeError, match="a generator"):
        serial.subscribe(50, generator)


async def test_a_handler_of_the_node_stands_in_the_way(registry_url: str) -> None:
    """All of the channels are subscribed at the start, or none."""
    async with pair(registry_url) as (a, b, serial):
        serial.subscribe(50, print)
        serial.subscribe(51, print)
        b.subscribe(51, echo)
        with pytest.raises(DomiError, match="channel 51 has a handler already"):
            await serial.start()
        assert set(b._router.handlers()) == {51}
        await a.wait_subscribed(51, timeout=5)
        assert await a.request(51, b"x") == b"x"


async def test_unsubscribe(registry_url: str) -> None:
    async with pair(registry_url) as (a, _, serial):
        serial.subscribe(50, echo)
        serial.subscribe(51, echo)
        serial.subscribe_all([60, 61, 62], print)
        await serial.start()
        await a.wait_subscribed(62, timeout=5)
        waiting = a.request(61, b"")
        a.notify(62, b"")
        await until(lambda: serial.waiting == 2)
        for wrong in ([60, 61], [60, 61, 62, 50], [60]):
            with pytest.raises(DomiError, match="which go together"):
                serial.unsubscribe_group(wrong)
        with pytest.raises(DomiError, match="which go together"):
            serial.unsubscribe(60)
        with pytest.raises(DomiError, match="no handler here"):
            serial.unsubscribe(99)
        serial.unsubscribe_group([62, 60, 61])
        with pytest.raises(NoSubscriber):
            await waiting
        assert serial.waiting == 0
        serial.unsubscribe(50)
        await until(lambda: not a.subscribers(50) and not a.subscribers(61))
        assert await a.request(51, b"x") == b"x"
        serial.subscribe(61, echo)
        await a.wait_subscribed(61, timeout=5)
        assert await a.request(61, b"again") == b"again"


async def test_unsubscribing_under_load_loses_nothing_of_the_others(registry_url: str) -> None:
    """From a handler, with messages for all of them in the ring."""
    async with pair(registry_url, drain_budget=0.00001) as (a, b, serial):
        raced: list[int] = []
        joined: list[tuple[int, int]] = []
        lost: list[int] = []

        def race(ctx: Context) -> None:
            raced.append(int(ctx.data))

        def join(join: JoinContext) -> None:
            first, second = (int(each) for each in data(join))
            joined.append((first, second))

        def victim(join: JoinContext) -> None:
            lost.append(int(join.requests[0].data))
            if len(lost) == 100:
                serial.unsubscribe_group([71, 70])

        serial.subscribe_race([50, 51], race)
        serial.subscribe_all([60, 61], join)
        serial.subscribe_all([70, 71], victim)
        await serial.start()
        await a.wait_subscribed(71, timeout=5)
        count = 3000
        with_victim = 0
        for number in range(count):
            for channel in (50, 60, 61, 51):
                a.notify(channel, b"%d" % number)
            if a.subscribers(70):
                with_victim += 1
                a.notify(70, b"%d" % number)
                a.notify(71, b"%d" % number)
            if number % 50 == 0:
                await asyncio.sleep(0)
        await until(lambda: len(raced) == 2 * count and len(joined) == count)
        assert raced == [number for number in range(count) for _ in range(2)]
        assert joined == [(number, number) for number in range(count)]
        assert lost == list(range(100))
        await until(lambda: serial.backlog == 0)
        dropped = 2 * (with_victim - 100)
        await until(lambda: b.counters()["dropped_no_subscriber"] >= dropped)
        assert b.counters()["dropped_no_subscriber"] == dropped


async def test_watch_channel(registry_url: str) -> None:
    async with pair(registry_url) as (a, b, serial):
        serial.subscribe(51, echo)
        await serial.start()
        async with serial.watch_channel(50, maxsize=2) as messages:
            await a.wait_subscribed(50, timeout=5)
            for number in range(4):
                a.notify(50, b"%d" % number)
            await a.request(51, b"")
            assert len(messages) == 2
            assert [(await messages.__anext__()).data for _ in range(2)] == [b"0", b"1"]
            assert b.counters()["handlers_overloaded"] == 2
        assert 50 not in b._router.handlers()
        iterated: list[bytes] = []

        async def iterate() -> None:
            async with serial.watch_channel(50) as messages:
                iterated.extend([ctx.data async for ctx in messages])

        task = asyncio.ensure_future(iterate())
        await a.wait_subscribed(50, timeout=5)
        a.notify(50, b"last")
        await a.request(51, b"")
        await serial.close()
        await asyncio.wait_for(task, 5)
        assert iterated == [b"last"]


# ----------------------------------------------------------------------------------------- its turn


async def test_one_handler_at_a_time(registry_url: str) -> None:
    """What a handler sends to its own node waits until it has ended, and so does a timer."""
    async with pair(registry_url) as (_, b, serial):
        running = 0
        order: list[str] = []

        def enter(name: str) -> None:
            nonlocal running
            running += 1
            assert running == 1
            order.append(name)

        def first(_: Context) -> None:
            nonlocal running
            enter("first")
            serial.notify(51, b"")
            serial.call_later(0.0, timer)
            time.sleep(0.01)
            running -= 1

        def second(_: Context) -> None:
            nonlocal running
            enter("second")
            running -= 1

        def timer() -> None:
            nonlocal running
            enter("timer")
            running -= 1

        serial.subscribe(50, first)
        serial.subscribe(51, second)
        await serial.start()
        b.notify(50, b"")
        await until(lambda: len(order) == 3)
        assert order[0] == "first"
        assert sorted(order[1:]) == ["second", "timer"]


async def test_a_handler_that_raises_hurts_nobody_else(registry_url: str) -> None:
    async with pair(registry_url) as (a, b, serial):

        def fail(ctx: Context) -> None:
            raise LookupError("inside")

        serial.subscribe(50, fail)
        serial.subscribe(51, echo)
        await serial.start()
        await a.wait_subscribed(51, timeout=5)
        for _ in range(3):
            failed, fine = a.request(50, b""), a.request(51, b"x")
            with pytest.raises(RemoteError, match="LookupError: inside"):
                await failed
            assert await fine == b"x"
        assert b.counters()["handler_errors"] == 3


async def test_a_full_ring_delays_no_timer_by_more_than_its_budget(registry_url: str) -> None:
    """From the moment that a timer is due, one handler begins at most once the budget is used."""
    async with pair(registry_url, drain_budget=0.004, tick=0.0001) as (a, _, serial):
        begun: list[float] = []
        beats: list[tuple[float, float]] = []
        due = 0.0

        def handler(_: Context) -> None:
            begun.append(time.monotonic())
            time.sleep(0.001)

        serial.subscribe(50, handler)
        await serial.start()
        await a.wait_subscribed(50, timeout=5)

        def beat() -> None:
            nonlocal due
            beats.append((due, time.monotonic()))
            due = time.monotonic() + 0.01
            serial.call_later(0.01, beat)

        for _ in range(400):
            a.notify(50, b"")
        await until(lambda: begun)
        due = time.monotonic() + 0.01
        serial.call_later(0.01, beat)
        await until(lambda: len(begun) == 400, 20)
        within = [(when, fired) for when, fired in beats if fired < begun[-1]]
        assert len(within) >= 10
        for when, fired in within:
            late = [start for start in begun if when + 0.004 < start < fired]
            assert len(late) <= 1, (when, fired, late)


async def test_a_storm_of_timers_does_not_stop_the_ring(registry_url: str) -> None:
    budgets = {"drain_budget": 0.001, "timer_budget": 0.002}
    async with pair(registry_url, **budgets) as (a, _, serial):
        order: list[str] = []

        def timer() -> None:
            order.append("timer")
            time.sleep(0.001)

        def handler(_: Context) -> None:
            if not order:
                for _ in range(100):
                    serial.call_later(0.0, timer)
            order.append("message")
            time.sleep(0.0002)

        serial.subscribe(50, handler)
        await serial.start()
        await a.wait_subscribed(50, timeout=5)
        for _ in range(1000):
            a.notify(50, b"")
        await until(lambda: len(order) == 1100, 20)
        runs = [(name, len(list(run))) for name, run in itertools.groupby(order)]
        # A timer takes a millisecond, so two begin in two; a message a fifth.
        assert max(count for name, count in runs if name == "timer") <= 2, runs
        assert sum(name == "timer" for name, _ in runs) >= 50
        assert max(count for name, count in runs[:-1] if name == "message") <= 6, runs


async def test_timers(registry_url: str) -> None:
    async with pair(registry_url, tick=0.00001) as (_, _, serial):
        fired: list[str] = []
        serial.call_later(0.02, lambda: fired.append("before the start"))
        cancelled = serial.call_later(0.01, lambda: fired.append("cancelled"))
        await serial.start()
        assert cancelled.cancel()
        begun = time.monotonic()
        times: list[float] = []
        beat = serial.every(0.002, lambda: times.append(time.monotonic() - begun))
        await until(lambda: len(times) >= 20 and fired)
        beat.cancel()
        count = len(times)
        assert fired == ["before the start"]
        for number, at in enumerate(times, 1):
            assert at >= number * 0.002 - 1e-5
        await asyncio.sleep(0.01)
        assert len(times) == count


@pytest.mark.parametrize("delay", [float("nan"), 1.1e9, float("inf")])
async def test_a_delay_that_is_not_allowed(delay: float) -> None:
    serial = Serial(Node("a", registry="memory://unused"))
    with pytest.raises(ValueError, match="up to 1e9 s is allowed"):
        serial.call_later(delay, print)


async def test_a_timer_may_be_finer_than_a_millisecond(registry_url: str) -> None:
    """A loop's own timers may not: a quarter of a millisecond would become one, or none."""
    async with pair(registry_url, tick=0.00001) as (_, _, serial):
        await serial.start()
        done: list[int] = []
        begun = time.monotonic()
        beat = serial.every(0.00025, lambda: done.append(beat.missed))
        await until(lambda: len(done) + sum(done) >= 400, 10)
        beat.cancel()
        taken = time.monotonic() - begun
        # Beats are never early, and when the machine is free most of them are not missed.
        assert len(done) + sum(done) <= taken / 0.00025 + 1
        assert taken >= 0.0999


async def test_a_timer_that_raises_is_reported_and_others_fire(registry_url: str) -> None:
    problems: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    handler = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: problems.append(context))
    try:
        async with pair(registry_url) as (_, b, serial):
            await serial.start()
            fired: list[int] = []

            def fail() -> None:
                raise LookupError("inside")

            serial.call_later(0.001, fail)
            serial.call_later(0.001, lambda: fired.append(1))
            serial.call_later(0.002, lambda: fired.append(2))
            await until(lambda: fired == [1, 2])
            assert b.counters().get("timer_errors") == 1
    finally:
        loop.set_exception_handler(handler)
    assert not problems


# -------------------------------------------------------------------------------------- a full ring


async def test_a_full_ring_refuses(registry_url: str) -> None:
    """Everything is either run or refused, and the sender hears of each that is refused."""
    async with nodes(registry_url, "a", "b") as (a, b):
        serial = make_serial(b, ring_size=4096, drain_budget=0.00001)
        ran: list[bytes] = []
        refused: list[tuple[type[BaseException], bytes]] = []
        a.on_error = lambda error, frame: refused.append((type(error), frame.data))

        def slow(ctx: Context) -> None:
            ran.append(ctx.data)
            if ctx.data == b"0":
                time.sleep(0.05)

        serial.subscribe(50, slow)
        serial.subscribe(51, echo)
        async with serial:
            await a.wait_subscribed(51, timeout=5)
            for number in range(500):
                a.notify(50, b"%d" % number)
            asked = [a.request(51, b"") for _ in range(10)]
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
            await until(lambda: len(ran) + len(refused) == 500)
            overloaded = sum(isinstance(outcome, Overloaded) for outcome in outcomes)
            assert refused
            assert {kind for kind, _ in refused} == {Overloaded}
            assert sorted([*ran, *(message for _, message in refused)]) == sorted(
                b"%d" % number for number in range(500)
            )
            assert b.counters()["ring_full"] == len(refused) + overloaded
            assert overloaded + outcomes.count(b"") == 10
            assert ran == sorted(ran, key=int)
            assert await a.request(51, b"after") == b"after"


# --------------------------------------------------------------------------------------------- life


async def test_close_runs_what_the_ring_holds(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        serial = make_serial(b, drain_budget=0.00001)
        ran: list[int] = []

        def handler(ctx: Context) -> None:
            ran.append(int(ctx.data))
            time.sleep(0.0001)

        serial.subscribe(50, handler)
        fired: list[int] = []
        await serial.start()
        await a.wait_subscribed(50, timeout=5)
        serial.call_later(60.0, lambda: fired.append(1))
        for number in range(500):
            a.notify(50, b"%d" % number)
        await until(lambda: serial.backlog > 100)
        held = serial.backlog + len(ran)
        await serial.close()
        assert len(ran) >= held
        assert ran == list(range(len(ran)))
        assert serial.backlog == 0
        assert 50 not in b._router.handlers()
        assert not fired
        await serial.close()
        for late in (lambda: serial.call_later(1, print), lambda: serial.every(1, print)):
            with pytest.raises(DomiError, match="closed"):
                late()
        with pytest.raises(DomiError, match="closed"):
            serial.subscribe(51, print)
        for again in (serial.subscribe_race, serial.subscribe_all):
            with pytest.raises(DomiError, match="closed"):
                again([51, 52], print)
        with pytest.raises(DomiError, match="closed"):
            await serial.start()


async def test_close_refuses_what_waits_for_a_join(registry_url: str) -> None:
    async with pair(registry_url) as (a, _, serial):
        serial.subscribe_all([60, 61], print)
        await serial.start()
        await a.wait_subscribed(61, timeout=5)
        waiting = a.request(60, b"")
        await until(lambda: serial.waiting == 1)
        await serial.close()
        with pytest.raises(NoSubscriber):
            await waiting


async def test_close_on_another_loop_or_thread_changes_nothing(registry_url: str) -> None:
    async with pair(registry_url) as (a, _, serial):
        serial.subscribe(50, echo)
        await serial.start()
        await a.wait_subscribed(50, timeout=5)
        with pytest.raises(DomiError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, serial.close())
        assert await a.request(50, b"x") == b"x"
        await serial.close()
        await until(lambda: not a.subscribers(50))


async def test_what_hears_of_a_loss_may_take_channels_off(registry_url: str) -> None:
    """While the closing serial takes its own off, a peer that cannot be told of it is lost."""
    async with nodes(registry_url, "a", "b", queue_limit=65536) as (a, b):
        serial = make_serial(b)
        for channel in (50, 51, 52, 53):
            serial.subscribe(channel, echo)
        await serial.start()
        await a.wait_subscribed(53, timeout=5)
        raw = await RawPeer.plain(b, 900, receive_buffer=4096)
        heard: list[int] = []

        def take_off(error: DomiError, frame: Any) -> None:
            heard.append(frame.channel)
            if len(heard) == 1:
                for channel in (50, 51):
                    with contextlib.suppress(DomiError):
                        serial.unsubscribe(channel)

        b.on_error = take_off
        raw.reset()
        with contextlib.suppress(DomiError):
            for _ in range(1000):
                b._router.notify(40_000, bytes(1000), to=900)
        await serial.close()
        assert set(b._router.handlers()) == set()
        await until(lambda: not a.subscribers(50) and not a.subscribers(53))
        with pytest.raises(NoSubscriber):
            await a.request(51, b"")
        await until(lambda: heard)


async def test_a_coroutine_from_a_plain_handler_is_a_failure(registry_url: str) -> None:
    async def work() -> None:
        pass

    async with pair(registry_url) as (a, b, serial):
        serial.subscribe(50, lambda ctx: work())
        serial.subscribe(51, lambda contexts: work(), batch=True)
        serial.subscribe_all([60, 61], lambda joined: work())
        await serial.start()
        await a.wait_subscribed(61, timeout=5)
        asked = [a.request(channel, b"") for channel in (50, 51, 60, 61)]
        for outcome in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(outcome, RemoteError)
            assert "nobody will await" in outcome.message
        assert b.counters()["handler_errors"] == 3


async def test_a_join_may_say_that_it_is_overloaded(registry_url: str) -> None:
    async with pair(registry_url) as (a, b, serial):

        @serial.subscribe_all([60, 61])
        def handler(joined: JoinContext) -> None:
            raise Overloaded("busy")

        await serial.start()
        await a.wait_subscribed(61, timeout=5)
        asked = [a.request(channel, b"") for channel in (60, 61)]
        for outcome in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(outcome, Overloaded)
        assert b.counters()["handlers_overloaded"] == 1
        assert "handler_errors" not in b.counters()


async def test_who_sent_what_is_taken_off_hears_of_it(registry_url: str) -> None:
    """As if nobody subscribed: what waited in the ring, for a join, or in a list."""
    async with pair(registry_url) as (a, _, serial):
        lost: list[tuple[type[BaseException], int, bytes]] = []
        a.on_error = lambda error, frame: lost.append((type(error), frame.channel, frame.data))
        serial.subscribe_all([60, 61], print)
        serial.subscribe(51, print, batch=True)

        @serial.subscribe(50)
        def off(ctx: Context) -> None:
            serial.unsubscribe(51)
            serial.unsubscribe(52)
            serial.unsubscribe_group([60, 61])
            ctx.reply(b"")

        serial.subscribe(52, print)
        await serial.start()
        await a.wait_subscribed(52, timeout=5)
        a.call(60, b"joined", 70)
        a.notify(51, b"listed")
        asked = a.request(50, b"")
        a.notify(52, bytes(1000))
        await asked
        await until(lambda: len(lost) == 3)
        assert sorted(lost, key=lambda each: each[1]) == [
            (NoSubscriber, 51, b"listed"),
            (NoSubscriber, 52, bytes(1000)),
            (NoSubscriber, 60, b"joined"),
        ]


async def test_close_from_a_handler(registry_url: str) -> None:
    async with pair(registry_url) as (a, _, serial):
        closings: list[concurrent.futures.Future[None]] = []
        ran: list[bytes] = []
        loop = asyncio.get_running_loop()

        def handler(ctx: Context) -> None:
            ran.append(ctx.data)
            closings.append(asyncio.run_coroutine_threadsafe(serial.close(), loop))

        serial.subscribe(50, handler)
        await serial.start()
        await a.wait_subscribed(50, timeout=5)
        a.notify(50, b"1")
        a.notify(50, b"2")
        await until(lambda: closings and all(closing.done() for closing in closings))
        assert ran == [b"1", b"2"]


async def test_it_starts_after_its_node(registry_url: str) -> None:
    node = Node("a", registry=registry_url)
    serial = make_serial(node)
    with pytest.raises(DomiError, match=r"call start\(\) first"):
        await serial.start()
    await node.start()
    try:
        await serial.start()
        with pytest.raises(DomiError, match="has started before"):
            await serial.start()
        await serial.close()
    finally:
        await node.close()


async def test_its_node_closes_first(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        serial = make_serial(b)
        kept: list[Context] = []
        serial.subscribe(50, kept.append)
        serial.subscribe_all([60, 61], print)
        await serial.start()
        await a.wait_subscribed(61, timeout=5)
        a.notify(60, b"waits")
        a.notify(50, b"kept")
        await until(lambda: kept and serial.waiting)
        await b.close()
        await serial.close()
        assert kept[0].data == b"kept"


async def test_two_serials_of_one_node(registry_url: str) -> None:
    async with pair(registry_url) as (a, b, one):
        other = make_serial(b)
        one.subscribe(50, lambda ctx: ctx.reply(b"one"))
        other.subscribe(51, lambda ctx: ctx.reply(b"other"))
        async with one, other:
            await a.wait_subscribed(51, timeout=5)
            answers = [await a.request(50, b""), await a.request(51, b"")]
            assert answers == [b"one", b"other"]
        assert set(b._router.handlers()) == set()


async def test_a_component_of_a_program(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        node = Node("b", registry=registry_url)
        serial = make_serial(node)
        serial.subscribe(50, echo)
        master = Master()
        master.add(node)
        master.add(serial)
        running = asyncio.ensure_future(master.wait())
        await a.wait_subscribed(50, timeout=5)
        assert await a.request(50, b"x") == b"x"
        master.stop()
        await running


async def test_a_serial_that_is_dropped_is_freed(registry_url: str) -> None:
    """Also one that never started, and whose handlers lead back to it."""

    def make(node: Node) -> weakref.ref[Serial]:
        serial = make_serial(node)
        serial.subscribe(50, lambda _: serial.backlog)
        serial.subscribe_all([60, 61], lambda _: serial.waiting)
        return weakref.ref(serial)

    async with nodes(registry_url, "a") as (a,):
        seen = make(a)
        gc.collect()
        assert seen() is None


async def test_the_verbs_are_the_nodes_own(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        serial = Serial(a)
        verbs = ("notify", "publish", "call", "request", "ventilator", "drained", "counters")
        for verb in verbs:
            assert getattr(serial, verb) == getattr(a, verb)
        assert serial.node is a
        errors: list[DomiError] = []
        handler = lambda error, frame: errors.append(error)  # noqa: E731
        serial.on_error = handler
        assert [a.on_error, serial.on_error] == [handler, handler]
