"""Serial mode: handlers and timers run one at a time, each in its turn."""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from typing import Any

import pytest

from domi_fast import (
    Context,
    Node,
    RemoteError,
    Serial,
)
from tests.serial.modes import MODE, pair
from tests.support import echo, until, until_now

pytestmark = pytest.mark.usefixtures("mode")


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


@pytest.mark.parametrize("in_lists", [False, True])
async def test_a_full_ring_delays_no_timer_by_more_than_its_budget(
    registry_url: str, in_lists: bool
) -> None:
    """While a timer is due, no more handlers begin than the budget has time for, and one more.

    They are counted, since a machine that stops for a while makes the timer late, too.
    """
    async with pair(registry_url, drain_budget=0.004, tick=0.0001) as (a, _, serial):
        begun: list[float] = []
        beats: list[tuple[float, float]] = []
        due = 0.0
        messages = 400 * 256 if in_lists else 400
        left = messages

        def handler(came: Context | list[Context]) -> None:
            nonlocal left
            left -= len(came) if isinstance(came, list) else 1
            begun.append(time.monotonic())
            time.sleep(0.001)

        serial.subscribe(50, handler, batch=in_lists)
        await serial.start()
        await a.wait_subscribed(50, timeout=5)

        def beat() -> None:
            nonlocal due
            beats.append((due, time.monotonic()))
            due = time.monotonic() + 0.01
            serial.call_later(0.01, beat)

        a.notify_many(50, [b""] * messages)
        await until(lambda: begun)
        due = time.monotonic() + 0.01
        serial.call_later(0.01, beat)
        await until(lambda: left == 0, 20)
        within = [(when, fired) for when, fired in beats if fired < begun[-1]]
        assert len(within) >= 10
        for when, fired in within:
            before = [start for start in begun if when < start < fired]
            assert len(before) <= 4 + 1, (when, fired, before)


async def test_lists_keep_their_order(registry_url: str) -> None:
    """Whether a message has gone through the ring or not, and beside handlers of one each."""
    async with pair(registry_url, drain_budget=0.0005) as (a, _, serial):
        listed: list[bytes] = []
        singles: list[bytes] = []
        lengths: list[int] = []

        def handler(contexts: list[Context]) -> None:
            listed.extend(ctx.data for ctx in contexts)
            lengths.append(len(contexts))
            if len(lengths) % 3 == 0:
                time.sleep(0.001)

        serial.subscribe(50, handler, batch=True)
        serial.subscribe(51, lambda ctx: singles.append(ctx.data))
        await serial.start()
        await a.wait_subscribed(51, timeout=5)
        sent = [b"%d" % number for number in range(5000)]
        for number in range(0, 5000, 500):
            a.notify_many(50, sent[number : number + 400])
            for data in sent[number + 400 : number + 500]:
                a.notify(50, data)
                a.notify(51, data)
        await until(lambda: len(listed) == 5000 and len(singles) == 1000)
        assert listed == sent
        assert singles == [each for each in sent if int(each) % 500 >= 400]
        assert max(lengths) <= 256


async def test_what_a_handler_of_lists_keeps_stays_as_it_was(registry_url: str) -> None:
    """What comes next is shown in contexts and in a list that nobody has."""
    async with pair(registry_url) as (a, _, serial):
        # Some are too large for a context itself.
        sent = [b"%d" % number * (30 if number % 7 == 0 else 1) for number in range(4000)]
        count = lists = 0
        kept: list[tuple[list[Context], list[bytes]]] = []
        wrong: list[tuple[int, list[bytes]]] = []

        def handler(contexts: list[Context]) -> None:
            nonlocal count, lists
            expected = sent[count : count + len(contexts)]
            count += len(contexts)
            lists += 1
            if lists % 6 == 0:
                kept.append((contexts, expected))
            elif lists % 6 == 1:
                kept.append((contexts[1::2], expected[1::2]))
            elif [context.data for context in contexts] != expected:
                wrong.append((lists, expected))
            elif lists % 6 == 2:
                contexts.clear()
            elif lists % 6 == 3:
                contexts[:] = contexts[:1] * 3
            elif lists % 6 == 4:
                contexts[:1] = [object()]  # type: ignore[list-item]

        serial.subscribe(50, handler, batch=True)
        await serial.start()
        await a.wait_subscribed(50, timeout=5)
        for number in range(0, len(sent), 100):
            a.notify_many(50, sent[number : number + 100])
            await until(lambda number=number: count == number + 100)  # type: ignore[misc]
        assert lists >= 40
        assert not wrong
        for contexts, expected in kept:
            assert [context.data for context in contexts] == expected


async def test_a_slow_list_makes_no_other_too_long(registry_url: str) -> None:
    async with pair(registry_url) as (a, _, serial):
        lengths: list[int] = []
        slow = range(60, 80)
        for channel in slow:
            serial.subscribe(channel, lambda _: time.sleep(0.001), batch=True)
        serial.subscribe(50, lambda contexts: lengths.append(len(contexts)), batch=True)
        await serial.start()
        await a.wait_subscribed(50, timeout=5)
        for channel in slow:
            a.notify(channel, b"")
        a.notify_many(50, [b""] * 10_000)
        await until(lambda: sum(lengths) == 10_000)
        assert max(lengths) <= 256


async def test_lists_and_single_messages_share_the_budget(registry_url: str) -> None:
    """A timer that is due waits for one budget, and not for one of each."""
    async with pair(registry_url, drain_budget=0.01, tick=0.0001) as (a, _, serial):
        begun: list[float] = []
        times: dict[str, float] = {}

        def work(_: object) -> None:
            if not times:
                times["due"] = time.monotonic() + 0.0005
                serial.call_later(0.0005, lambda: times.update(fired=time.monotonic()))
            begun.append(time.monotonic())
            time.sleep(0.002)

        lists = range(60, 70)
        for channel in lists:
            serial.subscribe(channel, work, batch=True)
        serial.subscribe(50, work)
        await serial.start()
        await a.wait_subscribed(50, timeout=5)
        for singles in (4, 12):
            begun.clear()
            times.clear()
            for channel in lists:
                a.notify(channel, b"")
            for _ in range(singles):
                a.notify(50, b"")
            await until(lambda singles=singles: len(begun) == singles + 10)  # type: ignore[misc]
            await until(lambda: "fired" in times)
            late = [at for at in begun if times["due"] + 0.01 < at < times["fired"]]
            assert len(late) <= 1, (singles, late, times)


@pytest.mark.parametrize("apart", [0.0, 0.001])
async def test_a_storm_of_timers_does_not_stop_the_ring(registry_url: str, apart: float) -> None:
    """Whether they are due at the same moment, or a tick of the wheel apart."""
    budgets = {"drain_budget": 0.001, "timer_budget": 0.002}
    async with pair(registry_url, **budgets) as (a, _, serial):
        order: list[str] = []

        def timer() -> None:
            order.append("timer")
            time.sleep(0.001)

        def handler(_: Context) -> None:
            if not order:
                if MODE["thread"]:
                    # From now on the ring is never empty, however slowly the loop's thread runs.
                    until_now(lambda: serial.backlog == 999)
                for number in range(100):
                    serial.call_later(number * apart, timer)
                if apart:
                    time.sleep(100 * apart)
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


async def test_the_time_of_timers_begins_with_the_start(registry_url: str) -> None:
    """Those that were set before it fire as long after it, and their beats miss nothing."""
    async with pair(registry_url) as (_, _b, serial):
        fired: list[float] = []
        missed: list[int] = []
        cancelled = serial.call_later(0.0, lambda: fired.append(0.0))
        once = serial.call_later(0.05, lambda: fired.append(time.monotonic()))
        beat = serial.every(0.05, lambda: missed.append(beat.missed))
        assert cancelled.cancel()
        await asyncio.sleep(0.2)  # so long does something else take
        assert once.active
        began = time.monotonic()
        await serial.start()
        await until(lambda: fired and missed)
        assert fired[0] - began >= 0.05
        # Had it counted from when it was set, it would have left out three.
        assert missed[0] < 3 or fired[0] - began > 0.15
        assert beat.active


async def test_a_timer_that_would_not_run_is_refused(registry_url: str) -> None:
    async with pair(registry_url) as (_, b, serial):

        async def later() -> None:
            pass

        for add in (serial.call_later, serial.every):
            with pytest.raises(TypeError, match="async def or a generator"):
                add(0.01, later)
        await serial.start()
        serial.call_later(0.0, functools.partial(later))
        await until(lambda: b.counters()["timer_errors"] == 1)


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
