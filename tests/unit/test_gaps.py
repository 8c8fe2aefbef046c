"""Promises that no other file shows: what the errors carry, what is set up, who waits for whom."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import logging
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import uvloop

import domi_fast
from domi_fast import (
    AlreadyReplied,
    CircuitOpen,
    ClusterFull,
    Context,
    DeadlineExceeded,
    DomiError,
    FrameError,
    Node,
    NodeConfig,
    NoSubscriber,
    Overloaded,
    PeerLost,
    RegistryError,
    RemoteError,
    RingFull,
    TimeWheel,
    VersionTooOld,
    _core,
    connect,
)
from domi_fast._core import engine_of
from domi_fast.registry import open_registry
from tests.conftest import LOOPS
from tests.property.test_codec import VECTORS, Vector, read_core, read_oracle, single_bytes
from tests.support import (
    MAGIC,
    RawPeer,
    forget_records,
    guest_greeting,
    nodes,
    session,
    slowness,
    until,
)

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
NARROW = 2**31 - 1


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


def echo(ctx: Context) -> None:
    ctx.reply(ctx.data)


def program(text: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", text, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# --------------------------------------------------------------------------------------- the codec

STREAMS = [
    vector
    for vector in VECTORS
    if vector.kind in ("frame", "hello", "subscriptions", "fault", "fault_magic")
]


@pytest.mark.parametrize("vector", STREAMS, ids=lambda vector: vector.name)
def test_a_vector_cut_anywhere_is_read_alike(vector: Vector) -> None:
    """Byte by byte, and split at every boundary: the core and the reference agree."""
    magic = vector.kind in ("hello", "fault_magic")
    whole = read_oracle([vector.raw], magic=magic)
    for pieces in (
        single_bytes(vector.raw),
        *([vector.raw[:place], vector.raw[place:]] for place in range(len(vector.raw) + 1)),
    ):
        found = read_core(pieces, magic=magic)
        assert found == read_oracle(pieces, magic=magic)
        assert found.fault == whole.fault
        # Of one piece that ends in a fault, the frames before it are not returned.
        assert found == whole or found.fault is not None


# ---------------------------------------------------------------------------------------- handlers


async def test_an_async_handler_that_waits_holds_nobody_up(registry_url: str) -> None:
    """Neither the next message of its own channel, nor anything else on the same session."""
    async with nodes(registry_url, "a", "b") as (a, b):
        go_on = asyncio.Event()
        tasks: set[Any] = set()

        async def waits(ctx: Context) -> None:
            tasks.add(asyncio.current_task())
            await go_on.wait()
            ctx.reply(ctx.data)

        b.subscribe(50, waits)
        b.subscribe(51, echo)
        await a.wait_subscribed(51, timeout=5)
        waiting = [a.request(50, b"%d" % number, None) for number in range(20)]
        await until(lambda: len(tasks) == 20)
        assert await a.request(51, b"meanwhile", 5) == b"meanwhile"
        assert not any(request.done() for request in waiting)
        assert None not in tasks
        go_on.set()
        assert await asyncio.gather(*waiting) == [b"%d" % number for number in range(20)]


async def test_the_log_names_channel_and_sender_of_what_failed(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):

        def fails(ctx: Context) -> None:
            raise ValueError("the reason")

        async def fails_later(ctx: Context) -> None:
            await asyncio.sleep(0)
            raise ValueError("the reason")

        b.subscribe(50, fails)
        b.subscribe(51, fails_later)
        await a.wait_subscribed(51, timeout=5)
        for channel in (50, 51):
            caplog.clear()
            a.notify(channel, b"")
            await until(lambda channel=channel: b.counters().get("handler_errors") == channel - 49)
            [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
            text = record.getMessage()
            assert f"channel {channel} " in text
            assert f"node {a.id}" in text
            assert record.exc_info is not None
            assert str(record.exc_info[1]) == "the reason"


async def test_an_error_to_a_plain_call_is_logged_and_counted(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        replies: list[bytes] = []
        b.subscribe(50, lambda ctx: ctx.error("not today"))
        b.subscribe(51, echo)
        a.subscribe(60, lambda ctx: replies.append(ctx.data))
        await a.wait_subscribed(51, timeout=5)
        a.call(50, b"x", 60)
        assert await a.request(51, b"") == b""
        assert b.counters()["call_errors"] == 1
        assert re.search(rf"channel 50: .*node {a.id} .*not today", caplog.text)
        assert not replies


# ---------------------------------------------------------------------------------------- delivery


async def test_nothing_arrives_twice_or_out_of_order_when_sessions_are_cut(
    registry_url: str,
) -> None:
    """What is lost with a session is not sent again, and the next one does not overtake it."""
    async with nodes(registry_url, "a", "b") as (a, b):
        got: list[int] = []
        b.subscribe(50, lambda ctx: got.append(int.from_bytes(ctx.data[:4], "big")))
        b.subscribe(51, echo)
        sent = 0
        for cut in range(25):
            await a.wait_subscribed(51, timeout=10)
            for _ in range(200):
                with suppress(DomiError):
                    a.notify(50, sent.to_bytes(4, "big") + bytes(sent % 7 * 3000), to=b.id)
                sent += 1
            # From either end, orderly or not, with much of it still on its way.
            mine, theirs = session(a, b.id), session(b, a.id)
            end = (mine, theirs)[cut % 2]
            if cut % 3 == 0:
                end.close("for the test")
            else:
                sock = socket.socket(fileno=os.dup(end.descriptor))
                sock.shutdown((socket.SHUT_RDWR, socket.SHUT_WR)[cut % 3 - 1])
                sock.close()
            await until(lambda mine=mine: mine.closed)
        await a.wait_subscribed(51, timeout=10)
        assert await a.request(51, b"last") == b"last"
        assert got
        assert len(got) < sent, "nothing was lost, so nothing was shown"
        assert got == sorted(set(got))


async def test_a_lost_node_is_out_of_every_table_when_its_requests_end(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c") as (a, b, c):
        kept: list[Context] = []
        b.subscribe(50, kept.append)
        c.subscribe(50, echo)
        b.subscribe(51, kept.append)
        await a.wait_subscribed(50, 2, 5)
        await a.wait_subscribed(51, timeout=5)
        found: list[tuple[Any, ...]] = []

        def ended(request: Any) -> None:
            with pytest.raises(PeerLost):
                a.notify(50, b"", to=lost)
            with pytest.raises(NoSubscriber):
                a.notify(51, b"")
            found.append((type(request.exception()), a.subscribers(50), list(a.peers)))

        lost = b.id
        request = a.request(50, b"", None, to=lost)
        request.add_done_callback(ended)
        await until(lambda: kept)
        session(b, a.id).close("for the test")
        await until(lambda: found)
        assert found == [(PeerLost, [c.id], [c.id])]
        # Round robin goes on with those that are left.
        assert await asyncio.gather(*(a.request(50, b"%d" % n) for n in range(4))) == [
            b"%d" % n for n in range(4)
        ]


# ------------------------------------------------------------------------------- sockets and timers


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
        async with nodes(registry_url, "a", "b") as (a, b):
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


def watched_sockets() -> set[int]:
    """Inodes of what the selectors of this process watch, as the kernel tells it."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            if os.readlink(entry) == "anon_inode:[eventpoll]":
                text = Path("/proc/self/fdinfo", entry.name).read_text()
                found |= {int(inode, 16) for inode in re.findall(r"^tfd:.* ino:(\w+)", text, re.M)}
    return found


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
                value = {
                    "name": "deaf",
                    "version": "0",
                    "host": "127.0.0.1",
                    "port": deaf.getsockname()[1],
                    "unix_path": None,
                    "instance": bytes(16).hex(),
                    "machine": "",
                }
                key = f"domi/default/nodes/{machine:04d}"
                await registry.create(key, json.dumps(value).encode(), lease=lease)
            async with Node("a", registry=registry_url, start_timeout=0.0):
                await until(lambda: engine_of(loop).timers >= 50)
                waited = 0
                while waited < 200:
                    # Those that dial at this moment are not waiting.
                    if engine_of(loop).timers >= 45:
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
        value = {
            "name": "shut",
            "version": "0",
            "host": "127.0.0.1",
            "port": server.getsockname()[1],
            "unix_path": None,
            "instance": bytes(16).hex(),
            "machine": "",
        }
        lease = await registry.grant(60)
        await registry.create("domi/default/nodes/0900", json.dumps(value).encode(), lease=lease)
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
        value = {
            "name": "deaf",
            "version": "0",
            "host": "127.0.0.1",
            "port": deaf.getsockname()[1],
            "unix_path": None,
            "instance": bytes(16).hex(),
            "machine": "",
        }
        lease = await registry.grant(60)
        await registry.create("domi/default/nodes/0123", json.dumps(value).encode(), lease=lease)
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


async def test_a_node_whose_lease_is_over_opens_no_session(registry_url: str) -> None:
    """It keeps those that live, and lets others in once it holds a machine id again."""
    async with nodes(registry_url, "a", "b", lease_ttl=0.2) as (a, b):
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        ends = session(a, b.id), session(b, a.id)
        members: Any = a._mesh._members
        grant = members._registry.grant
        back = asyncio.Event()

        async def away(ttl: float) -> Any:
            await back.wait()
            return await grant(ttl)

        members._registry.grant = away
        lease = members._claim.lease
        await lease.revoke()
        lease.lost.set()
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


# ------------------------------------------------------------------------------------------ errors

ERRORS = [
    *(NoSubscriber, PeerLost, DeadlineExceeded, CircuitOpen, Overloaded, RingFull, FrameError),
    *(AlreadyReplied, domi_fast.AuthError, RegistryError, ClusterFull, VersionTooOld, DomiError),
]


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_carries_its_facts_wherever_it_goes(kind: type[DomiError]) -> None:
    error: Any = kind("the message", channel=50, peer=7, limit=1.5)
    error.note = "more"
    for one in (
        error,
        copy.copy(error),
        copy.deepcopy(error),
        *(pickle.loads(pickle.dumps(error, level)) for level in range(pickle.HIGHEST_PROTOCOL + 1)),
    ):
        assert type(one) is kind
        assert str(one) == "the message"
        assert vars(one) == {"channel": 50, "peer": 7, "limit": 1.5, "note": "more"}
    bare = kind()
    assert (bare.channel, bare.peer, bare.limit) == (None, None, None)
    assert isinstance(error, DomiError)


def test_a_remote_error_carries_type_and_message() -> None:
    error = RemoteError("ValueError", "no luck", channel=50, peer=7)
    for one in (error, copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (one.type, one.message, one.channel, one.peer) == ("ValueError", "no luck", 50, 7)
        assert str(one) == "ValueError: no luck"
    assert isinstance(error, DomiError)


def test_the_tree_of_errors() -> None:
    public = {getattr(domi_fast, name) for name in domi_fast.__all__}
    found = {kind for kind in public if isinstance(kind, type) and issubclass(kind, Exception)}
    assert found == {*ERRORS, RemoteError}
    assert issubclass(DeadlineExceeded, TimeoutError)
    assert issubclass(RingFull, Overloaded)
    assert issubclass(ClusterFull, RegistryError)


# ------------------------------------------------------------------------------- what is to be read


def test_everything_public_says_what_it_is() -> None:
    for name in domi_fast.__all__:
        assert getattr(domi_fast, name).__doc__, name


def test_a_nodes_verbs_are_as_documented(registry_url: str) -> None:
    node = Node("a", registry=registry_url)
    signatures = {
        "subscribe": "(channel, handler=Ellipsis)",
        "unsubscribe": "(channel)",
        "notify": "(channel, data, *, to=None)",
        "publish": "(channel, data, *, to=None)",
        "call": "(channel, data, reply_channel, *, to=None)",
        "ventilator": "(channels, data)",
        "drained": "(peer)",
        "counters": "()",
        "subscribers": "(channel)",
    }
    for name, signature in signatures.items():
        verb = getattr(node, name)
        assert str(inspect.signature(verb)) == signature
        assert verb.__doc__
        # The core's own: nothing in Python stands before it.
        assert inspect.isbuiltin(verb)
        assert verb.__self__ is node._router
    assert inspect.isbuiltin(node.request)
    assert node.request.__doc__.startswith("Send to one subscriber, round robin")
    parameters = inspect.signature(node.watch_channel).parameters
    assert list(parameters) == ["channel", "maxsize"]
    assert parameters["maxsize"].default == 1024
    for name in ("start", "close", "wait_subscribed", "wait_peers"):
        assert inspect.iscoroutinefunction(getattr(node, name))
        assert getattr(Node, name).__doc__


def test_the_docstring_of_a_node_leads_to_its_settings() -> None:
    text = inspect.getdoc(Node) or ""
    assert text.startswith("A node of the mesh")
    assert "NodeConfig" in text
    described = set(re.findall(r":ivar (\w+):", inspect.getdoc(NodeConfig) or ""))
    unbuilt = {"http_port", "secret", "tls", "insecure", "busy_poll"}
    assert set(NodeConfig.__dataclass_fields__) - unbuilt <= described


def test_a_wrong_keyword_is_answered_with_the_right_ones(registry_url: str) -> None:
    with pytest.raises(TypeError) as refused:
        Node("a", registry=registry_url, wrong=1)
    text = str(refused.value)
    assert text.startswith("Node has no setting wrong; it has name, version, cluster, host")
    assert all(field in text for field in NodeConfig.__dataclass_fields__)
    # What is right in name and wrong in kind is not mistaken for it.
    with pytest.raises(TypeError, match="port 'x': int is wanted"):
        Node("a", registry=registry_url, port="x")


async def test_a_wrong_keyword_of_a_guest() -> None:
    with pytest.raises(TypeError, match="wrong"):
        await connect("tcp://127.0.0.1:1", wrong=1)


def test_the_first_screen_of_the_readme() -> None:
    """What it is, ten lines of code, two commands: within fifty lines, before any heading."""
    screen = (ROOT / "README.md").read_text().partition("\n## ")[0].splitlines()
    assert len(screen) <= 55
    text = "\n".join(screen)
    assert text.startswith("# domi_fast\n")
    first = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 10
    assert re.search(r"^make demo\b", text, re.MULTILINE)
    assert re.search(r"^make test\b", text, re.MULTILINE)


# ------------------------------------------------------------------------------ 64 bits and builds


def test_a_32_bit_python_may_not_build_it() -> None:
    """No 32-bit interpreter is at hand: sys.maxsize says 2**31-1 once the tools are imported."""
    done = program(
        "import runpy, sys\n"
        "import Cython.Build, setuptools.command.build_ext\n"
        f"sys.maxsize = {NARROW}\n"
        "sys.argv = ['setup.py', '--name']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "64-bit Python" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_32_bit_python_may_not_import_it() -> None:
    """As above; the extension itself was of course built for 64 bits."""
    done = program(
        "import sys\n"
        "import asyncio, logging, weakref, uvloop, packaging.version\n"
        f"sys.maxsize = {NARROW}\n"
        "try:\n"
        "    import domi_fast\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "else:\n"
        "    print('imported')\n",
        PYTHONPATH=absolute_paths(),
    )
    assert done.returncode == 0, done.stderr
    assert "64-bit Python" in done.stdout


def absolute_paths() -> str:
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(os.path.abspath(path) for path in paths if path)


@pytest.mark.parametrize("name", ["DOMI_DEBUG", "DOMI_SANITIZE"])
def test_a_variant_is_switched_by_0_or_1(name: str) -> None:
    done = program(
        "import runpy, sys; sys.argv = ['setup.py', '--name'];"
        "runpy.run_path('setup.py', run_name='__main__')",
        **{name: "yes"},
    )
    assert done.returncode == 1
    assert f"{name} is 'yes': set it to 1, or to 0." in done.stderr


def test_the_build_under_test_is_the_one_that_was_asked_for() -> None:
    """The targets of the Makefile say by the environment which build they test."""
    path = _core.__file__
    assert path is not None
    if os.environ.get("DOMI_DEBUG") == "1":
        assert _core.is_debug_build()
    if os.environ.get("DOMI_SANITIZE") == "1":
        code = Path(path).read_bytes()
        assert b"__asan_init" in code
        assert b"__ubsan_handle" in code
        assert "libasan" in Path("/proc/self/maps").read_text()


async def test_a_debug_build_counts_what_lives(registry_url: str) -> None:
    """And a release counts nothing. That nothing is left is asserted after every test."""
    before = _core.live_objects()
    assert set(before) == {"sessions", "segments", "tails", "large_frames", "timers"}
    wheel = TimeWheel()
    wheel.call_later(1.0, print)
    reader = _core.FrameReader()
    reader.feed(_core.encode_frame(50, bytes(100))[:-1])
    large = _core.FrameReader()
    large.feed(_core.encode_frame(50, bytes(100_000))[:50_000])
    queue = _core.WriteQueue()
    queue.push(50, b"data")
    async with nodes(registry_url, "a", "b"):
        now = _core.live_objects()
        grown = {name for name, count in now.items() if count > before[name]}
        if _core.is_debug_build():
            assert grown == set(before)
            assert now["sessions"] - before["sessions"] == 4  # two ends, and two loop-backs
        else:
            assert not grown
            assert not any(now.values())
    del reader, large, queue
    wheel.clear()
    del wheel


# ------------------------------------------------------------------------------------ the workshop


async def test_coroutine_tests_run_on_both_loops(loop_kind: str) -> None:
    assert set(LOOPS) == {"asyncio", "uvloop"}
    loop = asyncio.get_running_loop()
    assert isinstance(loop, uvloop.Loop) == (loop_kind == "uvloop")
    assert isinstance(loop, asyncio.SelectorEventLoop) == (loop_kind == "asyncio")


def test_warnings_and_unknown_markers_are_errors(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("filterwarnings")[0] == "error"
    assert {"--strict-markers", "--strict-config"} <= set(pytestconfig.getini("addopts"))
    assert pytestconfig.getini("xfail_strict") is True


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As from a shell: nothing of a make that runs these tests is inherited."""
    ours = {
        name: text for name, text in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env=ours,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_make_help_names_every_target() -> None:
    done = make("help")
    assert done.returncode == 0, done.stderr
    listed = dict(re.findall(r"^  ([a-z-]+)\s+(\S.*)$", done.stdout, re.MULTILINE))
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert set(listed) == set(phony[1].replace("\\\n", " ").split())
    assert {"demo", "test", "lint", "bench", "soak", "test-debug", "test-asan"} <= set(listed)
    # And it is what make says when it is not told anything.
    assert make().stdout == done.stdout


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        ("sys.version_info = (3, 9, 18, 'final', 0)", "is Python 3.9; 3.10 or later is needed"),
        (f"sys.maxsize = {NARROW}", "is a 32-bit Python; a 64-bit one is needed"),
        ("sys.modules['venv'] = None", "cannot make virtual environments"),
        ("os.environ['CC'] = '/nonexistent/cc'", "there is no C compiler"),
    ],
)
def test_make_says_what_a_machine_lacks(tmp_path: Path, fake: str, message: str) -> None:
    """With a Python that says of itself what a machine may come with."""
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport os, sys\n{fake}\n"
        "assert sys.argv[1] == '-c'\nexec(sys.argv[2])\n"
    )
    python.chmod(0o755)
    done = make("setup", f"PYTHON={python}", f"VENV={tmp_path}/venv")
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "venv").exists()


def test_what_a_change_must_pass() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    steps = re.search(r"^for target in (.*); do$", script, re.MULTILINE)
    assert steps is not None
    targets = steps[1].split()
    assert {
        *("lint", "test", "test-debug", "test-asan", "test-oldest", "test-newest"),
        *("check-sdist", "bench-smoke"),
    } <= set(targets)
    rules = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", rules, re.MULTILINE) for target in targets)
    recipe = rules.partition("\nlint:")[2].partition("\n\n")[0]
    for tool in ("ruff check", "ruff format --check", "cython-lint", "mypy", "stubtest"):
        assert tool in recipe
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=False).returncode == 0
