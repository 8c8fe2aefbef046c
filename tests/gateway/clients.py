"""Clients of a gateway, over raw TCP and over a WebSocket, that keep what they are told."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosed

from tests.reference import encode

HELLO, WELCOME, RESUME, RESUMED, EXPIRED, BYE, HEARTBEAT, GROUP, REFUSED, LOST = range(1, 11)
PATIENCE = 10.0


class Told(NamedTuple):
    event: int
    data: bytes


class Closed(Exception):
    """The gateway has closed the connection."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


class Client:
    """What both have in common. ``received`` counts as the protocol says."""

    def __init__(self) -> None:
        self.session = b""
        self.user = 0
        self.grace = 0
        self.received = 0
        self.sent = 0

    async def send_raw(self, raw: bytes) -> None:
        raise NotImplementedError

    async def take_raw(self) -> bytes:
        raise NotImplementedError

    async def send(self, event: int, data: bytes = b"", extend: bytes = b"") -> None:
        if event >= GROUP:
            self.sent += 1
        await self.send_raw(encode(event, data, extend))

    async def write(self, group: int, event: int, data: bytes = b"", node: int = 0) -> None:
        """To a group."""
        await self.send(GROUP, data, struct.pack("<QQH", node, group, event))

    async def take(self) -> Told:
        """The next frame, whatever it is."""
        raw = await asyncio.wait_for(self.take_raw(), PATIENCE)
        length, extend, event = struct.unpack_from("<IHH", raw)
        assert (length, extend) == (len(raw), 0)
        if event >= GROUP:
            self.received += 1
        return Told(event, raw[8:])

    async def expect(self, event: int) -> bytes:
        """The data of the next frame, which is of this event."""
        told = await self.take()
        assert told.event == event, told
        return told.data

    async def hello(self, data: bytes = b"") -> None:
        await self.send(HELLO, data)
        await self.welcomed()

    async def welcomed(self) -> None:
        welcome = await self.expect(WELCOME)
        self.session, self.grace = struct.unpack("<24sI", welcome)
        self.user = int.from_bytes(self.session[:8], "little")

    async def hello_after_pings(self) -> None:
        """As ``hello`` where the gateway may have pinged meanwhile."""
        await self.send(HELLO)
        while (told := await self.take()).event == HEARTBEAT:
            pass
        assert told.event == WELCOME
        self.session, self.grace = struct.unpack("<24sI", told.data)
        self.user = int.from_bytes(self.session[:8], "little")

    async def resume(self, session: bytes, received: int) -> int:
        """How many frames the gateway has; raises Closed or AssertionError when it is not to be."""
        self.session, self.received = session, received
        self.user = int.from_bytes(session[:8], "little")
        await self.send(RESUME, struct.pack("<24sQ", session, received))
        count, self.grace = struct.unpack("<QI", await self.expect(RESUMED))
        return int(count)

    async def refused(self) -> tuple[int, int, int, str]:
        """Group, event, code and reason of the REFUSED that comes next."""
        data = await self.expect(REFUSED)
        return (*struct.unpack_from("<QHH", data), data[12:].decode())

    async def closed(self) -> Closed:
        """How the gateway closes the connection; what comes before that is dropped."""
        try:
            while True:
                await self.take()
        except Closed as closed:
            return closed
        except ConnectionError as error:
            return Closed(1006, str(error))

    async def close(self) -> None:
        raise NotImplementedError

    def cut(self) -> None:
        """As a network that is gone: no word of farewell."""
        raise NotImplementedError


class TcpClient(Client):
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__()
        self.reader = reader
        self.writer = writer

    async def send_raw(self, raw: bytes) -> None:
        self.writer.write(raw)
        await self.writer.drain()

    async def take_raw(self) -> bytes:
        try:
            head = await self.reader.readexactly(8)
        except asyncio.IncompleteReadError:
            raise Closed(1006, "") from None
        raw = head + await self.reader.readexactly(struct.unpack_from("<I", head)[0] - 8)
        if raw[6:8] == struct.pack("<H", BYE):
            raise Closed(struct.unpack_from("<H", raw, 8)[0], raw[10:].decode())
        return raw

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    def cut(self) -> None:
        self.writer.transport.abort()


class WebSocketClient(Client):
    def __init__(self, connection: ClientConnection) -> None:
        super().__init__()
        self.connection = connection

    async def send_raw(self, raw: bytes) -> None:
        await self.connection.send(raw)

    async def take_raw(self) -> bytes:
        try:
            message = await self.connection.recv()
        except ConnectionClosed as closed:
            close = closed.rcvd
            raise Closed(close.code if close else 1006, close.reason if close else "") from None
        assert isinstance(message, bytes)
        return message

    async def close(self) -> None:
        await self.connection.close()

    def cut(self) -> None:
        self.connection.transport.abort()


@contextlib.asynccontextmanager
async def connected(
    gateway: Any, carrier: str = "websocket", **settings: Any
) -> AsyncIterator[Client]:
    """A client that has said nothing yet."""
    client: Client
    if carrier == "tcp":
        client = TcpClient(*await asyncio.open_connection("127.0.0.1", gateway.tcp_port))
    else:
        settings.setdefault("compression", None)
        settings.setdefault("proxy", None)
        url = f"ws://127.0.0.1:{gateway.port}/"
        client = WebSocketClient(await connect_websocket(url, **settings))
    try:
        yield client
    finally:
        await client.close()
