"""Clients over raw TCP: frames, and nothing else, in both directions."""

from __future__ import annotations

import asyncio
from typing import Final, cast

from .. import FrameReader, encode_frame
from ..errors import FrameError
from . import frames
from .config import GatewayConfig
from .connection import Connection, Listener, Stage, address_of
from .events import CloseCode, LibraryEvent
from .listening import CLOSE_TIME, Port

_PING: Final = encode_frame(LibraryEvent.HEARTBEAT, frames.PING)


def _as_it_is(frame: bytes) -> bytes:
    return frame


class TcpConnection(Connection, asyncio.Protocol):
    """One connection of a client over raw TCP."""

    __slots__ = ("_closing", "_code", "_config", "_listener", "_reader", "_reason", "_transport")

    wrap = staticmethod(_as_it_is)

    def __init__(self, config: GatewayConfig, listener: Listener) -> None:
        super().__init__(config.burst)
        self._config = config
        self._listener = listener
        self._reader = FrameReader(config.message_limit)
        self._transport: asyncio.Transport
        self._closing: asyncio.TimerHandle | None = None
        self._code = 1006
        self._reason = "it is lost"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self.address = address_of(transport)
        self.write = self._transport.write
        self._transport.set_write_buffer_limits(high=self._config.write_limit)
        self._listener.began(self)
        why = self._listener.refusal()
        if why is not None:
            self._listener.cut(self, CloseCode.TRY_LATER, why)

    def data_received(self, data: bytes) -> None:
        if self.stage is Stage.CLOSED:
            return
        try:
            found = self._reader.feed(data)
        except FrameError as error:
            self._listener.cut(self, _code_of(error), str(error))
            return
        for event, payload, extend in found:
            if not self._listener.allows(self):
                return
            self._listener.heard(self, event, payload, extend)

    def eof_received(self) -> None:
        self._reason = "the client has closed it"

    def pause_writing(self) -> None:
        self._listener.slow(self, self._transport.get_write_buffer_size())

    def connection_lost(self, exc: Exception | None) -> None:
        if self._closing is not None:
            self._closing.cancel()
        self.mute()
        self._listener.ended(self, self._code, self._reason if exc is None else str(exc))

    def ping(self) -> None:
        self.write(_PING)

    def close(self, code: CloseCode, reason: str) -> None:
        if self.stage is Stage.CLOSED:
            return
        self.stage = Stage.CLOSED
        self._code, self._reason = code, reason
        self.write(frames.bye(code, reason))
        self.mute()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()
        loop = asyncio.get_running_loop()
        self._closing = loop.call_later(CLOSE_TIME, self._transport.abort)

    def abort(self, code: CloseCode, reason: str) -> None:
        if self.stage is not Stage.CLOSED:
            self.stage = Stage.CLOSED
            self._code, self._reason = code, reason
        self.mute()
        self._transport.abort()


def _code_of(error: FrameError) -> CloseCode:
    # The reasons are those of docs/protocol.md.
    return CloseCode.TOO_BIG if "over the limit" in str(error) else CloseCode.PROTOCOL_ERROR


class TcpListener(Port):
    """Takes clients over raw TCP, from ``start`` to ``close``."""

    def __init__(self, config: GatewayConfig, listener: Listener) -> None:
        super().__init__("tcp_port", config.host, config.tcp_port or 0, config.tls)
        self._config = config
        self._listener = listener

    def protocol(self) -> asyncio.Protocol:
        return TcpConnection(self._config, self._listener)
