"""Connections over a transport of the loop's: what raw TCP and WebSockets have in common there."""

from __future__ import annotations

import asyncio
import contextlib
from abc import abstractmethod
from typing import Final, cast

from .config import GatewayConfig
from .connection import Connection, Listener, Stage
from .events import ENDS_SESSION, CloseCode

CLOSE_TIME: Final = 2.0
"""Seconds for a client to take what it is told at the end, before its connection is cut."""


class StreamConnection(Connection, asyncio.Protocol):
    """One connection of a client over a transport.

    The transport is limited to ``write_limit`` bytes that wait, and says so once when they are
    more: nobody has to ask it.
    """

    __slots__ = ("_closing", "_config", "_is_over", "_listener", "_reason", "_transport")

    def __init__(self, config: GatewayConfig, listener: Listener) -> None:
        super().__init__(config.burst)
        self._config = config
        self._listener = listener
        self._transport: asyncio.Transport
        self._closing: asyncio.TimerHandle | None = None
        self._is_over = False
        self._reason = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        found = transport.get_extra_info("peername")
        self.address = f"{found[0]}:{found[1]}" if isinstance(found, tuple) else "somewhere"
        self._transport.set_write_buffer_limits(high=self._config.write_limit)
        if self._listener.began(self):
            self.opened()
        else:
            self._transport.abort()

    def opened(self) -> None:
        """The transport is there."""

    def pause_writing(self) -> None:
        if self.stage is not Stage.CLOSED:
            self._listener.slow(self, self._transport.get_write_buffer_size())

    def connection_lost(self, exc: Exception | None) -> None:
        if self._closing is not None:
            self._closing.cancel()
        self.mute()
        reason = self._reason or (str(exc) if exc else "the client has closed it, or is gone")
        self._listener.ended(self, reason, is_over=self._is_over)

    def pause(self) -> None:
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def close(self, code: CloseCode, reason: str) -> None:
        if self.stage is Stage.CLOSED:
            return
        self._note_end(code, reason)
        # What is still read is thrown away; the end has to be seen.
        self.resume()
        self.say_goodbye(code, reason)
        self.mute()
        self.await_end()

    @abstractmethod
    def say_goodbye(self, code: CloseCode, reason: str) -> None:
        """Write why the connection ends, and that nothing more will come."""

    def abort(self, code: CloseCode, reason: str) -> None:
        if self.stage is not Stage.CLOSED:
            self._note_end(code, reason)
        self.mute()
        self._transport.abort()

    def _note_end(self, code: CloseCode, reason: str) -> None:
        self.stage = Stage.CLOSED
        self._is_over = code in ENDS_SESSION
        self._reason = f"{reason} ({int(code)})"

    def await_end(self) -> None:
        """The client is to close, too; if it does not, it is cut."""
        if self._closing is None:
            loop = asyncio.get_running_loop()
            self._closing = loop.call_later(CLOSE_TIME, self._transport.abort)

    def write_end(self) -> None:
        """Nothing more is written."""
        if self._transport.can_write_eof():
            with contextlib.suppress(OSError):  # the client has reset it already
                self._transport.write_eof()
        else:
            self._transport.close()
