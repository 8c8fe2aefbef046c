"""What programs, peers and registries do that nobody should: it costs them, and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from domi_fast import (
    Client,
    Context,
    DomiError,
    FrameError,
    FrameReader,
    LibraryChannel,
    Node,
    NoSubscriber,
    Overloaded,
    PeerLost,
    RemoteError,
    _core,
    connect,
    encode_frame,
)
from domi_fast.handshake import Offer, encode_welcome
from domi_fast.registry import open_registry
from tests.support import RawPeer, echo, forget_records, nodes, session, until

MIB = 1 << 20
SUBSCRIBED_ALL, SUBSCRIBED_ADD, SUBSCRIBED_REMOVE = b"\0", b"\1", b"\2"


def fill(node: Node, machine: int) -> None:
    """Send to a peer that does not read until its queue is full."""
    with contextlib.suppress(Overloaded):
        while True:
            node.notify(60, bytes(60_000), to=machine)


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


# --------------------------------------------------------------------------------- nodes that lie


@asynccontextmanager
async def false_node(*answer: bytes) -> AsyncIterator[tuple[RawPeer, asyncio.Future[Client]]]:
    """What answers a guest in a node's place, and the guest that connects to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        guest = asyncio.ensure_future(connect(url))
        sock, _ = await asyncio.get_running_loop().sock_accept(server)
    sock.setblocking(False)
    peer = RawPeer(sock)
    peer.reader = FrameReader(magic=True)
    try:
        await peer.frame_on(LibraryChannel.GUEST_NAME)
        await peer.send(b"".join(answer))
        yield peer, guest
    finally:
        peer.close()
        [client] = await asyncio.gather(guest, return_exceptions=True)
        if isinstance(client, Client):
            await client.close()


def welcome(machine: int) -> bytes:
    offer = Offer("false", "0", "", epoch=0, instance=bytes(16))
    return encode_frame(LibraryChannel.WELCOME, encode_welcome(machine, offer))


@pytest.mark.parametrize("machine", [1024, 65535])
async def test_a_guest_does_not_believe_any_machine_id(machine: int) -> None:
    async with false_node(welcome(machine)) as (_, guest):
        with pytest.raises(PeerLost, match="ids are 0-1023"):
            await guest


async def test_a_guest_that_is_told_of_subscriptions(registry_url: str) -> None:
    """Nodes tell each other only; a guest counts such a frame and stays."""
    lists = [
        encode_frame(LibraryChannel.SUBSCRIPTIONS, struct.pack("<H", 60), operation)
        for operation in (SUBSCRIBED_ALL, SUBSCRIBED_ADD, SUBSCRIBED_REMOVE)
    ]
    async with false_node(welcome(3)) as (peer, connecting):
        guest = await connecting
        await peer.send(b"".join(lists) + encode_frame(LibraryChannel.PING, b"ping"))
        await peer.frame_on(LibraryChannel.PONG)
        assert guest.counters()["dropped_not_negotiated"] == 3
        assert guest.connected


async def test_the_text_of_a_refusal_is_cut() -> None:
    async with false_node(encode_frame(LibraryChannel.EXIT, b"x" * 4000)) as (_, guest):
        with pytest.raises(PeerLost) as caught:
            await guest
        assert 1024 <= str(caught.value).count("x") < 1100


async def test_the_text_of_a_refusal_is_made_printable() -> None:
    text = "x\nERROR:domi_fast.mesh:forged\x1b[31m\u202e".encode() + b"\xff"
    async with false_node(encode_frame(LibraryChannel.EXIT, text)) as (_, guest):
        with pytest.raises(PeerLost) as caught:
            await guest
        assert "refused: x\\nERROR:domi_fast.mesh:forged\\x1b[31m\\u202e\ufffd" in str(caught.value)
        assert str(caught.value).isprintable()


async def test_the_text_of_a_goodbye_is_cut(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        raw = await RawPeer.plain(a, 700)
        lost = session(a, 700)
        await raw.send(encode_frame(LibraryChannel.EXIT, b"x" * 200_000))
        await until(lambda: lost.closed)
        assert lost.reason.count("x") == 1024
        raw.close()


# ----------------------------------------------------------------------- a registry full of rubbish

FIELDS: dict[str, Any] = {
    "name": "x",
    "version": "0",
    "host": "127.0.0.1",
    "unix_path": None,
    "mark": "00" * 16,
    "machine": "x",
}
RUBBISH: dict[str, tuple[str, dict[str, Any]]] = {
    "an id over the largest": ("5000", {}),
    "an id of 31 bits": ("2000000000", {}),
    "an id of 37 bits": ("99999999999", {}),
    "no id": ("foreign", {}),
    "a key that ends as a node's does": ("deeper/0007", {}),
    "an endless port": ("0007", {"port": float("inf")}),
    "no port": ("0007", {"port": 1 << 40}),
    "no mark": ("0007", {"mark": "xyz"}),
    "no version": ("0007", {"version": "?"}),
}


async def endure(url: str, key: str, value: bytes) -> None:
    """Nodes start beside the entry, and follow the registry on after it was put and deleted."""
    registry = open_registry(url)
    await registry.open()
    async with nodes(url, "a") as (a,):
        key = f"domi/{a.config.cluster}/nodes/{key}"
        await registry.put(key, value)
        async with Node("b", registry=url) as b:
            await a.wait_peers(1, 5)
            await registry.delete(key)
            async with Node("c", registry=url) as c:
                await a.wait_peers(2, 5)
                assert set(a.peers) == {b.id, c.id}
        assert set(a._mesh._members.view) <= {a.id, b.id, c.id}
    await registry.close()


@pytest.mark.parametrize("kind", list(RUBBISH))
async def test_an_entry_that_no_node_wrote(registry_url: str, kind: str) -> None:
    key, fields = RUBBISH[kind]
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        value = {**FIELDS, "port": server.getsockname()[1], **fields}
        await endure(registry_url, key, json.dumps(value).encode())
        with pytest.raises(BlockingIOError):  # nobody has dialled what is not a node
            server.accept()


@pytest.mark.parametrize("value", [b"[" * 50_000, b"[]", b"null", b"\xff", b""])
async def test_a_value_that_no_node_wrote(registry_url: str, value: bytes) -> None:
    await endure(registry_url, "0007", value)


# ----------------------------------------------------------------------------- what on_error may do


async def test_on_error_subscribes_while_the_node_gets_another_id(registry_url: str) -> None:
    """The frames to itself are reported, and no dead session gets into a route."""
    async with nodes(registry_url, "a") as (a,):
        lost: list[int] = []

        def subscribe_another(error: DomiError, frame: Any) -> None:
            lost.append(frame.channel)
            a.subscribe(61, echo)

        a.subscribe(60, echo)
        a.on_error = subscribe_another
        a.notify(60, b"to itself")
        a._router.identify(9)
        await until(lambda: lost == [60])
        assert a.subscribers(60) == a.subscribers(61) == [9]
        assert await a.request(61, b"x", 5) == b"x"


async def test_on_error_subscribes_while_the_node_stops(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        lost: list[int] = []

        def subscribe_another(error: DomiError, frame: Any) -> None:
            lost.append(frame.channel)
            with contextlib.suppress(DomiError):
                a.subscribe(61, echo)

        a.subscribe(60, echo)
        a.on_error = subscribe_another
        a.notify(60, b"to itself")
        a._router.stop("for the test")
        await until(lambda: lost == [60])
        assert a.subscribers(61) == []


async def test_on_error_that_raises_a_cancellation(registry_url: str) -> None:
    """Every frame is reported, and the dead peer leaves its place to its successor."""
    async with nodes(registry_url, "a", queue_limit=MIB) as (a,):
        lost: list[DomiError] = []

        def cancelled(error: DomiError, frame: Any) -> None:
            lost.append(error)
            raise asyncio.CancelledError

        raw = await RawPeer.plain(a, 700, receive_buffer=4096)
        fill(a, 700)
        a.on_error = cancelled
        raw.reset()
        await a.wait_peers(0, 5)
        assert len(lost) > 10
        assert all(isinstance(error, PeerLost) for error in lost)
        assert not a._mesh._sessions
        successor = await RawPeer.plain(a, 700)
        successor.close()
        await a.wait_peers(0, 5)


# ------------------------------------------------------------------- every request has an outcome


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("for the test")


def raises_unspeakable(ctx: Context) -> None:
    raise UnspeakableError


async def raises_unspeakable_later(ctx: Context) -> None:
    raise UnspeakableError


def raises_surrogate(ctx: Context) -> None:
    raise ValueError("\udcff")


def raises_overloaded_surrogate(ctx: Context) -> None:
    raise Overloaded("\udcff")


def says_surrogate(ctx: Context) -> None:
    ctx.error("\udcff")


def raises_long(ctx: Context) -> None:
    raise ValueError("x" * 10_000)


async def raises_long_later(ctx: Context) -> None:
    raise ValueError("x" * 10_000)


def says_long(ctx: Context) -> None:
    ctx.error("x" * 10_000)


def in_a_thread(answer: Callable[[Context], object]) -> Callable[[Context], None]:
    def handler(ctx: Context) -> None:
        threading.Thread(target=answer, args=(ctx,)).start()

    return handler


HANDLERS: dict[str, tuple[Callable[[Context], object], type[DomiError]]] = {
    "an error without text": (raises_unspeakable, RemoteError),
    "an error without text in a task": (raises_unspeakable_later, RemoteError),
    "surrogates": (raises_surrogate, RemoteError),
    "surrogates of Overloaded": (raises_overloaded_surrogate, Overloaded),
    "surrogates by error()": (says_surrogate, RemoteError),
    "surrogates from a thread": (in_a_thread(says_surrogate), RemoteError),
    "a long error": (raises_long, RemoteError),
    "a long error in a task": (raises_long_later, RemoteError),
    "a long error by error()": (says_long, RemoteError),
    "a long error from a thread": (in_a_thread(says_long), RemoteError),
    "a long reply from a thread": (in_a_thread(lambda ctx: ctx.reply(bytes(5000))), DomiError),
}


@pytest.mark.parametrize("kind", list(HANDLERS))
async def test_answers_that_cannot_be_sent_as_they_are(registry_url: str, kind: str) -> None:
    """The asker hears of a failure, and the session stays."""
    handler, expected = HANDLERS[kind]
    async with nodes(registry_url, "a", "b", frame_limit=4096) as (a, b):
        b.subscribe(60, handler)
        b.subscribe(61, echo)
        await a.wait_subscribed(61, timeout=5)
        before = session(a, b.id)
        with pytest.raises(expected) as caught:
            await asyncio.wait_for(a.request(60, b"", None), 5)
        if "long error" in kind:
            assert isinstance(caught.value, RemoteError)
            assert 3000 < caught.value.message.count("x") < 4096
        assert await a.request(61, b"x", 5) == b"x"
        assert session(a, b.id) is before


async def test_an_error_over_the_largest_frame(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        b.subscribe(60, lambda ctx: ctx.error("x" * (17 * MIB)))
        await a.wait_subscribed(60, timeout=5)
        before = session(a, b.id)
        with pytest.raises(RemoteError) as caught:
            await asyncio.wait_for(a.request(60, b"", None), 5)
        assert 60_000 < len(caught.value.message) <= 65536
        assert session(a, b.id) is before


async def test_a_watched_channel_is_left_with_messages_waiting(registry_url: str) -> None:
    """Requests among them are answered as if nobody had subscribed, and all are counted."""
    async with nodes(registry_url, "a", "b") as (a, b):
        async with b.watch_channel(60) as messages:
            await a.wait_subscribed(60, timeout=5)
            requests = [a.request(60, b"", None) for _ in range(3)]
            a.notify(60, b"")
            await until(lambda: len(messages) == 4)
        for request in requests:
            with pytest.raises(NoSubscriber):
                await asyncio.wait_for(request, 5)
        assert b.counters()["dropped_no_subscriber"] == 4


# --------------------------------------------------------------------------------------- guests


async def test_requests_of_guests_that_left_are_let_go(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        b.subscribe(60, kept.append)
        await a.wait_subscribed(60, timeout=5)
        for number in range(1, 4):
            guest = await connect(f"tcp://127.0.0.1:{a.port}")
            requests = [guest.request(60, b"", None) for _ in range(20)]
            await until(lambda number=number: len(kept) == 20 * number)  # type: ignore[misc]
            assert a.counters()["in_flight"] == 20
            await guest.close()
            await until(lambda: a.counters().get("in_flight", 0) == 0)
            for request in requests:
                with pytest.raises(PeerLost):
                    await request
        kept.clear()


async def test_a_guest_has_a_limit_of_requests_in_flight(registry_url: str) -> None:
    limit, overloaded = 65_536, 3
    async with Node("node", registry=registry_url) as node:
        kept: list[Context] = []
        node.subscribe(60, kept.append)
        raw = await RawPeer.guest(node)

        def asks(correlation: int) -> bytes:
            extend = struct.pack("<BHHHQI", 4, 60, 0xFFFF, 0, correlation, 60_000)
            return encode_frame(LibraryChannel.RELAY, b"", extend)

        async def answer() -> tuple[int, int]:
            frame = await raw.frame_on(LibraryChannel.ANSWER)
            return struct.unpack("<QB", frame.extend)

        try:
            await raw.send(b"".join(map(asks, range(1, limit + 1))))
            await until(lambda: len(kept) == limit)
            await raw.send(asks(limit + 1))
            assert await answer() == (limit + 1, overloaded)
            kept[7].reply(b"")
            assert await answer() == (8, 0)
            await raw.send(asks(limit + 2) + asks(limit + 3))
            assert await answer() == (limit + 3, overloaded)
            assert len(kept) == limit + 1
        finally:
            raw.close()
            kept.clear()


async def test_a_long_list_of_a_guest_is_passed_on_in_few_frames(registry_url: str) -> None:
    channels = struct.pack("<5000H", *range(1000, 6000))
    async with nodes(registry_url, "a", "b") as (a, b):
        raw = await RawPeer.guest(a)
        there, here = session(b, a.id), session(a, b.id)
        for operation, count in ((SUBSCRIBED_ADD, 5000), (SUBSCRIBED_REMOVE, 0)):
            before = here.frames_out
            await raw.send(encode_frame(LibraryChannel.SUBSCRIPTIONS, channels, operation))
            await until(lambda count=count: len(there.subscribed) == count)  # type: ignore[misc]
            assert here.frames_out - before < 10
        raw.close()


async def test_a_pipeline_that_a_guest_cannot_pass_on(registry_url: str) -> None:
    """Its handler is told, and the guest stays."""
    async with nodes(registry_url, "a", "b") as (a, b):
        refused: list[str] = []
        async with await connect(f"tcp://127.0.0.1:{a.port}") as guest:

            def pass_on(ctx: Context) -> None:
                try:
                    ctx.next(b"")
                except FrameError as error:
                    refused.append(str(error))

            guest.subscribe(60, pass_on)
            b.subscribe(61, echo)
            await b.wait_subscribed(60, timeout=5)
            await a.wait_subscribed(61, timeout=5)
            stages = b"\4" + struct.pack("<32766H", *([61] * 32766))
            frame = encode_frame(60, b"", stages)
            assert os.write(session(b, a.id).descriptor, frame) == len(frame)
            await until(lambda: refused)
            assert await guest.request(61, b"x", 5) == b"x"


async def test_the_largest_request_to_a_channel_of_a_guest(registry_url: str) -> None:
    """On the way to a guest a request grows: what does not fit any more is refused."""
    async with (
        nodes(registry_url, "a", "b", frame_limit=65536) as (a, b),
        await connect(f"tcp://127.0.0.1:{a.port}", frame_limit=65536) as guest,
    ):
        guest.subscribe(60, lambda ctx: ctx.reply(b"%d" % len(ctx.data)))
        await b.wait_subscribed(60, timeout=5)
        largest = 65536 - 8 - 13
        fits = largest - 2
        assert await asyncio.wait_for(b.request(60, bytes(fits), None), 5) == b"%d" % fits
        for size in (fits + 1, largest):
            with pytest.raises(DomiError):
                await asyncio.wait_for(b.request(60, bytes(size), None), 5)
        assert guest.connected


# --------------------------------------------------------------------------- the core's own objects


@pytest.mark.parametrize("kind", [_core.Context, _core.Request, _core.Timer])
def test_only_the_core_makes_them(kind: type[Any]) -> None:
    with pytest.raises(TypeError):
        kind()
    with pytest.raises(TypeError):
        kind.__new__(kind)


async def test_a_machine_id_that_another_has(registry_url: str) -> None:
    """A node that comes to have the id of a peer closes its session with that peer."""
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(60, echo)
        raw = await RawPeer.plain(a, 7)
        held = session(a, 7)
        a._router.identify(7)
        assert held.closed
        assert not a.peers
        assert await a.request(60, b"x", 5, to=7) == b"x"
        with pytest.raises(EOFError):
            await raw.frame_on(LibraryChannel.NIL)
        raw.close()


async def test_waits_for_room_that_were_cancelled_are_let_go(registry_url: str) -> None:
    async with nodes(registry_url, "a", queue_limit=MIB) as (a,):
        raw = await RawPeer.plain(a, 700, receive_buffer=4096)
        fill(a, 700)
        futures: list[weakref.ref[asyncio.Future[None]]] = []

        def wait_and_give_up() -> None:
            future = a.drained(700)
            assert not future.done()
            future.cancel()
            futures.append(weakref.ref(future))

        for _ in range(1000):
            wait_and_give_up()
        assert sum(reference() is not None for reference in futures) < 100
        raw.reset()
        await a.wait_peers(0, 5)
