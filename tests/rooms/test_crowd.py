"""Clients that misbehave, by the thousand; and one among many that does not read."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import SOAK
from tests.gateway.clients import EXPIRED, Closed, TcpClient, connected
from tests.reference import encode
from tests.rooms.groups import JOIN, SAID, Hall
from tests.rooms.parts import acquainted, gateway, zone
from tests.support import Worker, until

CYCLES = 10_000 if SOAK else 1_000
WARM_UP = 300
AT_ONCE = 16
PASSWORD = "open sesame"
SETTINGS: dict[str, Any] = {
    "tcp_port": 0,
    "password": PASSWORD,
    "authenticate_timeout": 0.5,
    "ping_interval": 0.5,
    "ping_timeout": 0.5,
    "grace": 0.2,
    "rate": 200.0,
    "burst": 100,
    "message_limit": 4096,
}
MIB = 1 << 20

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def masked(payload: bytes, first: int = 0x82) -> bytes:
    """A client's frame of a WebSocket, masked with zeros."""
    size = len(payload)
    head = bytes((first, 0x80 | size)) if size < 126 else struct.pack(">BBH", first, 0xFE, size)
    return head + bytes(4) + payload


def request(port: int, *headers: str) -> bytes:
    lines = [
        "GET / HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


HELLO = encode(1, PASSWORD.encode())


class Bad:
    """One client that misbehaves, in one of many ways."""

    def __init__(self, ports: Any, chance: random.Random) -> None:
        self.ports = ports
        self.chance = chance

    @contextlib.asynccontextmanager
    async def tcp(self, *, hello: bool = True) -> Any:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.ports.tcp_port)
        try:
            if hello:
                writer.write(HELLO)
                await reader.readexactly(36)
            yield reader, writer
        finally:
            writer.close()

    @contextlib.asynccontextmanager
    async def websocket(self, *headers: str, hello: bool = True) -> Any:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.ports.port)
        try:
            writer.write(request(self.ports.port, *headers))
            await reader.readuntil(b"\r\n\r\n")
            if hello:
                writer.write(masked(HELLO))
                await reader.readexactly(38)
            yield reader, writer
        finally:
            writer.close()

    def either(self, **settings: Any) -> tuple[Any, Callable[[bytes], bytes]]:
        if self.chance.random() < 0.5:
            return self.tcp(**settings), bytes
        return self.websocket(**settings), masked

    async def ended(self, reader: asyncio.StreamReader) -> None:
        """Until the gateway has closed it, for which it has 5 s."""
        await asyncio.wait_for(reader.read(-1), 5)

    async def malformed_frame(self) -> None:
        connection, wrap = self.either()
        async with connection as (reader, writer):
            writer.write(wrap(struct.pack("<IHH", 7, 0, 60)))
            await self.ended(reader)

    async def malformed_websocket_frame(self) -> None:
        async with self.websocket() as (reader, writer):
            bad = (b"\xff\xff\xff\xff", masked(b"x", 0xF2), b"\x82\x05hello", masked(b"", 0x8B))
            writer.write(self.chance.choice(bad) + os.urandom(64))
            await self.ended(reader)

    async def oversized(self) -> None:
        connection, wrap = self.either()
        async with connection as (reader, writer):
            writer.write(wrap(encode(60, bytes(5000))))
            await self.ended(reader)

    async def flood(self) -> None:
        connection, wrap = self.either()
        async with connection as (reader, writer):
            writer.write(wrap(encode(60, b"x")) * 400)
            await self.ended(reader)

    async def unauthenticated(self) -> None:
        connection, wrap = self.either(hello=False)
        async with connection as (reader, writer):
            writer.write(wrap(encode(1, b"wrong")))
            await self.ended(reader)

    async def no_hello(self) -> None:
        connection, wrap = self.either(hello=False)
        async with connection as (reader, writer):
            writer.write(wrap(encode(60, b"first")))
            await self.ended(reader)

    async def wrong_origin(self) -> None:
        async with self.websocket("Origin: http://elsewhere.example", hello=False) as (reader, _):
            await self.ended(reader)

    async def half_a_handshake(self) -> None:
        streams = await asyncio.open_connection("127.0.0.1", self.ports.port)
        streams[1].write(request(self.ports.port)[:60])
        await self.ended(streams[0])
        streams[1].close()

    async def silence(self) -> None:
        streams = await asyncio.open_connection("127.0.0.1", self.ports.tcp_port)
        await self.ended(streams[0])
        streams[1].close()

    async def half_open(self) -> None:
        """Has a session, and says nothing more, not even to a ping."""
        async with self.tcp() as (reader, _):
            await self.ended(reader)

    async def abort(self) -> None:
        connection, wrap = self.either()
        async with connection as (_, writer):
            writer.write(wrap(encode(60, b"x")) * 10)
            writer.transport.abort()

    async def hello_then_reset(self) -> None:
        sock = socket.create_connection(("127.0.0.1", self.ports.tcp_port))
        sock.sendall(HELLO)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    async def resume_with_junk(self) -> None:
        connection, wrap = self.either(hello=False)
        async with connection as (reader, writer):
            if self.chance.random() < 0.5:
                writer.write(wrap(encode(3, os.urandom(32))))
                head = await reader.readexactly(8 if wrap is bytes else 10)
                assert head[-2:] == struct.pack("<H", EXPIRED)
                writer.write(wrap(encode(3, os.urandom(31))))
            else:
                writer.write(wrap(os.urandom(40)))
            await self.ended(reader)

    async def leave(self) -> None:
        """Behaves, for once."""
        connection, wrap = self.either()
        async with connection as (reader, writer):
            writer.write(wrap(encode(60, b"x")))
            writer.write(wrap(encode(6)))
            await self.ended(reader)

    def ways(self) -> list[Callable[[], Awaitable[None]]]:
        return [
            self.malformed_frame,
            self.malformed_websocket_frame,
            self.oversized,
            self.flood,
            self.unauthenticated,
            self.no_hello,
            self.wrong_origin,
            self.half_a_handshake,
            self.silence,
            self.half_open,
            self.abort,
            self.hello_then_reset,
            self.resume_with_junk,
            self.leave,
        ]


class Innocent:
    """A client that says something all the time, and is answered."""

    def __init__(self, client: TcpClient) -> None:
        self.client = client
        self.took: list[float] = []
        self.over = False

    async def talk(self) -> None:
        number = 0
        while not self.over:
            begun = time.monotonic()
            await self.client.send(60, b"%d" % number)
            while (told := await self.client.take()).event != 61:
                assert told == (7, b"ping")
                await self.client.send(7, b"pong")
            assert told.data == b"%d" % number
            self.took.append(time.monotonic() - begun)
            number += 1
            await asyncio.sleep(0.02)

    @property
    def p99(self) -> float:
        return sorted(self.took)[len(self.took) * 99 // 100]


async def misbehave(ports: Any, count: int, seed: int) -> None:
    chance = random.Random(seed)
    bad = Bad(ports, chance)
    ways = itertools.islice(itertools.cycle(bad.ways()), count)

    async def some() -> None:
        for way in ways:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await way()

    await asyncio.gather(*[some() for _ in range(AT_ONCE)])


async def at_rest(worker: Worker) -> dict[str, int]:
    """What the process has, once all but the innocent have gone."""
    end = time.monotonic() + 10
    while True:
        usage: dict[str, int] = await worker.ask_later("usage")
        if usage["sessions"] == usage["connections"] == 1:
            return usage
        assert time.monotonic() < end, usage
        await asyncio.sleep(0.1)


async def test_bad_clients_leave_nothing_behind(
    sqlite_url: str, loop_kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = Worker(loop_kind, "tests.rooms.worker")
    try:
        ports = SimpleNamespace(
            **await worker.ask_later("gateway", url=sqlite_url, node={}, **SETTINGS)
        )
        async with connected(ports, "tcp") as client:
            await client.hello(PASSWORD.encode())
            assert isinstance(client, TcpClient)
            innocent = Innocent(client)
            talking = asyncio.ensure_future(innocent.talk())
            await misbehave(ports, WARM_UP, 1)
            before = await at_rest(worker)
            begun = time.monotonic()
            await misbehave(ports, CYCLES, 2)
            took = time.monotonic() - begun
            after = await at_rest(worker)
            innocent.over = True
            await talking
            with capsys.disabled():
                print(
                    f" {CYCLES} cycles in {took:.0f} s; before {before}, after {after}; "
                    f"the innocent's p99 {innocent.p99 * 1000:.0f} ms of {len(innocent.took)}",
                    end="",
                )
            assert abs(after["descriptors"] - before["descriptors"]) <= 2
            assert after["memory"] - before["memory"] < 4 * MIB
            assert after["tasks"] <= before["tasks"] + 2
            assert after["objects"] - before["objects"] < CYCLES / 4
            assert len(innocent.took) > took * 5
            assert innocent.p99 < 1.0
    finally:
        worker.reap()


# ------------------------------------------------------------------------------------ who is slow

WRITE_LIMIT = 64 * 1024
WORD = 32 * 1024
MEMBERS = 50


def word(number: int) -> bytes:
    return struct.pack("<I", number).ljust(WORD, b".")


def number_of(data: bytes) -> int:
    return int.from_bytes(data[:4], "little")


def take_frames(raw: bytes) -> list[bytes]:
    """The data of the whole counted frames in these bytes, raw TCP's."""
    found = []
    while len(raw) >= 8:
        length, _, event = struct.unpack_from("<IHH", raw)
        if len(raw) < length:
            break
        if event >= 8:
            found.append(raw[8:length])
        raw = raw[length:]
    return found


@pytest.mark.parametrize("history", [2000, 20], ids=["all is kept", "too little is kept"])
async def test_who_does_not_read_among_50_members(
    registry_url: str, history: int, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = asyncio.get_running_loop()
    limits = {"write_limit": WRITE_LIMIT, "history": history}
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        rooms = await enter(zone(registry_url, Hall))
        gate = await enter(gateway(registry_url, **limits))
        await acquainted([gate], [rooms])
        others = []
        for number in range(MEMBERS - 1):
            client = await enter(connected(gate, ("tcp", "websocket")[number % 2]))
            await client.hello()
            await client.write(1, JOIN)
            await client.expect(JOIN)
            others.append(client)
        slow = socket.socket()
        stack.callback(slow.close)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        slow.setblocking(False)
        await loop.sock_connect(slow, ("127.0.0.1", gate.tcp_port))
        await loop.sock_sendall(slow, encode(1))
        welcome = await loop.sock_recv(slow, 36)
        identity = welcome[8:32]
        await loop.sock_sendall(slow, encode(8, b"", struct.pack("<QQH", 0, 1, JOIN)))
        room = rooms.group(1)
        await until(lambda: len(room) == MEMBERS)
        user = int.from_bytes(identity[:8], "little")
        session_: Any = gate._sessions.get(user)
        transport = session_.connection._transport

        most = sent = 0
        begun = time.monotonic()
        while session_.connection is not None and sent < 1000:
            room.broadcast(SAID, word(sent))
            sent += 1
            # The others read, each of them, before it goes on.
            for client in others:
                assert number_of(await client.expect(SAID)) == sent - 1
            if session_.connection is not None:
                most = max(most, transport.get_write_buffer_size())
        assert session_.connection is None, "it was never cut"
        assert most <= WRITE_LIMIT
        assert gate.node.counters()["clients_slow"] == 1
        assert time.monotonic() - begun < 40
        assert len(room) == MEMBERS  # it is away, and may come back
        for _ in range(20):
            room.broadcast(SAID, word(sent))
            sent += 1
            for client in others:
                assert number_of(await client.expect(SAID)) == sent - 1

        # It reads at last, and comes back.
        had = b""
        with contextlib.suppress(ConnectionError):
            while data := await loop.sock_recv(slow, 1 << 16):
                had += data
        got = take_frames(had)
        if history == 20:
            async with connected(gate, "tcp") as again:
                await again.send(3, struct.pack("<24sQ", identity, len(got)))
                reason = (await again.expect(EXPIRED)).decode()
                assert reason.endswith("frames were missed, and 20 are kept")
                await again.hello()  # on the same connection
                await again.write(1, JOIN)
                await again.expect(JOIN)
            return
        words = [number_of(each) for each in got[1:]]
        resumptions = 0
        # What it gets at once may be more than may wait for it: then it comes by and by.
        while len(words) < sent:
            resumptions += 1
            assert resumptions < 20
            async with connected(gate, "tcp") as again:
                assert await again.resume(identity, len(words) + 1) == 1
                with contextlib.suppress(Closed, ConnectionError):
                    while len(words) < sent:
                        words.append(number_of(await again.expect(SAID)))
                    room.broadcast(SAID, b"now")
                    assert await again.expect(SAID) == b"now"
        assert words == list(range(sent))
        with capsys.disabled():
            print(
                f" {sent} words of {WORD} bytes, {most} waited, {resumptions} resumptions", end=""
            )
