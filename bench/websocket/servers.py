"""Bare servers, one per library: they echo whole messages, and broadcast when they are told to.

Each does what its library leaves to its user, and no more: where frames are handed over, joining
them, UTF-8, reserved bits and the answer to a close. Nobody pings and nothing is compressed.
"""

from __future__ import annotations

import asyncio
import codecs
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import uvloop

__all__ = ["SERVERS"]

HOST = "127.0.0.1"
BACKLOG = 1024
MAX_MESSAGE = 32 << 20  # bytes; the longest of the Autobahn cases have 16 MiB
SMALL = 2048  # bytes, the smallest buffer that picows takes
INVALID_TEXT = 1007

Write = Callable[[bytes], object]


class Server:
    """What is asked of a server from outside; it belongs to the loop that it was started on.

    :ivar sends: the library's own way to send a binary message, for each client.
    :ivar writes: how bytes are given to the transport beneath, for each client.
    """

    def __init__(self) -> None:
        self.sends: dict[object, Callable[[bytes], Any]] = {}
        self.writes: dict[object, Write] = {}

    def joined(self, client: object, send: Callable[[bytes], Any], write: Write) -> None:
        self.sends[client] = send
        self.writes[client] = write

    def left(self, client: object) -> None:
        self.sends.pop(client, None)
        self.writes.pop(client, None)

    async def start(self) -> int:
        """Serve; the port."""
        raise NotImplementedError

    async def broadcast(self, message: bytes) -> None:
        for send in list(self.sends.values()):
            send(message)

    def broadcast_encoded(self, message: bytes) -> None:
        """Encode a short message once, and write the same bytes to each client."""
        frame = bytes((0x82, len(message))) + message
        for write in list(self.writes.values()):
            write(frame)


class Messages:
    """Joins the frames of one connection to messages, as a text is checked while it arrives."""

    def __init__(self) -> None:
        self.is_text: bool | None = None
        self._parts: list[bytes] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def add(self, payload: bytes, *, is_text: bool | None, final: bool) -> bytes | None:
        """The message that is now complete.

        :param is_text: of a first frame; ``None`` for a continuation.
        :raises ValueError: frames out of order.
        :raises UnicodeDecodeError: no UTF-8.
        """
        if (is_text is None) == (self.is_text is None):
            raise ValueError("frames out of order")
        if is_text is not None:
            self.is_text = is_text
        if self.is_text:
            self._decoder.decode(payload, final)
        self._parts.append(payload)
        return b"".join(self._parts) if final else None

    def clear(self) -> None:
        self.is_text = None
        self._parts.clear()


class Picows(Server):
    """picows, with the options given."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._options = options

    async def start(self) -> int:
        import picows

        kinds, codes = picows.WSMsgType, picows.WSCloseCode
        text, binary, continuation = kinds.TEXT, kinds.BINARY, kinds.CONTINUATION
        server = self

        class Echo(picows.WSListener):  # type: ignore[misc]  # which may not be installed
            messages: Messages | None = None

            def on_ws_connected(self, transport: picows.WSTransport) -> None:
                write = transport.underlying_transport.write
                server.joined(self, partial(transport.send, binary), write)

            def on_ws_disconnected(self, transport: picows.WSTransport) -> None:
                server.left(self)

            def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
                # The frames behind one that was refused are handed over all the same.
                if transport.is_close_frame_sent:
                    return
                if frame.rsv1 or frame.rsv2 or frame.rsv3:
                    raise picows.WSProtocolError(codes.PROTOCOL_ERROR, "reserved bits")
                kind = frame.msg_type
                if kind == kinds.CLOSE:
                    if frame.payload_size:
                        code = frame.get_close_code()
                        # Codes that never stand in a frame, and that picows lets pass.
                        if code in (codes.NO_INFO, codes.ABNORMAL_CLOSURE):
                            raise picows.WSProtocolError(codes.PROTOCOL_ERROR, "close code")
                        transport.send_close(code, frame.get_close_message())
                    else:
                        # send_close would put the code 0 on the wire.
                        transport.send(kind, b"")
                    transport.disconnect()
                elif kind in (text, binary, continuation):
                    try:
                        self._data(transport, frame, kind)
                    except UnicodeDecodeError:
                        raise picows.WSProtocolError(codes.INVALID_TEXT, "no UTF-8") from None
                    except ValueError as error:
                        raise picows.WSProtocolError(codes.PROTOCOL_ERROR, str(error)) from None

            def _data(
                self, transport: picows.WSTransport, frame: picows.WSFrame, kind: picows.WSMsgType
            ) -> None:
                payload = frame.get_payload_as_bytes()
                if self.messages is None and frame.fin and kind != continuation:
                    if kind == text:
                        payload.decode()
                    transport.send(kind, payload)
                    return
                messages = self.messages = self.messages or Messages()
                is_text = None if kind == continuation else kind == text
                whole = messages.add(payload, is_text=is_text, final=frame.fin)
                if whole is not None:
                    transport.send(text if messages.is_text else binary, whole)
                    self.messages = None

        listening = await picows.ws_create_server(
            lambda request: Echo(),
            HOST,
            0,
            max_frame_size=MAX_MESSAGE,
            backlog=BACKLOG,
            **self._options,
        )
        return port_of(listening)


class Websockets(Server):
    """websockets, its asyncio server."""

    async def start(self) -> int:
        from websockets.asyncio import server

        async def echo(client: server.ServerConnection) -> None:
            self.joined(client, client.send, client.transport.write)
            try:
                async for message in client:
                    await client.send(message)
            finally:
                self.left(client)

        listening = await server.serve(
            echo,
            HOST,
            0,
            compression=None,
            ping_interval=None,
            max_size=MAX_MESSAGE,
            backlog=BACKLOG,
        )
        return port_of(listening)

    async def broadcast(self, message: bytes) -> None:
        from websockets.asyncio.server import ServerConnection, broadcast

        broadcast([each for each in self.sends if isinstance(each, ServerConnection)], message)


class WebsocketsSansIO(Server):
    """The protocol of websockets, without its connections, on an ``asyncio.Protocol``."""

    async def start(self) -> int:
        from websockets.frames import Frame, Opcode
        from websockets.http11 import Request
        from websockets.server import ServerProtocol

        server = self

        class Echo(asyncio.Protocol):
            transport: asyncio.Transport

            def __init__(self) -> None:
                self.protocol = ServerProtocol(max_size=MAX_MESSAGE)
                self.messages = Messages()

            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                self.transport = cast(asyncio.Transport, transport)

            def connection_lost(self, error: Exception | None) -> None:
                server.left(self)

            def data_received(self, data: bytes) -> None:
                self.protocol.receive_data(data)
                for event in self.protocol.events_received():
                    if isinstance(event, Request):
                        response = self.protocol.accept(event)
                        self.protocol.send_response(response)
                        if response.status_code == 101:
                            server.joined(self, self.send, self.transport.write)
                    elif isinstance(event, Frame) and event.opcode < Opcode.CLOSE:
                        self._data(event)
                self.flush()

            def eof_received(self) -> None:
                self.protocol.receive_eof()
                self.flush()

            def _data(self, frame: Frame) -> None:
                opcode = frame.opcode
                is_text = None if opcode is Opcode.CONT else opcode is Opcode.TEXT
                try:
                    whole = self.messages.add(bytes(frame.data), is_text=is_text, final=frame.fin)
                except UnicodeDecodeError:
                    self.protocol.fail(INVALID_TEXT, "no UTF-8")
                    return
                if whole is None or self.protocol.close_expected():
                    return
                if self.messages.is_text:
                    self.protocol.send_text(whole)
                else:
                    self.protocol.send_binary(whole)
                self.messages.clear()

            def send(self, message: bytes) -> None:
                self.protocol.send_binary(message)
                self.flush()

            def flush(self) -> None:
                for data in self.protocol.data_to_send():
                    if data:
                        self.transport.write(data)
                    else:
                        self.transport.close()

        loop = asyncio.get_running_loop()
        return port_of(await loop.create_server(Echo, HOST, 0, backlog=BACKLOG))


class Aiohttp(Server):
    async def start(self) -> int:
        from aiohttp import WSMsgType, web

        async def echo(request: web.Request) -> web.WebSocketResponse:
            client = web.WebSocketResponse(compress=False, max_msg_size=MAX_MESSAGE)
            await client.prepare(request)
            assert request.transport is not None
            self.joined(client, client.send_bytes, request.transport.write)
            try:
                async for message in client:
                    if message.type is WSMsgType.TEXT:
                        await client.send_str(message.data)
                    elif message.type is WSMsgType.BINARY:
                        await client.send_bytes(message.data)
            finally:
                self.left(client)
            return client

        app = web.Application()
        app.router.add_get("/", echo)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, HOST, 0, backlog=BACKLOG)
        await site.start()
        return int(runner.addresses[0][1])

    async def broadcast(self, message: bytes) -> None:
        for send in list(self.sends.values()):
            await send(message)


SERVERS: dict[str, Callable[[], Server]] = {
    "picows": Picows,
    "picows, small": lambda: Picows(read_buffer_init_size=SMALL),
    # On the loop's transport rather than on aiofastnet's.
    "picows, small, loop's": lambda: Picows(read_buffer_init_size=SMALL, use_aiofastnet=False),
    "websockets sans-I/O": WebsocketsSansIO,
    "websockets asyncio": Websockets,
    "aiohttp": Aiohttp,
}


def port_of(listening: Any) -> int:
    return int(listening.sockets[0].getsockname()[1])


def resident() -> int:
    """Bytes of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def obey(server: Server, order: dict[str, Any]) -> dict[str, float]:
    """Do what was ordered in a line; what is answered in a line."""
    if order["do"] == "broadcast":
        message = bytes(order["size"])
        began = time.monotonic()
        for _ in range(order["count"]):
            if order["encoded"]:
                server.broadcast_encoded(message)
            else:
                await server.broadcast(message)
            await asyncio.sleep(0)
        return {"began": began}
    gc.collect()
    return {"clients": len(server.sends), "cpu": time.process_time(), "resident": resident()}


async def main(name: str) -> None:
    server = SERVERS[name]()
    loop = asyncio.get_running_loop()
    print(json.dumps({"port": await server.start()}), flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await obey(server, json.loads(line))), flush=True)


if __name__ == "__main__":
    logging.disable()  # of clients that were reset
    uvloop.run(main(sys.argv[1]))
