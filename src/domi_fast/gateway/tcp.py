"""Clients over raw TCP: frames, and nothing else, in both directions."""

from __future__ import annotations

import asyncio
from typing import Final

from .. import FrameReader, encode_frame
from ..errors import FrameError
from . import frames
from .config import GatewayConfig
from .connection import Listener, Stage
from .events import CloseCode, LibraryEvent
from .listening import Port
from .stream import StreamConnection

_PING: Final = encode_frame(LibraryEvent.HEARTBEAT, frames.PING)


def _as_it_is(frame: bytes) -> bytes:
    return frame


class TcpConnection(StreamConnection):
    """One connection of a client over raw TCP."""

    __slots__ = ("_reader",)

    wrap = staticmethod(_as_it_is)

    def __init__(self, config: GatewayConfig, listener: Listener) -> None:
        super().__init__(config, listener)
        self._reader = FrameReader(config.message_limit)

    def opened(self) -> None:
        self.write = self._transport.write
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

    def ping(self) -> None:
        self.write(_PING)

    def say_goodbye(self, code: CloseCode, reason: str) -> None:
        self.write(frames.bye(code, reason))
        self.write_end()


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
