"""Serial mode: channels, races and joins."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from domi_fast import (
    Context,
    DomiError,
    JoinContext,
    Node,
    NoSubscriber,
    Overloaded,
    RemoteError,
    Serial,
)
from tests.serial.modes import data, pair
from tests.support import echo, until

pytestmark = pytest.mark.usefixtures("mode")


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
        (60, print, TypeError, "a sequence of channels is wanted"),
        ([60], 5, TypeError, "not callable"),
        ([59, 60], print, DomiError, r"59 has a handler already: unsubscribe\(59\) of its Serial"),
        ([60, 58], print, DomiError, r"58 has a handler already: unsubscribe\(58\) first"),
        ([60, 57], print, DomiError, r"already: unsubscribe_group\(\[56, 57\]\) of its Serial"),
    ],
)
async def test_subscriptions_that_cannot_be(
    registry_url: str, channels: list[Any], handler: Any, error: type[Exception], text: str
) -> None:
    async with pair(registry_url) as (_, b, serial):
        b.subscribe(58, print)
        serial.subscribe(59, print)
        serial.subscribe_race([56, 57], print)
        for subscribe in (serial.subscribe_race, serial.subscribe_all):
            with pytest.raises(error, match=text):
                subscribe(channels, handler)
        await serial.start()
        assert set(b._router.handlers()) == {56, 57, 58, 59}


async def test_a_join_has_an_order(registry_url: str) -> None:
    async with pair(registry_url) as (_, _b, serial):
        for unordered in ({60, 61}, frozenset({60, 61})):
            with pytest.raises(TypeError, match="a set has no order"):
                serial.subscribe_all(unordered, print)
            serial.subscribe_race(unordered, print)
            serial.unsubscribe_group(unordered)


async def test_the_node_leaves_the_channels_of_serial_mode_alone(registry_url: str) -> None:
    """A join that had lost one of its channels would wait for ever."""
    async with pair(registry_url) as (a, b, serial):
        joins: list[list[bytes]] = []
        serial.subscribe_all([60, 61], lambda joined: joins.append(data(joined)))
        await serial.start()
        with pytest.raises(DomiError, match="61 was subscribed by a Serial: unsubscribe it there"):
            b.unsubscribe(61)
        with pytest.raises(DomiError, match=r"unsubscribe_group\(\[60, 61\]\) of its Serial"):
            b.subscribe(61, print)
        await a.wait_subscribed(61, timeout=5)
        a.notify(60, b"x")
        a.notify(61, b"y")
        await until(lambda: joins == [[b"x", b"y"]])
        serial.unsubscribe_group([60, 61])
        await until(lambda: not b._router.handlers())
        b.subscribe(61, print)


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
        # With such a budget each message has a turn of the loop, and a debug build has long ones.
        await until(lambda: len(raced) == 2 * count and len(joined) == count, 30.0)
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
