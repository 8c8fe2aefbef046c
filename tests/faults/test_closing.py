"""Closing at the wrong time: in the start, twice, cancelled, in a handler, after the loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from domi_fast import (
    Client,
    Context,
    DomiError,
    FrameReader,
    LibraryChannel,
    Node,
    Overloaded,
    PeerLost,
    connect,
    encode_frame,
)
from domi_fast.handshake import Offer, encode_welcome
from tests import reference
from tests.strangers import extended
from tests.support import ROOT, RawPeer, forget_records, nodes, session, until

MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


# -------------------------------------------------------------------------------- during the start

STAGES: dict[str, Callable[[Node], object]] = {
    "before its first step": lambda node: True,
    "once it listens": lambda node: node.port,
    "once it has an id": lambda node: node.id >= 0,
    "once it dials": lambda node: node._mesh._dialling.wanted,
}


async def close_in_start(url: str, stage: str) -> None:
    async with nodes(url, "other") as (other,):
        for _ in range(3):
            node = Node("a", registry=url)
            starting = asyncio.ensure_future(node.start())
            while not STAGES[stage](node):
                assert not starting.done()
                await asyncio.sleep(0)
            await node.close()
            with pytest.raises(DomiError, match="closed"):
                await starting
            assert not node._mesh._tasks
            assert not node._mesh._dialling.wanted
            assert not node._mesh._sessions
            await other.wait_peers(0, 5)
            registered = await other._mesh._registry.list("domi/")
            assert [int(entry.key[-4:]) for entry in registered.entries] == [other.id]


@pytest.mark.parametrize("stage", list(STAGES))
async def test_close_during_start(registry_url: str, stage: str) -> None:
    """No task goes on, nothing stays registered, and the start says that the node was closed."""
    await close_in_start(registry_url, stage)


@pytest.mark.parametrize("stage", list(STAGES))
async def test_close_during_start_with_a_registry_in_a_file(sqlite_url: str, stage: str) -> None:
    await close_in_start(sqlite_url, stage)


# ----------------------------------------------------------------------------- cancelled, and twice


async def test_a_cancelled_close_goes_on_and_a_second_one_waits(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", queue_limit=MIB, drain_timeout=0.5) as (a, b):
        raw = await RawPeer.plain(a, 700, receive_buffer=4096)
        with contextlib.suppress(Overloaded):
            while True:
                a.notify(60, bytes(60_000), to=700)
        first = asyncio.ensure_future(a.close())
        # It has left the registry, and waits for the peer that does not read.
        await until(lambda: a._mesh._members._claim is None)
        second = asyncio.ensure_future(a.close())
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert not second.done()
        await second
        assert not a.peers
        assert not a._mesh._sessions
        await b.wait_peers(0, 5)
        raw.close()


async def test_a_cancelled_close_of_a_guest_goes_on() -> None:
    """The node takes what is queued late, and then the connection is closed."""
    offer = Offer("false", "0", "", epoch=0, instance=bytes(16))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        connecting = asyncio.ensure_future(
            connect(f"tcp://127.0.0.1:{server.getsockname()[1]}", queue_limit=MIB)
        )
        sock, _ = await asyncio.get_running_loop().sock_accept(server)
    sock.setblocking(False)
    raw = RawPeer(sock)
    raw.reader = FrameReader(magic=True)
    await raw.frame_on(LibraryChannel.GUEST_NAME)
    await raw.send(encode_frame(LibraryChannel.WELCOME, encode_welcome(3, offer)))
    guest = await connecting
    with contextlib.suppress(Overloaded):
        while True:
            guest.notify(60, bytes(60_000))
    first = asyncio.ensure_future(guest.close())
    await until(lambda: guest._closing)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.ensure_future(guest.close())
    await asyncio.sleep(0)
    assert not second.done()
    with pytest.raises(EOFError):
        await raw.frame_on(LibraryChannel.NIL)
    await second
    assert not guest.connected
    raw.close()


async def test_close_in_a_handler_and_beside_it(registry_url: str) -> None:
    """Both calls wait for the handlers that run, but not for the one that closes."""
    async with nodes(registry_url, "b") as (b,), Node("a", registry=registry_url) as a:
        running, release = asyncio.Event(), asyncio.Event()
        order: list[str] = []

        async def work(ctx: Context) -> None:
            running.set()
            await release.wait()
            order.append("worked")

        async def stop(ctx: Context) -> None:
            await a.close()
            order.append("closed in the handler")

        a.subscribe(60, work)
        a.subscribe(61, stop)
        await b.wait_subscribed(60, timeout=5)
        await b.wait_subscribed(61, timeout=5)
        b.notify(60, b"")
        await running.wait()
        b.notify(61, b"")
        await until(lambda: a._closing)
        beside = asyncio.ensure_future(a.close())
        await asyncio.sleep(0)
        assert not beside.done()
        release.set()
        await beside
        assert not a.peers
        await b.wait_peers(0, 5)
        await until(lambda: len(order) == 2)
        assert order == ["worked", "closed in the handler"]


async def test_handlers_that_start_while_the_node_closes(registry_url: str) -> None:
    """Nobody waits for them, and none goes on after the close."""
    async with nodes(registry_url, "a", "b") as (a, b):
        release = asyncio.Event()
        started: list[bytes] = []
        ended: list[bytes] = []

        async def work(ctx: Context) -> None:
            started.append(ctx.data)
            try:
                await (release if ctx.data == b"early" else asyncio.Event()).wait()
            finally:
                ended.append(ctx.data)

        a.subscribe(60, work)
        await b.wait_subscribed(60, timeout=5)
        b.notify(60, b"early")
        await until(lambda: started == [b"early"])
        closing = asyncio.ensure_future(a.close())
        await until(lambda: a._closing)
        late = b.request(60, b"late", None)
        await until(lambda: started == [b"early", b"late"])
        release.set()
        await closing
        assert ended == [b"early", b"late"]
        assert not a._router.handler_tasks()
        with pytest.raises(PeerLost):
            await asyncio.wait_for(late, 5)


# ----------------------------------------------------------------------------------- amid the waits


async def test_waits_end_when_the_node_closes(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        waits = [
            asyncio.ensure_future(a.wait_subscribed(60)),
            asyncio.ensure_future(a.wait_peers(5)),
        ]
        await until(lambda: a._mesh.conditions.waiting == 2)
        await a.close()
        for wait in waits:
            with pytest.raises(DomiError, match="closed"):
                await asyncio.wait_for(wait, 5)
        with pytest.raises(DomiError, match="closed"):
            await asyncio.wait_for(a.wait_subscribed(60), 5)
        with pytest.raises(DomiError, match="closed"):
            await asyncio.wait_for(a.wait_peers(5), 5)


async def test_watched_channels_end_when_the_node_closes(registry_url: str) -> None:
    """The node's own and those of its guests, after what had arrived."""
    async with (
        nodes(registry_url, "a") as (a,),
        await connect(f"tcp://127.0.0.1:{a.port}") as guest,
    ):
        got: list[bytes] = []

        async def watch(member: Node | Client, channel: int) -> None:
            async with member.watch_channel(channel) as messages:
                async for message in messages:
                    got.append(message.data)  # noqa: PERF401 - the test waits for each

        watches = [
            asyncio.ensure_future(watch(a, 60)),
            asyncio.ensure_future(watch(guest, 61)),
        ]
        await a.wait_subscribed(60, timeout=5)
        await a.wait_subscribed(61, timeout=5)
        a.notify(60, b"to the node")
        a.notify(61, b"to the guest")
        await until(lambda: len(got) == 2)
        await a.close()
        await asyncio.wait_for(asyncio.gather(*watches), 5)


# ----------------------------------------------------------------------- the loop before its guests


def assert_says(word: str, program: str, kind: str) -> None:
    """The program ends well, with that word alone; freed memory is made to show in it."""
    done = subprocess.run(
        [sys.executable, "-c", program, kind],
        check=False,
        env={**os.environ, "PYTHONMALLOC": "debug"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, f"{word}\n"), done.stderr


FORSAKEN = """
import asyncio, gc, sys, weakref
import uvloop
from domi_fast import Node, connect
from domi_fast._core import engine_of

async def main():
    node = Node("a", registry="memory://forsaken")
    await node.start()
    dials = [connect(f"tcp://127.0.0.1:{node.port}") for _ in range(6)]
    return node, list(await asyncio.gather(*dials))

loop = uvloop.new_event_loop() if sys.argv[1] == "uvloop" else asyncio.new_event_loop()
node, guests = loop.run_until_complete(main())
engine = engine_of(loop)
loop.close()
gone, kept = weakref.ref(guests[0]._session), guests[3]._session
del guests
gc.collect()
gc.collect()
assert gone() is None
kept.close("for the test")
del kept, node
gc.collect()
engine.wheel.advance(loop.time() + 100)
print("intact")
"""


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_a_loop_that_is_closed_with_guests_connected(kind: str) -> None:
    """No timer of a freed session is left in the wheel; freed memory is made to show here."""
    assert_says("intact", FORSAKEN, kind)


POLLED = """
import asyncio, socket, struct, sys, warnings
import uvloop
from domi_fast import LibraryChannel, Node, encode_frame
from domi_fast._core import engine_of

async def main():
    warnings.simplefilter("ignore", RuntimeWarning)     # of processors that are too few
    node = Node("a", registry="memory://polled", busy_poll=1.0)
    await node.start()
    peer = socket.create_connection(("127.0.0.1", node.port))
    name = encode_frame(LibraryChannel.NODE_NAME, struct.pack("<H", 700))
    peer.sendall(struct.pack("<I", 2299) + name)
    await node.wait_peers(1, timeout=5)
    node.subscribe(50, lambda ctx: None)
    while engine_of(loop).polls < 200:
        peer.sendall(encode_frame(50, b""))
        await asyncio.sleep(0.001)
    return node, peer, node._router.session(700)

loop = uvloop.new_event_loop() if sys.argv[1] == "uvloop" else asyncio.new_event_loop()
node, peer, session = loop.run_until_complete(main())
assert not loop.remove_reader(session.descriptor)
loop.close()
node._router.stop("for the test")
assert session.closed
print("ended")
"""


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_a_loop_that_is_closed_while_it_polls(kind: str) -> None:
    """Whoever ends the node afterwards has no loop that could watch what was asked by hand."""
    assert_says("ended", POLLED, kind)


# ----------------------------------------------------------------------------- what was sent before


def write_until_it_breaks(sock: socket.socket) -> None:
    """Messages without an end."""
    data = encode_frame(51, bytes(3000)) * 20
    with contextlib.suppress(OSError):
        while True:
            select.select([], [sock], [], 5.0)
            with contextlib.suppress(BlockingIOError):
                sock.send(data)


def read_to_the_end(sock: socket.socket) -> list[tuple[int, bytes]]:
    """The channels and data of all that comes, until the connection ends or breaks."""
    reader = FrameReader()
    found: list[tuple[int, bytes]] = []
    with contextlib.suppress(ConnectionResetError):
        while select.select([sock], [], [], 5.0)[0]:
            data = sock.recv(1 << 16)
            if not data:
                break
            found += [(frame.channel, frame.data) for frame in reader.feed(data)]
    return found


async def test_what_was_sent_before_the_close_arrives_while_its_peer_sends(
    registry_url: str,
) -> None:
    """A socket that is closed with something unread in it forgets what it has not sent yet: here
    most of it, for the peer reads only once the node has said goodbye."""
    async with Node("a", registry=registry_url) as a:
        a.subscribe(51, lambda ctx: None)
        async with extended(a, registry_url, 7, (50,)) as peer:
            writing = asyncio.ensure_future(asyncio.to_thread(write_until_it_breaks, peer.sock))
            sent = [b"%04d" % number + bytes(5000) for number in range(100)]
            for data in sent:
                a.notify(50, data, to=7)
            closing = asyncio.ensure_future(a.close())
            await until(lambda: 7 not in a.peers)
            assert not closing.done()
            came = await asyncio.to_thread(read_to_the_end, peer.sock)
            assert [data for channel, data in came if channel == 50] == sent
            assert came[-1] == (reference.EXIT, b"the node is closing")
            await asyncio.wait_for(closing, 1.0)
            await writing


async def test_a_node_that_could_not_send_all_says_so(registry_url: str) -> None:
    async with Node("a", registry=registry_url, drain_timeout=0.2) as a:
        a.on_error = lambda error, frame: None
        async with extended(a, registry_url, 7, (50,)):
            while True:
                a.notify(50, bytes(100_000), to=7)
                await asyncio.sleep(0)
                if session(a, 7).queued > MIB:
                    break
            assert await a.drain(1.0) is False
