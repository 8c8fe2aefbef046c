"""Clients over WebSockets (RFC 6455): one frame of ours in each binary message.

The handshake and the framing are those of websockets' protocol without I/O; here are the transport,
the joining of fragments, the limits, and what is written to many at once.
"""

from __future__ import annotations

import asyncio
import codecs
import logging
from collections.abc import Callable, Mapping
from typing import Final

from ..errors import DomiError, FrameError
from . import frames
from .config import GatewayConfig
from .connection import Listener, Stage
from .events import CloseCode
from .frames import clipped
from .listening import Port
from .stream import StreamConnection

try:
    from websockets.frames import Frame, Opcode
    from websockets.http11 import Request
    from websockets.protocol import State
    from websockets.server import ServerProtocol
except ImportError as error:
    raise DomiError(
        f"a gateway's port= needs the extra [gateway], which cannot be imported ({error}): "
        "pip install 'domi-fast[gateway]'"
    ) from error

_MOST_REASON: Final = 123
"""Bytes that a close frame has for its reason."""

# The library tells of each connection that comes and goes.
_quiet = logging.getLogger("domi_fast.websockets")
_quiet.setLevel(logging.WARNING)


def wrap(frame: bytes) -> bytes:
    """The frame as one binary message. A server's are not masked, and so the same for all."""
    return Frame(Opcode.BINARY, frame).serialize(mask=False)


class _Framing(ServerProtocol):
    def recv_frame(self, frame: Frame) -> None:
        # A close may come amid a fragmented message, as any control frame (RFC 6455, 5.4).
        if frame.opcode is Opcode.CLOSE:
            self.current_size = None
        super().recv_frame(frame)


class WebSocketConnection(StreamConnection):
    """One connection of a client over a WebSocket."""

    __slots__ = ("_decode", "_ended", "_framing", "_headers", "_parts", "_path")

    wrap = staticmethod(wrap)

    def __init__(self, config: GatewayConfig, listener: Listener) -> None:
        super().__init__(config, listener)
        self._framing = _Framing(max_size=config.message_limit, logger=_quiet)
        self._ended = False
        self._path = ""
        self._headers: Mapping[str, str] = {}
        # Of a message that is not whole yet.
        self._parts: list[bytes] = []
        self._decode: Callable[..., str] | None = None

    @property
    def path(self) -> str:
        return self._path

    @property
    def is_ready(self) -> bool:
        return self._framing.state is State.OPEN

    @property
    def headers(self) -> Mapping[str, str]:
        return self._headers

    # ------------------------------------------------------------------------------ transport

    def data_received(self, data: bytes) -> None:
        framing = self._framing
        framing.receive_data(data)
        if framing.state is State.OPEN:
            # Answers to pings, which came before the end of whatever came last.
            self._flush()
        for event in framing.events_received():
            if isinstance(event, Request):
                self._begin(event)
            elif isinstance(event, Frame) and self._may_come():
                self._take(event)
        self._notice_failure()
        self._flush()

    def _notice_failure(self) -> None:
        """The framing closes the connection by itself where a client breaks the protocol."""
        sent = self._framing.close_sent
        if sent is not None and self._framing.close_rcvd is None and self.stage is not Stage.CLOSED:
            self._listener.cut(self, CloseCode(sent.code), sent.reason)

    def eof_received(self) -> None:
        if self._closing is None:
            self._framing.receive_eof()
            self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        said = self._framing.close_rcvd
        if said is not None and self.stage is not Stage.CLOSED:
            # A client that closes may come back, unless it says that it does not.
            self._is_over = said.code == CloseCode.NORMAL
            self._reason = f"the client has closed it: {said.reason} ({said.code})"
        super().connection_lost(exc)

    def _flush(self) -> None:
        """Write what the framing has to say, and see to its end."""
        for data in self._framing.data_to_send():
            if self._ended:
                continue
            if data:
                self._transport.write(data)
            else:
                self._ended = True
                self.write_end()
        if self._framing.close_expected():
            self.mute()
            self.await_end()

    # ------------------------------------------------------------------------------ handshake

    def _begin(self, request: Request) -> None:
        framing = self._framing
        if framing.eof_sent:
            # What came behind the request, which was to wait for the answer, was no frame.
            self._transport.abort()
            return
        refusal = self._refusal(request)
        response = framing.accept(request) if refusal is None else framing.reject(*refusal)
        framing.send_response(response)
        self._path = request.path
        if self._config.authenticate is not None:
            self._headers = {name.lower(): value for name, value in request.headers.raw_items()}
        if framing.state is State.OPEN:
            self._flush()
            self.write = self._transport.write

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        """The HTTP status of who may not come in, and why."""
        why = self._listener.refusal()
        if why is not None:
            return 503, f"{why}\n"
        origins = request.headers.get_all("Origin")
        hosts = request.headers.get_all("Host")
        if len(hosts) != 1:
            return 400, f"{len(hosts)} Host headers: one is wanted\n"
        if len(origins) > 1 or not all(self._config.allows(o, hosts[0]) for o in origins):
            return 403, "pages of this origin may not connect here\n"
        return None

    # ------------------------------------------------------------------------------ messages

    def _may_come(self) -> bool:
        # Control frames count as messages do.
        return self.stage is not Stage.CLOSED and self._listener.allows(self)

    def _take(self, frame: Frame) -> None:
        if frame.opcode is Opcode.BINARY and frame.fin:
            self.message(bytes(frame.data))
        elif frame.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            self._join(frame)

    def _join(self, frame: Frame) -> None:
        """A text, or a part of a message."""
        if frame.opcode is Opcode.TEXT:
            self._decode = codecs.getincrementaldecoder("utf-8")().decode
        if self._decode is not None:
            try:
                self._decode(frame.data, frame.fin)
            except UnicodeDecodeError:
                self._listener.cut(self, CloseCode.INVALID_TEXT, "a text that is not UTF-8")
                return
        if frame.data:
            self._parts.append(bytes(frame.data))
        if not frame.fin:
            return
        parts, self._parts = self._parts, []
        is_text, self._decode = self._decode is not None, None
        if is_text:
            self.text(b"".join(parts))
        else:
            self.message(b"".join(parts))

    def message(self, data: bytes) -> None:
        """A whole binary message."""
        try:
            frame = frames.parse(data)
        except FrameError as error:
            self._listener.cut(self, CloseCode.PROTOCOL_ERROR, str(error))
            return
        self._listener.heard(self, *frame)

    def text(self, data: bytes) -> None:
        """A whole text message."""
        self._listener.cut(self, CloseCode.UNSUPPORTED, "a text: frames come as binary messages")

    # ------------------------------------------------------------------------------ the end

    def ping(self) -> None:
        if self._framing.state is State.OPEN:
            self._framing.send_ping(b"")
            self._flush()

    def say_goodbye(self, code: CloseCode, reason: str) -> None:
        if self._framing.state is State.CONNECTING:
            self._transport.abort()
            return
        self._framing.fail(code, clipped(reason, _MOST_REASON).decode())
        self._flush()


class WebSocketListener(Port):
    """Takes clients over WebSockets, from ``start`` to ``close``.

    :param connection: what serves each of them.
    """

    def __init__(
        self,
        config: GatewayConfig,
        listener: Listener,
        connection: type[WebSocketConnection] = WebSocketConnection,
    ) -> None:
        super().__init__("port", config.host, config.port or 0, config.tls)
        self._config = config
        self._listener = listener
        self._connection = connection

    def protocol(self) -> asyncio.Protocol:
        return self._connection(self._config, self._listener)
