"""What others may have of a node: each limit has an error or a counter, and an end."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
from collections.abc import Callable
from typing import Any

import pytest

from domi_fast import (
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
from domi_fast.callers import Callers, most_handshakes
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
    "setting", ["session_limit", "sessions_per_address", "channel_limit", "handler_limit"]
)
@pytest.mark.parametrize("value", [0, -1, 1 << 30, "1", 1.5, True])
def test_limits_that_are_refused(registry_url: str, setting: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=setting):
        Node("a", registry=registry_url, **{setting: value})
