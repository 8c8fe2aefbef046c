"""What others may have of a node: each limit has an error or a counter, and an end."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from domi_fast import (
    Client,
    Context,
    FrameError,
    Node,
    NoSubscriber,
    Overloaded,
    PeerLost,
    Serial,
    connect,
)
from domi_fast._core import is_debug_build
from domi_fast.callers import Callers, _host, most_handshakes
from tests import reference
from tests.support import RawPeer, echo, forget_records, guest_greeting, nodes, until


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO)
    yield
    forget_records(caplog)


async def is_refused(node: Node, source: str = "127.0.0.1", within: float = 1.5) -> bool:
    """Whether a connection from there is closed before the time for its handshake is over."""
    raw = await RawPeer.connect(node.port, source=source)
    try:
        await raw.frame(within)
    except (EOFError, ConnectionResetError):
        return True
    except asyncio.TimeoutError:
        return False
    finally:
        raw.close()
    raise AssertionError("the node has spoken first")


async def guest_of(node: Node, source: str) -> RawPeer:
    raw = await RawPeer.connect(node.port, source=source)
    await raw.send(guest_greeting())
    assert (await raw.frame()).channel == reference.WELCOME
    return raw


# ----------------------------------------------------------------------------------------- sessions


async def test_so_many_sessions(registry_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Those that are there stay, and there is room again when one of them goes."""
    settings: dict[str, Any] = {"session_limit": 3, "sessions_per_address": 3}
    async with nodes(registry_url, "a", **settings) as (a,):
        guests = [await guest_of(a, "127.0.0.1") for _ in range(3)]
        for source in ("127.0.0.1", "127.0.0.2"):
            assert await is_refused(a, source)
        assert a.counters()["refused_sessions"] == 2
        with pytest.raises(PeerLost, match=r"closed the connection|connection broke"):
            await connect(f"tcp://127.0.0.1:{a.port}")
        told = [r.getMessage() for r in caplog.records if "session_limit" in r.getMessage()]
        most = "this node has 3 connections, as many as it may (session_limit)"
        assert told == [f"{most}: more are closed at once"]
        for guest in guests[:2]:
            guest.close()
        await until(lambda: len(a._router.sessions()) == 1)
        async with await connect(f"tcp://127.0.0.1:{a.port}") as client:
            assert client.connected
        guests[2].close()


async def test_so_many_of_one_address(registry_url: str) -> None:
    async with Node("a", registry=registry_url, sessions_per_address=2) as a:
        events = a.events()
        guests = [await guest_of(a, "127.0.0.2") for _ in range(2)]
        assert await is_refused(a, "127.0.0.2")
        refused = await asyncio.wait_for(anext(events), 5)
        assert refused.reason == (
            "127.0.0.2 has 2 connections, as many as it may (sessions_per_address)"
        )
        guests.append(await guest_of(a, "127.0.0.1"))
        assert a.counters()["refused_sessions"] == 1
        for guest in guests:
            guest.close()
        await until(lambda: not a._router.sessions())
        assert not await is_refused(a, "127.0.0.2", within=0.2)


async def test_a_node_that_has_dialled_counts_too(registry_url: str) -> None:
    async with nodes(registry_url, "a", session_limit=1, sessions_per_address=1) as (a,):
        async with Node("b", registry=registry_url) as b:
            await b.wait_peers(1, 5)
            assert await is_refused(a)
        await until(lambda: not a.peers)
        assert not await is_refused(a, within=0.2)


# --------------------------------------------------------------------------- incomplete handshakes


async def closed(raw: RawPeer) -> None:
    """Wait until the node has closed it."""
    with pytest.raises((EOFError, ConnectionResetError)):
        await raw.frame()
    raw.close()


async def test_so_many_handshakes_in_all(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the address that has most, the oldest gives its place to who comes, from there or not."""
    settings: dict[str, Any] = {"session_limit": 8, "sessions_per_address": 8}
    async with Node("a", registry=registry_url, handshake_timeout=30, **settings) as a:
        events = a.events()
        sources = ["127.0.0.2", "127.0.0.3", "127.0.0.3", "127.0.0.4"]
        raws = [await RawPeer.connect(a.port, source=source) for source in sources]
        await until(lambda: len(a._mesh._sessions) == 4)
        raws.append(await RawPeer.connect(a.port, source="127.0.0.5"))
        await closed(raws.pop(1))
        refused = await asyncio.wait_for(anext(events), 5)
        assert (refused.kind, refused.address.partition(":")[0]) == ("refused", "127.0.0.3")
        assert refused.reason == (
            "this node has 4 incomplete handshakes, as many as it may (session_limit)"
        )
        # All have one now: it is the oldest of all.
        raws.append(await RawPeer.connect(a.port, source="127.0.0.5"))
        await closed(raws.pop(0))
        async with await connect(f"tcp://127.0.0.1:{a.port}") as guest:
            await closed(raws.pop(2))
            assert guest.connected
            assert a.counters()["refused_handshakes"] == 3
            assert a.counters()["refused_sessions"] == 0
        told = [r for r in caplog.records if "incomplete handshakes" in r.getMessage()]
        assert len(told) == 1
        for raw in raws:
            raw.close()
        # There has been room meanwhile.
        await until(lambda: not a._mesh._sessions)
        raws = [await RawPeer.connect(a.port, source="127.0.0.2") for _ in range(5)]
        await closed(raws.pop(0))
        told = [r for r in caplog.records if "incomplete handshakes" in r.getMessage()]
        assert len(told) == 2
        for raw in raws:
            raw.close()


async def test_an_incomplete_handshake_takes_nobodys_place(registry_url: str) -> None:
    """All but one of the places are taken by sessions, and one by who says nothing."""
    async with Node("a", registry=registry_url, session_limit=4, sessions_per_address=4) as a:
        guests = [await guest_of(a, "127.0.0.1") for _ in range(3)]
        silent = await RawPeer.connect(a.port, source="127.0.0.2")
        await until(lambda: len(a._mesh._sessions) == 4)
        guests.append(await guest_of(a, "127.0.0.1"))
        await closed(silent)
        assert await is_refused(a, "127.0.0.2")
        assert a.counters()["refused_handshakes"] == a.counters()["refused_sessions"] == 1
        for guest in guests:
            guest.close()


class Named:
    """Stands in for a session."""

    def __init__(self, address: str) -> None:
        self.address = address


def test_whose_turn_it_is_to_go() -> None:
    """As whoever counts them anew each time would say, whatever comes and goes."""
    chance = random.Random(1)
    callers: Any = Callers(1 << 20, 1 << 20, None)
    there: list[Named] = []
    for _ in range(3_000):
        if there and chance.random() < 0.45:
            gone = there.pop(chance.randrange(len(there)))
            chance.choice([callers.completed, callers.left])(gone)
        else:
            there.append(Named(f"10.0.0.{chance.randrange(8)}:{chance.randrange(1 << 16)}"))
            callers.began(there[-1])
        counts = Counter(_host(each.address) for each in there)
        assert len(callers._incomplete) == len(there)
        if there:
            most = max(counts.values())
            found = callers._incomplete.oldest_of_most()
            own = [each for each in there if _host(each.address) == _host(found.address)]
            assert counts[_host(found.address)] == most
            assert found is own[0]


def test_ten_thousand_incomplete_ones_cost_no_more_each() -> None:
    """While each that comes makes an older one go: from one address, and from one each."""

    def seconds(count: int, addresses: int) -> float:
        callers: Any = Callers(1 << 20, count * 2, count * 2)
        coming = [
            Named(f"10.{n % addresses >> 8}.{n % addresses & 255}.1:1") for n in range(30_000)
        ]
        for each in coming[:count]:
            callers.began(each)
        begun = time.process_time()
        for each in coming[count : count + 10_000]:
            reached = callers.reached(each.address)
            callers.left(reached.instead)
            callers.began(each)
        return time.process_time() - begun

    for addresses in (1, 20_000):
        few = min(seconds(100, addresses) for _ in range(3))
        many = min(seconds(10_000, addresses) for _ in range(3))
        assert many < 10 * few


@pytest.mark.parametrize(
    ("descriptors", "handshakes", "with_tls", "sessions", "of_one"),
    [
        (512, 128, 128, 384, 192),
        (1 << 20, 1024, 256, 786_432, 393_216),
        (resource.RLIM_INFINITY, 1024, 256, 786_432, 393_216),
        (1, 1, 1, 1, 1),
    ],
)
def test_the_defaults_go_by_the_descriptors(
    monkeypatch: pytest.MonkeyPatch,
    descriptors: int,
    handshakes: int,
    with_tls: int,
    sessions: int,
    of_one: int,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (descriptors, descriptors))
    assert (most_handshakes(False), most_handshakes(True)) == (handshakes, with_tls)
    callers: Any = Callers(1, None, None)
    assert (callers._most, callers._most_of_one) == (sessions, of_one)


# ----------------------------------------------------------------------------------------- channels


async def test_so_many_channels_here(registry_url: str) -> None:
    node = Node("a", registry=registry_url, channel_limit=3)
    for channel in (50, 51, 52):
        node.subscribe(channel, print)
    with pytest.raises(Overloaded, match="channel_limit") as caught:
        node.subscribe(53, print)
    assert (caught.value.channel, caught.value.limit) == (53, 3)
    node.unsubscribe(50)
    node.subscribe(53, print)
    async with node:
        with pytest.raises(Overloaded):
            node.subscribe(54, print)
        with pytest.raises(Overloaded):
            async with node.watch_channel(54):
                pass
        assert node.counters()["refused_channels"] == 3


async def test_so_many_channels_of_a_guest(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At once or one after the other: its session is closed, and nobody is sent its way."""
    async with nodes(registry_url, "a", channel_limit=3) as (a,):
        for lists in ([[50, 51, 52, 53]], [[50, 51, 52], [52, 53]]):
            guest = await guest_of(a, "127.0.0.1")
            caplog.clear()
            for channels in lists:
                await guest.send(reference.subscriptions(1, channels))
            with pytest.raises(EOFError):
                await guest.frame_on(0)
            (told,) = [r.getMessage() for r in caplog.records]
            assert "it subscribes to 4 channels: at most 3 (channel_limit) are allowed" in told
            assert not a.channels
            with pytest.raises(NoSubscriber):
                a.notify(50, b"")
            guest.close()
        assert a.counters()["protocol_errors"] == 2
        # As many as may is fine, said twice or not.
        guest = await guest_of(a, "127.0.0.1")
        for _ in range(2):
            await guest.send(reference.subscriptions(1, [50, 51, 52]))
        await a.wait_subscribed(52, timeout=5)
        assert a.channels == {50, 51, 52}
        guest.close()


async def test_so_many_guests_of_a_channel(registry_url: str) -> None:
    """One more hears why, and is gone; the others stay, and one that leaves makes room."""
    async with nodes(registry_url, "a", subscriber_limit=2) as (a,), AsyncExitStack() as stack:
        got: Counter[int] = Counter()

        async def guest(number: int, *channels: int) -> Client:
            one = await stack.enter_async_context(await connect(f"tcp://127.0.0.1:{a.port}"))

            def handler(ctx: Context) -> None:
                got[number] += 1

            for channel in channels:
                one.subscribe(channel, handler)
            await one.request(60, b"")  # behind the subscription
            return one

        a.subscribe(60, lambda ctx: ctx.reply(b""))
        first, _ = await guest(1, 50), await guest(2, 50)
        with pytest.raises(PeerLost, match=r"2 guests subscribe to channel 50.*subscriber_limit"):
            await guest(3, 51, 50)
        assert a.counters()["refused_subscribers"] == 1
        assert a.channels == {50, 60}
        a.publish(50, b"")
        await until(lambda: got == {1: 1, 2: 1})
        await first.close()
        await until(lambda: len(a._router.sessions()) == 1)
        await guest(4, 50)
        a.publish(50, b"")
        await until(lambda: got == {1: 1, 2: 2, 4: 1})
        # To another channel they may, and its own node is none of them.
        await guest(5, 51)
        a.subscribe(50, lambda ctx: None)


# ---------------------------------------------------------------------------- frames and requests


async def test_frames_so_large(registry_url: str) -> None:
    """Of each verb, from the loop and from a serial thread, and while the queue is full."""
    async with nodes(registry_url, "a", frame_limit=65536, queue_limit=65536) as (a,):
        a.subscribe(50, lambda ctx: None)
        serial = Serial(a, thread=True)
        serial.subscribe(51, lambda ctx: ctx.reply(b"raised") if raises(serial.notify) else None)

        def raises(verb: Callable[..., Any]) -> bool:
            with pytest.raises(FrameError, match=r"\(frame_limit\)") as caught:
                verb(50, bytes(65536))
            return (caught.value.channel, caught.value.limit) == (50, 65536)

        async with serial:
            for verb in (a.notify, a.publish, a.request):
                assert raises(verb)
            assert a.counters()["refused_frame_limit"] == 3
            assert await a.request(51, b"") == b"raised"
            assert a.counters()["refused_frame_limit"] == 4
            a.notify(50, bytes(65000))
            a.notify(50, bytes(1000))
            assert raises(a.request)
            assert a.counters()["refused_frame_limit"] == 5


async def test_so_many_requests_of_a_guest(registry_url: str) -> None:
    async with (
        nodes(registry_url, "a") as (a,),
        await connect(f"tcp://127.0.0.1:{a.port}") as guest,
    ):
        kept: list[Context] = []
        a.subscribe(50, kept.append)
        asked = [guest.request(50, b"", None) for _ in range(65536 + 2)]
        for last in asked[-2:]:
            with pytest.raises(Overloaded, match="requests of this guest are in flight"):
                await asyncio.wait_for(last, 20)
        assert a.counters()["refused_guest_requests"] == 2
        await until(lambda: len(kept) == 65536, 20)
        for context in kept:
            context.reply(b"done")
        assert set(await asyncio.wait_for(asyncio.gather(*asked[:-2]), 20)) == {b"done"}
        a.subscribe(51, echo)
        assert await guest.request(51, b"x") == b"x"


@pytest.mark.skipif(
    is_debug_build() or os.environ.get("DOMI_SANITIZE") == "1",
    reason="a million requests, which take a build with checks a minute",
)
async def test_so_many_requests_in_flight(registry_url: str) -> None:
    async with nodes(registry_url, "a", queue_limit=64 << 20) as (a,):
        a.subscribe(50, lambda ctx: None)
        most = 1 << 20
        asked = [a.request(50, b"", None) for _ in range(most)]
        with pytest.raises(Overloaded, match=f"{most} requests are in flight") as caught:
            a.request(50, b"", None)
        assert (caught.value.channel, caught.value.limit) == (50, most)
        assert a.counters()["refused_requests"] == 1
        for request in asked:
            request.cancel()


# ----------------------------------------------------------------------------------------- handlers


async def test_so_many_handlers_at_a_time(registry_url: str) -> None:
    """A request more is told, anything else is dropped and counted; nothing is left unawaited."""
    async with nodes(registry_url, "a", handler_limit=5) as (a,):
        gate = asyncio.Event()
        begun = 0

        async def handler(ctx: Context) -> None:
            nonlocal begun
            begun += 1
            await gate.wait()
            if ctx.is_request:
                ctx.reply(b"done")

        a.subscribe(50, handler)
        asked = [a.request(50, b"") for _ in range(5)]
        await until(lambda: len(a._router.handler_tasks()) == 5)
        with pytest.raises(Overloaded, match="handler_limit"):
            await a.request(50, b"")
        a.notify(50, b"")
        await until(lambda: a.counters()["handlers_overloaded"] == 2)
        # One that is plain, or ends at once, costs nothing of it.
        a.subscribe(51, lambda ctx: ctx.reply(b"plain"))
        assert await a.request(51, b"") == b"plain"
        gate.set()
        assert await asyncio.gather(*asked) == [b"done"] * 5
        assert begun == 5
        assert await a.request(50, b"") == b"done"


@pytest.mark.parametrize(
    "setting",
    ["session_limit", "sessions_per_address", "channel_limit", "subscriber_limit", "handler_limit"],
)
@pytest.mark.parametrize("value", [0, -1, 1 << 30, "1", 1.5, True])
def test_limits_that_are_refused(registry_url: str, setting: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=setting):
        Node("a", registry=registry_url, **{setting: value})
