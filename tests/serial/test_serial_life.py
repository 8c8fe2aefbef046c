"""Serial mode: from its start to its end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import time
import weakref
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
from tests.serial.modes import make_serial, pair
from tests.support import RawPeer, echo, nodes, until

pytestmark = pytest.mark.usefixtures("mode")


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


async def test_a_node_closes_its_serials_first(registry_url: str) -> None:
    """What runs there finishes, and is answered; no timer fires afterwards."""
    async with nodes(registry_url, "a", "b") as (a, b):
        serial = make_serial(b)
        began: list[int] = []

        def slow(ctx: Context) -> None:
            began.append(1)
            time.sleep(0.1)
            ctx.reply(ctx.data)

        serial.subscribe(50, slow)
        await serial.start()
        await a.wait_subscribed(50, timeout=5)
        asked = [a.request(50, b"%d" % number) for number in range(3)]
        await until(lambda: began)
        beat = serial.every(0.001, lambda: None)
        await b.close()
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert outcomes[0] == b"0"
        assert sum(isinstance(outcome, bytes) for outcome in outcomes) == len(began)
        assert not beat.active
        with pytest.raises(DomiError, match="closed"):
            serial.call_later(0.0, print)
        assert serial.backlog == 0


async def test_it_starts_on_the_loop_of_its_node(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        serial = make_serial(a)
        other = asyncio.new_event_loop()
        running = asyncio.events._get_running_loop()
        asyncio.events._set_running_loop(None)
        try:
            with pytest.raises(DomiError, match="another event loop than its node"):
                other.run_until_complete(serial.start())
        finally:
            asyncio.events._set_running_loop(running)
            other.close()
        async with serial:
            pass


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
