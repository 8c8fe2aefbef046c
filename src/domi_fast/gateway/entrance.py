"""Who may come in, and who has to go: the connections of a gateway's clients.

What each of them says first is judged here; what it says afterwards goes to the gateway. Everything
here belongs to the gateway's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import Callable
from typing import Any, Final

from .. import AuthError, encode_frame
from . import frames
from .config import GatewayConfig, Login, identity_of
from .connection import Connection, Stage
from .events import ENDS_SESSION, CloseCode, LibraryEvent
from .sessions import Carrier, Session, Sessions

log = logging.getLogger(__name__)

_SWEEPS: Final = 4
_MOST_WAITING: Final = 256
# Connections beyond the limit that are told so; those beyond these are cut without a word.
_TOLD: Final = 32
# Seconds for all clients to take what they are told at the gateway's end.
_FAREWELL: Final = 1.0


class Entrance:
    """The connections of one gateway.

    :param most: how many there may be.
    :param take: called with each frame of a client that was let in.
    :param away: called with the session of a client whose connection is gone,
    :param back: and with that of one who has resumed it.
    :param count: notes one more of what has this name.
    :ivar closed: why no new clients are taken; None while they are.
    """

    def __init__(
        self,
        config: GatewayConfig,
        sessions: Sessions,
        most: int,
        take: Callable[[Session, int, bytes, bytes], None],
        away: Callable[[Session], None],
        back: Callable[[Session], None],
        count: Callable[[str], None],
    ) -> None:
        self._config = config
        self._sessions = sessions
        self._most = most
        self._take = take
        self._away = away
        self._back = back
        self._count = count
        self._connections: set[Connection] = set()
        self._deserted = asyncio.Event()
        self._is_over = False
        self.closed: str | None = None

    def __len__(self) -> int:
        return len(self._connections)

    # ------------------------------------------------------------------------------ what is heard

    def refusal(self) -> str | None:
        """Why no more clients are taken; None while they are."""
        if self.closed is not None:
            return self.closed
        if len(self._connections) > self._most:
            return f"this gateway has {self._most} clients, as many as it may have"
        return None

    def began(self, connection: Connection) -> bool:
        """It is there, and has said nothing yet. Whether it may stay at all."""
        if self._is_over or len(self._connections) >= self._most + _TOLD:
            self._count("clients_cut")
            return False
        self._connections.add(connection)
        return True

    def allows(self, connection: Connection) -> bool:
        """Whether one more of its messages may come; if not, it has been cut."""
        if connection.stage is Stage.CLOSED:
            return False
        config = self._config
        connection.heard_at = now = time.monotonic()
        connection.pinged = False
        if connection.allow(now, config.rate, config.burst):
            return True
        why = f"more than {config.rate:g} messages a second, after {config.burst} at once"
        self.cut(connection, CloseCode.FLOOD, why)
        return False

    def heard(self, connection: Connection, event: int, data: bytes, extend: bytes) -> None:
        """A whole frame has come."""
        if connection.stage is Stage.OPEN:
            self._hear(connection, event, data, extend)
        elif connection.stage is Stage.NEW:
            self._greet(connection, event, data, extend)
        elif connection.stage is Stage.JUDGED:
            if len(connection.waiting) >= _MOST_WAITING:
                why = f"{_MOST_WAITING} frames behind HELLO, before its answer"
                self.cut(connection, CloseCode.FLOOD, why)
                return
            connection.waiting.append((event, data, extend))

    def ended(self, connection: Connection, reason: str, *, is_over: bool) -> None:
        """It is gone."""
        connection.stage = Stage.CLOSED
        if connection.judging is not None:
            connection.judging.cancel()
        self._connections.discard(connection)
        if not self._connections:
            self._deserted.set()
        session, connection.session = connection.session, None
        if session is None or session.connection is not connection:
            return
        log.debug("user %d: its connection is gone: %s", session.user, reason)
        if is_over:
            session.connection = None
            self._sessions.end(session)
        elif self._sessions.detach(session):
            self._away(session)

    def slow(self, connection: Connection, queued: int) -> None:
        """So many bytes wait to be written to it, which are too many."""
        self._count("clients_slow")
        why = f"{queued} bytes wait to be read by it: at most {self._config.write_limit} may"
        connection.abort(CloseCode.SLOW, why)

    def cut(self, connection: Carrier, code: CloseCode, reason: str) -> None:
        """It may not go on: close it, and end its session if that is over then."""
        self._count("clients_cut")
        log.info("client %s: cut (%d): %s", connection.address, code, reason)
        session = connection.session
        connection.close(code, reason)
        if session is not None and code in ENDS_SESSION:
            self._sessions.end(session)

    # ------------------------------------------------------------------------------ letting in

    def _greet(self, connection: Connection, event: int, data: bytes, extend: bytes) -> None:
        """The first frame of a connection."""
        if event == LibraryEvent.HELLO and not extend:
            self._judge(connection, data)
        elif event == LibraryEvent.RESUME and not extend:
            self._resume(connection, data)
        elif event == LibraryEvent.HEARTBEAT and not extend:
            self._beat(connection, data)
        elif event == LibraryEvent.BYE:
            connection.close(CloseCode.NORMAL, "")
        elif self._config.authenticate is None:
            self._welcome(connection, b"")
            self._hear(connection, event, data, extend)
        else:
            self.cut(connection, CloseCode.UNAUTHENTICATED, f"event {event} before HELLO")

    def _judge(self, connection: Connection, data: bytes) -> None:
        if self._config.authenticate is None:
            self._welcome(connection, b"")
            return
        connection.stage = Stage.JUDGED
        # What it goes on to say waits where it costs this process nothing.
        connection.pause()
        login = Login(data, connection.address, connection.path, connection.headers)
        connection.judging = asyncio.ensure_future(self._ask(connection, login))

    async def _ask(self, connection: Connection, login: Login) -> None:
        assert self._config.authenticate is not None
        why = "authenticate refused"
        identity = None
        try:
            answer: Any = self._config.authenticate(login)
            if inspect.isawaitable(answer):
                answer = await answer
            identity = identity_of(answer)
        except AuthError as error:
            why = str(error) or why
        except Exception:
            log.exception("authenticate failed for client %s", login.address)
            why = "it could not be judged"
        connection.judging = None
        if connection.stage is not Stage.JUDGED:
            return
        if identity is None:
            self._count("clients_refused")
            self.cut(connection, CloseCode.UNAUTHENTICATED, why)
            return
        waiting, connection.waiting = connection.waiting, []
        self._welcome(connection, identity)
        for event, data, extend in waiting:
            self._hear(connection, event, data, extend)
        connection.resume()

    def _welcome(self, connection: Connection, identity: bytes) -> None:
        if self.closed is not None:
            self.cut(connection, CloseCode.TRY_LATER, self.closed)
            return
        session = self._sessions.begin(identity)
        connection.stage = Stage.OPEN
        connection.send(frames.welcome(session.id, self._config.grace))
        self._sessions.attach(session, connection)

    def _resume(self, connection: Connection, data: bytes) -> None:
        if len(data) != frames.RESUME.size:
            why = f"a RESUME of {len(data)} bytes: {frames.RESUME.size} are wanted"
            self.cut(connection, CloseCode.PROTOCOL_ERROR, why)
            return
        id, received = frames.RESUME.unpack(data)
        session = self._sessions.find(id, received)
        if isinstance(session, str):
            self._count("sessions_expired")
            connection.send(frames.expired(session))
            return
        other = session.connection
        if other is not None:
            other.session = None
            other.close(CloseCode.REPLACED, "another connection has resumed the session")
        missed = self._sessions.missed(session, received)
        connection.stage = Stage.OPEN
        connection.send(frames.resumed(session.received, self._config.grace))
        self._sessions.attach(session, connection)
        self._count("sessions_resumed")
        if missed:
            # At once: it is as many frames as are kept, and others wait for their turn.
            connection.write(b"".join(map(connection.wrap, missed)))
        if other is None and session.connection is connection:
            self._back(session)

    def _hear(self, connection: Connection, event: int, data: bytes, extend: bytes) -> None:
        """A frame of a client that was let in."""
        session = connection.session
        if session is None:
            return
        if event == LibraryEvent.HEARTBEAT and not extend:
            self._beat(connection, data)
        elif event == LibraryEvent.BYE and not extend:
            connection.close(CloseCode.NORMAL, "")
            self._sessions.end(session)
        else:
            self._take(session, event, data, extend)

    def _beat(self, connection: Connection, data: bytes) -> None:
        if data == frames.PING:
            connection.send(encode_frame(LibraryEvent.HEARTBEAT, frames.PONG))

    # ------------------------------------------------------------------------------ by the clock

    async def sweep(self, also: Callable[[], None]) -> None:
        """Ping who is silent, and cut who does not answer or never says who it is, for ever.

        :param also: called each time.
        """
        config = self._config
        shortest = min(config.ping_interval, config.ping_timeout, config.authenticate_timeout)
        while True:
            await asyncio.sleep(max(0.01, min(1.0, shortest / _SWEEPS)))
            now = time.monotonic()
            for connection in list(self._connections):
                self._look_at(connection, now)
            also()

    def _look_at(self, connection: Connection, now: float) -> None:
        config = self._config
        if connection.stage is Stage.CLOSED:
            return
        silent = now - connection.heard_at
        is_let_in = connection.stage is Stage.OPEN or (
            config.authenticate is None and connection.is_ready
        )
        if not is_let_in:
            if now - connection.opened_at > config.authenticate_timeout:
                why = f"not let in within {config.authenticate_timeout:g} s"
                self.cut(connection, CloseCode.UNAUTHENTICATED, why)
                if connection.judging is not None:
                    connection.judging.cancel()
        elif silent > config.ping_interval:
            if not connection.pinged:
                connection.pinged = True
                connection.ping()
            elif silent > config.ping_interval + config.ping_timeout:
                self._count("clients_silent")
                connection.abort(CloseCode.SILENT, f"no sign of life for {silent:.1f} s")

    # ------------------------------------------------------------------------------ the end

    def tell_all(self, reason: str) -> None:
        """Close all connections (1001)."""
        for connection in list(self._connections):
            connection.close(CloseCode.GOING_AWAY, reason)

    async def see_off(self) -> None:
        """Give the clients a moment to take what they were told; then nobody is there any more."""
        self._is_over = True
        if self._connections:
            self._deserted.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._deserted.wait(), _FAREWELL)
        for connection in list(self._connections):
            connection.abort(CloseCode.GOING_AWAY, "the gateway closes")
        if self._connections:
            self._deserted.clear()
            await self._deserted.wait()
