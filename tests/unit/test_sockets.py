"""Sockets and timers under live nodes: writers, descriptors, the wheel, dialling again."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from domi_fast import (
    Node,
    PeerLost,
    TimeWheel,
    _core,
    connect,
    transport,
)
from domi_fast._core import engine_of
from domi_fast.registry import open_registry
from tests.conftest import LOOPS
from tests.support import (
    MAGIC,
    RawPeer,
    echo,
    forget_records,
    guest_greeting,
    nodes,
    session,
    slowness,
    until,
)

MIB = 1 << 20


def entry(name: str, sock: socket.socket) -> bytes:
    """What the registry holds of a node that listens, or seems to, on this socket."""
    fields = {
        "name": name,
        "version": "0",
        "host": "127.0.0.1",
        "port": sock.getsockname()[1],
        "unix_path": None,
        "mark": bytes(16).hex(),
        "machine": "",
    }
    return json.dumps(fields).encode()


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


def watched_sockets() -> set[int]:
    """Inodes of what the selectors of this process watch, as the kernel tells it."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            if os.readlink(entry) == "anon_inode:[eventpoll]":
                text = Path("/proc/self/fdinfo", entry.name).read_text()
                found |= {int(inode, 16) for inode in re.findall(r"^tfd:.* ino:(\w+)", text, re.M)}
    return found


def test_a_writer_is_registered_only_when_the_kernel_is_full(
    registry_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On asyncio's loop, of which the calls can be counted."""

    async def work() -> None:
        loop = asyncio.get_running_loop()
        calls: Counter[str] = Counter()
        for name in ("add_writer", "remove_writer"):
            inner = getattr(loop, name)

            def counted(*arguments: Any, name: str = name, inner: Any = inner) -> Any:
                calls[name] += 1
                return inner(*arguments)

            monkeypatch.setattr(loop, name, counted)
        # A heartbeat that finds the kernel full would be one more who waits for it.
        quiet = {"heartbeat_interval": 600.0, "heartbeat_timeout": 1200.0}
        async with nodes(registry_url, "a", "b", **quiet) as (a, b):
            b.subscribe(50, echo)
            await a.wait_subscribed(50, timeout=5)
            raw = await RawPeer.plain(a, 700, receive_buffer=4096)
            try:
                calls.clear()
                for number in range(300):
                    assert await a.request(50, b"%d" % number) == b"%d" % number
                assert not calls
                while a.peers[700].queued < MIB:
                    a.notify(60, bytes(60_000), to=700)
                    await asyncio.sleep(0)
                assert calls == {"add_writer": 1}
                room = session(a, 700).drained(everything=True)
                while not room.done():
                    await raw.frame_on(60)
                await until(lambda: calls["remove_writer"] == 1)
                assert calls == {"add_writer": 1, "remove_writer": 1}
            finally:
                raw.close()
            await a.wait_peers(1, 5)

    loop = LOOPS["asyncio"]()
    try:
        loop.run_until_complete(asyncio.wait_for(work(), 60))
    finally:
        loop.close()


@pytest.mark.parametrize("full", [False, True])
async def test_a_descriptor_is_closed_after_its_registrations(
    registry_url: str, full: bool
) -> None:
    """Closed first, what another descriptor keeps alive would be watched for ever."""
    async with nodes(registry_url, "a") as (a,):
        raw = await RawPeer.plain(a, 700, receive_buffer=4096)
        if full:
            # A writer is registered too.
            while a.peers[700].queued < MIB:
                a.notify(60, bytes(60_000), to=700)
                await asyncio.sleep(0)
        kept = os.dup(session(a, 700).descriptor)
        try:
            inode = os.fstat(kept).st_ino
            assert inode in watched_sockets()
            session(a, 700).close("for the test")
            # A loop may put off what it tells the kernel until it waits.
            await until(lambda: inode not in watched_sockets())
        finally:
            os.close(kept)
            raw.close()


def test_the_wheel_carries_the_heartbeats(registry_url: str) -> None:
    """A hundred sessions have a timer each in the wheel, and the loop a handful for all of them."""

    async def work() -> None:
        loop: Any = asyncio.get_running_loop()
        async with nodes(registry_url, "a", heartbeat_interval=0.1, heartbeat_timeout=60) as (a,):
            raws = [await RawPeer.connect(a.port) for _ in range(100)]
            try:
                for raw in raws:
                    await raw.send(guest_greeting())
                await until(lambda: len(a._router.sessions()) == 100)
                sessions = a._router.sessions()
                before = [one.bytes_out for one in sessions]
                most = 0
                # Three heartbeats of eight bytes each, without a timer of this test's own.
                while any(
                    one.bytes_out < sent + 24 for one, sent in zip(sessions, before, strict=True)
                ):
                    assert engine_of(loop).timers >= 100
                    most = max(most, sum(not one.cancelled() for one in loop._scheduled))
                    await asyncio.sleep(0)
                assert 0 < most < 10
            finally:
                for raw in raws:
                    raw.close()
            await until(lambda: not a._router.sessions())

    loop = LOOPS["asyncio"]()
    try:
        loop.run_until_complete(asyncio.wait_for(work(), 60))
    finally:
        loop.close()


def test_a_timer_costs_the_same_however_many_there_are() -> None:
    """Setting and taking back: no dearer among 200,000 than among ten."""

    def cost(others: int) -> float:
        wheel = TimeWheel()
        for number in range(others):
            wheel.call_later(1.0 + number * 0.001, print)
        best = float("inf")
        for _ in range(7):
            begun = time.process_time()
            for _ in range(20_000):
                wheel.call_later(30.0, print).cancel()
            best = min(best, time.process_time() - begun)
        assert len(wheel) == others
        wheel.clear()
        return best

    # A logarithm would be above 4, and a list above 10,000.
    assert cost(200_000) < 3 * cost(10)


def test_the_wheel_carries_the_reconnections(registry_url: str) -> None:
    """Fifty nodes out of reach wait in the wheel, and the loop has a handful of timers."""

    async def work() -> None:
        loop: Any = asyncio.get_running_loop()
        registry = open_registry(registry_url)
        await registry.open()
        lease = await registry.grant(60)
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))
            for machine in range(900, 950):
                value = entry("deaf", deaf)
                key = f"domi/default/nodes/{machine:04d}"
                await registry.create(key, value, lease=lease)
            async with Node("a", registry=registry_url, start_timeout=0.0):
                await until(lambda: engine_of(loop).timers >= 50)
                waited = 0
                while waited < 200:
                    # One that dials at this moment is not waiting, and has a timer of the loop.
                    if engine_of(loop).timers >= 50:
                        waited += 1
                        assert sum(not one.cancelled() for one in loop._scheduled) < 10
                    await asyncio.sleep(0)
        await lease.revoke()
        await registry.close()

    loop = LOOPS["asyncio"]()
    try:
        loop.run_until_complete(asyncio.wait_for(work(), 60))
    finally:
        loop.close()


async def test_dialling_backs_off_with_jitter(registry_url: str) -> None:
    """A registered node that takes no connection is tried again: ever later, and never in step."""
    registry = open_registry(registry_url)
    await registry.open()
    times: dict[int, list[float]] = {}
    loop = asyncio.get_running_loop()
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    raws: list[socket.socket] = []

    def accept() -> None:
        sock, _ = server.accept()
        sock.setblocking(False)
        raws.append(sock)
        loop.add_reader(sock, hello, sock, b"")

    def hello(sock: socket.socket, before: bytes) -> None:
        # Magic, header, machine id: who it is that dials.
        data = before + sock.recv(4096)
        loop.remove_reader(sock)
        if len(data) < 14:
            loop.add_reader(sock, hello, sock, data)
            return
        times.setdefault(struct.unpack_from("<H", data, 12)[0], []).append(time.monotonic())
        sock.close()

    loop.add_reader(server, accept)
    try:
        value = entry("shut", server)
        lease = await registry.grant(60)
        await registry.create("domi/default/nodes/0900", value, lease=lease)
        one = Node("a", registry=registry_url, start_timeout=0.0)
        two = Node("b", registry=registry_url, start_timeout=0.0)
        async with one as a, two as b:
            await until(lambda: len(times) == 2 and min(map(len, times.values())) >= 7, 20)
            assert set(times) == {a.id, b.id}
            ratios = []
            for found in times.values():
                gaps = [later - one for one, later in pairwise(found)]
                # Nominally 20 ms, then twice as long each time up to a second.
                assert gaps[5] > 3 * min(gaps[:2])
                assert max(gaps) < 1.5 + 0.5 * slowness()
                ratios += [gaps[number] / (0.02 * 2**number) for number in (3, 4, 5)]
            assert max(ratios) > 1.03 * min(ratios), "all waited for exactly their turn"
    finally:
        loop.remove_reader(server)
        for sock in raws:
            if sock.fileno() >= 0:
                loop.remove_reader(sock)
            sock.close()
        server.close()
        await registry.close()


async def test_start_names_those_that_do_not_answer(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    registry = open_registry(registry_url)
    await registry.open()
    deaf = socket.create_server(("127.0.0.1", 0))
    try:
        value = entry("deaf", deaf)
        lease = await registry.grant(60)
        await registry.create("domi/default/nodes/0123", value, lease=lease)
        async with nodes(registry_url, "a", start_timeout=0.0) as (a,):
            begun = time.monotonic()
            async with Node("b", registry=registry_url, start_timeout=0.3) as b:
                assert 0.3 <= time.monotonic() - begun < 0.3 + 1.0 * slowness()
                assert list(b.peers) == [a.id]
                texts = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
                [text] = [one for one in texts if one.startswith(f"node {b.id} started without")]
                assert "[123]" in text
    finally:
        deaf.close()
        await registry.close()


async def test_the_plain_protocol_where_the_node_was_declared_open(registry_url: str) -> None:
    async with nodes(registry_url, "a", host="0.0.0.0", insecure=True) as (a,):
        a.subscribe(50, echo)
        raw = await RawPeer.plain(a, 700)
        try:
            await raw.send(_core.encode_frame(50, b"hi", struct.pack("<HH", 700, 51)))
            assert (await raw.frame_on(51)).data == b"hi"
        finally:
            raw.close()
        await a.wait_peers(0, 5)


async def lose_the_lease(node: Node) -> asyncio.Event:
    """Its lease is over, and it gets no other one until the event is set."""
    members: Any = node._mesh._members
    grant = members._registry.grant
    back = asyncio.Event()

    async def away(ttl: float) -> Any:
        await back.wait()
        return await grant(ttl)

    members._registry.grant = away
    lease = members._claim.lease
    await lease.revoke()
    lease.lost.set()
    return back


async def test_a_node_that_hears_that_its_id_is_anothers_serves_nobody_under_it(
    registry_url: str,
) -> None:
    """It cannot reach the registry; a peer that can tells it, and its guests are let go."""
    async with nodes(registry_url, "a", "b", lease_ttl=0.2) as (a, b):
        a.subscribe(50, echo)
        guest = await connect(f"tcp://127.0.0.1:{a.port}")
        assert await guest.request(50, b"x") == b"x"
        back = await lose_the_lease(a)
        try:
            async with Node("c", registry=registry_url) as c:
                assert c.id == a.id
                await until(lambda: [peer.name for peer in b.peers.values()] == ["c"])
                await until(lambda: a._router.sessions() == [])
                with pytest.raises(PeerLost):
                    guest.notify(50, b"x")
                assert not a.peers
                back.set()
                await b.wait_peers(2, 5)
                assert {peer.name for peer in b.peers.values()} == {"a", "c"}
                assert a.id != c.id
        finally:
            back.set()
            await guest.close()


async def test_a_node_whose_lease_is_over_opens_no_session(registry_url: str) -> None:
    """It keeps those that live, and lets others in once it holds a machine id again."""
    async with nodes(registry_url, "a", "b", lease_ttl=0.2) as (a, b):
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        ends = session(a, b.id), session(b, a.id)
        back = await lose_the_lease(a)
        # Nobody else shall have the id meanwhile.
        registry = open_registry(registry_url)
        await registry.open()
        kept = await registry.grant(60)
        await registry.create(f"domi/default/nodes/{a.id:04d}", b"{}", lease=kept)
        raw = await RawPeer.connect(a.port)
        late = Node("c", registry=registry_url, start_timeout=0.3)
        try:
            name = _core.encode_frame(65510, struct.pack("<H", 700))
            await raw.send(MAGIC + name)
            with pytest.raises(EOFError):
                await raw.frame()
            await late.start()
            with pytest.raises(PeerLost, match="does not hold a machine id at this moment"):
                await connect(f"tcp://127.0.0.1:{a.port}")
            assert list(late.peers) == [b.id]
            assert list(a.peers) == [b.id]
            assert (session(a, b.id), session(b, a.id)) == ends
            assert await a.request(50, b"still") == b"still"
            await kept.revoke()
            back.set()
            await a.wait_peers(2, 5)
            await late.wait_peers(2, 5)
        finally:
            back.set()
            raw.close()
            await late.close()
            await registry.close()


# ---------------------------------------------------------------------------------------- dialling


async def test_a_dial_waits_for_who_takes_no_more_at_the_moment() -> None:
    """And one that is given up leaves no descriptor."""
    with socket.socket() as listener, ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        while True:
            other = stack.enter_context(socket.socket())
            other.setblocking(False)
            if other.connect_ex(("127.0.0.1", port)) == errno.EINPROGRESS:
                break
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(transport.dial("127.0.0.1", port, None), 0.05)
        assert len(os.listdir("/proc/self/fd")) == before
        dialling = asyncio.ensure_future(transport.dial("127.0.0.1", port, None))
        await asyncio.sleep(0.05)
        assert not dialling.done()
        listener.setblocking(False)
        while not dialling.done():
            with suppress(BlockingIOError):
                stack.enter_context(listener.accept()[0])
            await asyncio.sleep(0.01)
        os.close(await dialling)


async def test_a_dial_that_is_refused_says_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            await transport.dial("127.0.0.1", taken.getsockname()[1], None)
