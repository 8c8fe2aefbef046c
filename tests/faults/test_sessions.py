"""Faults of sockets and processes under live sessions, on both loops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest

from domi_fast import Client, Context, DomiError, LibraryChannel, Node, connect, encode_frame
from tests.support import (
    MAGIC,
    RawPeer,
    Worker,
    echo,
    forget_records,
    guest_greeting,
    link,
    nodes,
    session,
    slowness,
    until,
    until_now,
    workers,
)

MIB = 1 << 20
ECHO, ABSORB = 50, 52


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


@pytest.fixture(params=["asyncio", "uvloop"])
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    with workers(request.param) as (process,):
        yield process


# --------------------------------------------------------------------------- death with data unread


@pytest.mark.parametrize("size", [100, 60_000, MIB, 4 * MIB])
async def test_data_and_reset_together(registry_url: str, size: int) -> None:
    """A peer is killed with data under way, and the data comes with the RST or before it."""
    async with nodes(registry_url, "a") as (a,):
        got: list[int] = []
        a.subscribe(60, lambda ctx: got.append(len(ctx.data)))
        for number in range(3):
            raw = await RawPeer.plain(a, 700)
            frames = encode_frame(60, bytes(990)) * (size // 1000 or 1)
            # What this side has not read makes the kernel answer its end with RST.
            a.notify(60, b"unread", to=700)
            sender = asyncio.ensure_future(raw.send(frames))
            if number == 0:
                await sender
            else:
                await asyncio.sleep(0)
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)
            died = time.monotonic()
            raw.reset()
            await a.wait_peers(0, 5)
            assert time.monotonic() - died < 0.1 * slowness() + size / (50 * MIB)
            assert a._router.session(700) is None
        assert not a._router.sessions()


async def test_data_and_reset_in_one_wake_up(registry_url: str) -> None:
    """Both lie in the kernel before the loop looks."""
    async with nodes(registry_url, "a") as (a,):
        got: list[bytes] = []
        a.subscribe(60, lambda ctx: got.append(ctx.data))
        for size in (10, 30_000, 70_000, 200_000):
            raw = await RawPeer.plain(a, 700)
            frame = encode_frame(60, bytes(size))
            sent = 0
            with contextlib.suppress(BlockingIOError):
                while sent < len(frame):
                    sent += raw.sock.send(frame[sent:])
            raw.reset()
            died = time.monotonic()
            await a.wait_peers(0, 5)
            assert time.monotonic() - died < 0.1 * slowness()


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("size", [1000, 3 * MIB])
def test_a_process_that_dies_with_data_under_way(
    worker: Worker, sqlite_url: str, size: int, reset: bool
) -> None:
    """SIGKILL after a burst: the survivor hears of it within 100 ms of the death."""
    with workers("uvloop") as (victim,):
        [machine] = worker.ask("start", registry=sqlite_url)
        victim.ask("start", registry=sqlite_url)
        worker.ask("wait_peers", count=1)
        victim.tell("burst_and_die", machine=machine, channel=ABSORB, size=size, reset=reset)
        victim.process.wait(10)
        died = time.monotonic()
        worker.ask("wait_peers", count=0)
        assert time.monotonic() - died < 0.1 * slowness()


async def test_answers_before_a_reset_are_delivered(registry_url: str) -> None:
    """What arrived before the end counts, also when sending finds the broken socket first."""
    async with nodes(registry_url, "a") as (a,):
        got: list[bytes] = []
        a.subscribe(60, lambda ctx: got.append(ctx.data))
        raw = await RawPeer.plain(a, 700)
        await raw.send(encode_frame(60, b"the last words"))
        raw.sock.shutdown(socket.SHUT_WR)
        raw.close()
        a.notify(60, b"into the void", to=700)
        a.notify(60, b"again", to=700)
        await a.wait_peers(0, 5)
        assert got == [b"the last words"]


# ------------------------------------------------------------------------------- descriptors reused


async def test_a_thousand_descriptors_reused(registry_url: str) -> None:
    """Sessions come and go in every way; none ever hears what is meant for another."""
    chance = random.Random(20)
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(60, echo)
        guests: dict[int, Client] = {}
        heard: dict[int, list[bytes]] = {}
        descriptors: set[int] = set()
        reused = 0

        async def open_one(number: int) -> None:
            nonlocal reused
            guest = guests[number] = await connect(f"tcp://127.0.0.1:{a.port}", name=str(number))
            heard[number] = []
            guest.subscribe(1000 + number, lambda ctx: heard[number].append(ctx.data))
            assert guest._session is not None
            descriptor = guest._session.descriptor
            reused += descriptor in descriptors
            descriptors.add(descriptor)

        async def close_one(number: int) -> None:
            guest = guests.pop(number)
            way = chance.randrange(4)
            assert guest._session is not None
            if way == 0:
                await guest.close()
                return
            # Something is always under way.
            with contextlib.suppress(DomiError):
                guest.notify(60, b"lost %d" % number)
                a.notify(1000 + number, b"for %d" % number)
            if way == 1:
                sock = socket.socket(fileno=os.dup(guest._session.descriptor))
                sock.shutdown(socket.SHUT_RDWR)
                sock.close()
            elif way == 2:
                for one in a._router.sessions():
                    if one.info.name == str(number):
                        one.close("for the test")
            else:
                sock = socket.socket(fileno=os.dup(guest._session.descriptor))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                guest._session.close("for the test")
                sock.close()
            await guest.close()

        async def use_one(number: int) -> None:
            guest = guests[number]
            data = b"%d " % number + os.urandom(chance.choice((4, 4, 4, 30_000)))
            assert await guest.request(60, data, 5) == data
            if a.subscribers(1000 + number):
                with contextlib.suppress(DomiError):
                    a.notify(1000 + number, b"for %d" % number)

        opened = 0
        while opened < 1000:
            for _ in range(chance.randrange(1, 6)):
                await open_one(opened)
                opened += 1
            chosen = chance.sample(sorted(guests), min(6, len(guests)))
            await asyncio.gather(*(use_one(number) for number in chosen))
            while len(guests) > 24 or (guests and chance.random() < 0.3):
                await close_one(chance.choice(sorted(guests)))
        for number in list(guests):
            await close_one(number)
        await until(lambda: not a._router.sessions())
        assert reused > 900
        assert any(heard.values())
        for number, texts in heard.items():
            assert set(texts) <= {b"for %d" % number}
        assert a.counters().get("protocol_errors", 0) == 0


# ----------------------------------------------------------------------------------------- fairness


async def test_a_flood_does_not_starve_another_session(sqlite_url: str) -> None:
    async with nodes(sqlite_url, "server", "asker") as (server, asker):
        absorbed = 0

        def absorb(ctx: Context) -> None:
            nonlocal absorbed
            absorbed += 1

        server.subscribe(60, absorb)
        server.subscribe(61, echo)
        await asker.wait_subscribed(61, timeout=5)
        with workers("uvloop") as (flooder,):
            await flooder.ask_later("start", registry=sqlite_url)
            await flooder.ask_later("wait_subscribed", channel=60, count=1)
            await flooder.ask_later("flood", machine=server.id, channel=60)
            await until(lambda: absorbed > 10_000, 20)
            worst = 0.0
            before = absorbed
            number = 0
            # The flooder needs a processor too, and has to have had one meanwhile.
            while number < 200 or absorbed < before + 10_000:
                begun = time.monotonic()
                assert await asker.request(61, b"%d" % number, 5) == b"%d" % number
                worst = max(worst, time.monotonic() - begun)
                number += 1
            assert worst < 0.25 * slowness()


async def test_a_peer_that_always_has_more_lets_the_loop_turn(registry_url: str) -> None:
    """Its next frame is there whenever the node asks the socket, though never more than one."""
    async with Node("a", registry=registry_url) as node:
        raw = await RawPeer.plain(node, 700)
        frame = encode_frame(60, b"again")
        arrived = turns = 0

        def handler(ctx: Context) -> None:
            nonlocal arrived
            arrived += 1
            raw.sock.send(frame)

        node.subscribe(60, handler)
        try:
            await raw.send(frame)
            begun = time.thread_time()
            while arrived < 20_000:
                turns += 1
                await asyncio.sleep(0)
            slices = (time.thread_time() - begun) / 100e-6
            assert turns > slices / 10, f"{turns} turns of the loop in {slices:.0f} slices"
        finally:
            raw.close()


async def test_a_receiver_that_does_not_read(registry_url: str) -> None:
    """It costs its queue's limit, and nobody else any time."""
    limit = 4 * MIB
    async with nodes(registry_url, "a", "b", queue_limit=limit) as (a, b):
        got: list[int] = []
        b.subscribe(60, lambda ctx: got.append(len(ctx.data)))
        b.subscribe(61, echo)
        await a.wait_subscribed(61, timeout=5)
        raw = await RawPeer.plain(a, 700, receive_buffer=4096)
        try:
            refused = 0
            for number in range(2000):
                try:
                    a.notify(60, bytes(20_000), to=700)
                except DomiError:
                    refused += 1
                a.notify(60, bytes(2000), to=b.id)
                if number % 50 == 0:
                    begun = time.monotonic()
                    assert await a.request(61, b"x", to=b.id) == b"x"
                    assert time.monotonic() - begun < 0.2 * slowness()
            assert refused > 100
            assert limit <= a.peers[700].queued < limit + 20_008
            await until(lambda: len(got) == 2000)
            # It is not lost either, as long as it shows signs of life.
            assert 700 in a.peers
        finally:
            raw.close()
        await a.wait_peers(1, 5)


async def test_a_guest_that_does_not_read_its_answers(registry_url: str) -> None:
    """What it asks for and does not take is bounded, and the node serves the others."""
    limit = MIB
    async with nodes(registry_url, "a", "b", queue_limit=limit) as (a, b):
        handled = 0

        def handler(ctx: Context) -> None:
            nonlocal handled
            handled += 1
            ctx.reply(bytes(50_000))

        b.subscribe(60, handler)
        await a.wait_subscribed(60, timeout=5)
        raw = await RawPeer.guest(a)
        guest = await connect(f"tcp://127.0.0.1:{a.port}")
        try:
            extend = struct.pack("<BHHHQI", 4, 60, 0xFFFF, 0, 1, 10_000)
            for asked in range(8, 801, 8):
                await raw.send(encode_frame(LibraryChannel.RELAY, b"", extend) * 8)
                await until(lambda asked=asked: handled == asked)
                await until(lambda: a.counters()["in_flight"] == 0)
            queued = max(s.queued for s in a._router.sessions())
            # One answer may pass the limit, and each refusal is a small frame.
            assert limit <= queued < limit + 50_017 + 800 * 160
            begun = time.monotonic()
            assert await guest.request(60, b"", 5) == bytes(50_000)
            assert time.monotonic() - begun < 0.2 * slowness()
        finally:
            raw.close()
            await guest.close()


# --------------------------------------------------------------------------------------------- fork


def test_a_forked_child_does_not_hide_its_parents_death(worker: Worker, sqlite_url: str) -> None:
    worker.ask("start", registry=sqlite_url)
    with workers("asyncio") as (parent,):
        parent.ask("start", registry=sqlite_url)
        [port] = parent.ask("ports")
        worker.ask("wait_peers", count=1)
        child = parent.ask("fork_and_stay")
        try:
            died = time.monotonic()
            parent.kill()
            parent.process.wait(10)
            worker.ask("wait_peers", count=0)
            assert time.monotonic() - died < 0.1 * slowness()
            os.kill(child, 0)  # the child is still there
            # Nor does it keep the port: who dials the dead is refused at once.
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), 1).close()
        finally:
            os.kill(child, signal.SIGKILL)
            until_now(lambda: not _alive(child))


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_the_parent_of_a_fork_goes_on(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        b.subscribe(60, echo)
        await a.wait_subscribed(60, timeout=5)
        ends = link(a, b)
        child = os.fork()
        if child == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert await a.request(60, b"x") == b"x"
        assert link(a, b) == ends


# ------------------------------------------------------------------------------------- odd wake-ups


async def test_spurious_wake_ups(registry_url: str) -> None:
    """A loop may call a reader or a writer for nothing, also one that is closed."""
    loop = asyncio.get_running_loop()
    async with nodes(registry_url, "a", "b") as (a, b):
        b.subscribe(60, echo)
        await a.wait_subscribed(60, timeout=5)
        ends = link(a, b)

        async def disturb() -> None:
            for _ in range(300):
                for end in ends:
                    loop.call_soon(end.writable)
                    loop.call_soon(end.readable)
                await asyncio.sleep(0)

        disturbing = asyncio.ensure_future(disturb())
        for number in range(100):
            data = bytes(number * 1000)
            assert await a.request(60, data) == data
        large = a.request(60, bytes(10 * MIB), 20)
        for end in ends:
            loop.call_soon(end.writable)
        assert len(await large) == 10 * MIB
        await disturbing
        assert link(a, b) == ends
        for end in ends:
            end.close("for the test")
            end.writable()
            end.readable()
            end.close("again")


@pytest.mark.parametrize("how", ["own session", "own node", "other session", "loop-back"])
async def test_a_handler_that_closes_what_it_runs_on(registry_url: str, how: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        got: list[bytes] = []
        closing: list[asyncio.Future[None]] = []

        def handler(ctx: Context) -> None:
            got.append(ctx.data)
            if how == "own session":
                session(b, a.id).close("by its handler")
            elif how == "other session":
                session(a, b.id).close("by the handler of the other end")
            elif how == "own node":
                b._router.stop("by its handler")
            else:
                closing.append(asyncio.ensure_future(a.close()))
                a._router.stop("by its handler")

        receiver = a if how == "loop-back" else b
        receiver.subscribe(60, handler)
        await a.wait_subscribed(60, timeout=5)
        request = a.request(60, b"request", None)
        for number in range(20):
            a.notify(60, b"%d" % number + bytes(number * 3000))
        with pytest.raises(DomiError):
            await asyncio.wait_for(request, 5)
        # Nothing of what lay behind it in the same read is handled any more.
        assert got[0] == b"request"
        if how != "other session":
            assert len(got) == 1
        await asyncio.gather(*closing)
        if how in ("own session", "other session"):
            await a.wait_peers(1, 5)
            await a.wait_subscribed(60, timeout=5)
            receiver.unsubscribe(60)
            receiver.subscribe(61, echo)
            await a.wait_subscribed(61, timeout=5)
            assert await a.request(61, b"alive") == b"alive"


async def test_an_async_handler_that_closes_its_node(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):

        async def handler(ctx: Context) -> None:
            await b.close()

        b.subscribe(60, handler)
        await a.wait_subscribed(60, timeout=5)
        begun = time.monotonic()
        with pytest.raises(DomiError):
            await a.request(60, b"", 5)
        await a.wait_peers(0, 5)
        assert time.monotonic() - begun < 1.0 * slowness()


# ---------------------------------------------------------------------------------- descriptors out


async def test_out_of_descriptors(registry_url: str) -> None:
    """EMFILE on accept: those inside are served, and those who wait are let in later."""
    async with nodes(registry_url, "a", "b", handshake_timeout=5.0) as (a, b):
        b.subscribe(60, echo)
        await a.wait_subscribed(60, timeout=5)
        waiting = [socket.socket() for _ in range(5)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        listener: Any = b._mesh._listeners[0]
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (waiting[0].fileno(), hard))
            for one in waiting:
                one.connect(("127.0.0.1", b.port))
                one.setblocking(False)
            await until(lambda: listener._retry is not None)
            assert await a.request(60, b"inside") == b"inside"
            assert len(b.peers) == 1
            assert b.counters()["accepts_put_off"] >= 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        try:
            for number, one in enumerate(waiting):
                name = encode_frame(LibraryChannel.NODE_NAME, struct.pack("<H", 700 + number))
                await asyncio.get_running_loop().sock_sendall(one, MAGIC + name)
            await b.wait_peers(1 + len(waiting), 5)
        finally:
            for one in waiting:
                one.close()
        await b.wait_peers(1, 5)


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_a_node_without_descriptors_idles_and_recovers_at_once(kind: str, sqlite_url: str) -> None:
    """Its process has opened as many files as it may. A newcomer waits, and costs it nothing."""
    settings: dict[str, Any] = {"registry": sqlite_url, "start_timeout": 0.0}
    with workers(kind, kind, kind) as (old, starved, newcomer):
        old.ask("start", **settings)
        [machine] = starved.ask("start", **settings)
        old.ask("wait_peers", count=1)
        starved.ask("watch_losses")
        assert starved.ask("hoard", most=256) > 100
        newcomer.ask("start", **settings)
        until_now(lambda: starved.ask("counters")[0].get("accepts_put_off", 0) > 0)
        used, begun = starved.ask("processor_time"), time.monotonic()
        time.sleep(3.0)
        used, took = starved.ask("processor_time") - used, time.monotonic() - begun
        assert used < 0.05 * took
        assert old.ask("request", machine=machine, channel=50, text="inside") == "inside"
        assert starved.ask("losses") == []
        assert len(starved.ask("sessions")[str(machine)]["peers"]) == 1
        let_go = starved.ask("let_go")
        assert starved.ask("wait_peers", count=2) - let_go < 1.0
        newcomer.ask("wait_peers", count=2)


async def test_who_connects_before_the_node_is_in_the_registry(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The port is open before the machine id is known: a connection waits or is refused."""
    node = Node("a", registry=registry_url)
    mesh: Any = node._mesh
    opening, go_on = asyncio.Event(), asyncio.Event()
    inner = mesh._registry.open

    async def slow() -> None:
        opening.set()
        await go_on.wait()
        await inner()

    mesh._registry.open = slow
    starting = asyncio.ensure_future(node.start())
    await opening.wait()
    raws = [await RawPeer.connect(node.port) for _ in range(3)]
    try:
        await raws[0].send(MAGIC + encode_frame(LibraryChannel.NODE_NAME, b"\x07\x00"))
        await raws[1].send(guest_greeting())
        for _ in range(10):
            await asyncio.sleep(0)
        go_on.set()
        await starting
        async with await connect(f"tcp://127.0.0.1:{node.port}") as guest:
            node.subscribe(60, echo)
            assert await guest.request(60, b"x", 2) == b"x"
        assert not [record for record in caplog.records if record.exc_info]
    finally:
        for raw in raws:
            raw.close()
        await node.close()
