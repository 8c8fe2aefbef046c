"""The gateway of a node: lets clients in, and takes what they say to where it belongs."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from .. import DomiError, LibraryChannel, Node, encode_frame
from ..callers import most_descriptors
from ..errors import AuthError, FrameError
from . import frames
from .config import GatewayConfig, Login, identity_of
from .connection import Connection, Stage
from .events import (
    COUNTED_FROM,
    ENDS_SESSION,
    LAST_EVENT,
    USER_EVENT,
    CloseCode,
    LibraryEvent,
    Refusal,
)
from .ids import Ids
from .routes import Routes
from .sessions import Session, Sessions
from .tcp import TcpListener
from .zones import Zones

if TYPE_CHECKING:
    from .pages import Pages
    from .websocket import WebSocketListener

log = logging.getLogger(__name__)

_SWEEPS: Final = 4
_FAREWELL: Final = 1.0
_MOST_WAITING: Final = 256


@dataclass(frozen=True)
class ClientMessage:
    """What a client says to the gateway itself.

    :ivar user: the client's id of 64 bits.
    :ivar identity: what ``authenticate`` has said who it is.
    """

    gateway: Gateway
    user: int
    identity: bytes
    event: int
    data: bytes

    def reply(self, event: int, data: bytes) -> bool:
        """As :meth:`Gateway.send` to this client."""
        return self.gateway.send(self.user, event, data)


Handler = Callable[[ClientMessage], object]
H = TypeVar("H", bound=Handler)


class Gateway:
    """Client connections of a node, over WebSockets and raw TCP, in the frames of docs/protocol.md.

    ``Gateway(node, *, port=0, tcp_port=None, http_port=None, ...)``: every keyword is a field of
    :class:`~domi_fast.gateway.config.GatewayConfig`, which says what is allowed. A node has one.

    Use it as ``async with Gateway(node) as gateway``, or ``start`` and ``close`` it, or give it to
    :func:`~domi_fast.app.run`. A node that has not started is started with it, and closed with it.
    It belongs to the node's loop.

    **A slow client** costs ``write_limit`` bytes at most: for more it is cut at once, and nobody
    waits for it. Its session outlives that as any lost connection, by ``grace`` seconds.

    :ivar zones: the zones that the gateway knows.
    :raises ValueError: a setting is out of its range.
    :raises DomiError: a setting asks for what is not installed.
    """

    def __init__(self, node: Node, **settings: Any) -> None:
        GatewayConfig.check_names("Gateway", settings)
        self.config = config = GatewayConfig(**settings)
        self.node = node
        self.zones = Zones()
        self._state = "new"
        self._owns_node = False
        self._handlers: dict[int, Handler] = {}
        self._sessions: Sessions
        self._routes: Routes
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing: asyncio.Future[None] | None = None
        self._closed = asyncio.Event()
        # No session is left; no connection is.
        self._empty = asyncio.Event()
        self._deserted = asyncio.Event()
        self._machine = -1
        self._websockets = self._make_websockets()
        self._tcp = None if config.tcp_port is None else TcpListener(config, self)
        self._pages = self._make_pages()
        self._client_limit = config.client_limit or max(1, most_descriptors() * 3 // 4)

    def _make_websockets(self) -> WebSocketListener | None:
        if self.config.port is None:
            return None
        from .websocket import WebSocketListener

        return WebSocketListener(self.config, self)

    def _make_pages(self) -> Pages | None:
        if self.config.http_port is None:
            return None
        from .pages import Pages

        return Pages(self.config, self.node, self.zones)

    # ------------------------------------------------------------------------------ life

    async def start(self) -> None:
        """Listen to clients; the node is started first if that is still to be done.

        :raises OSError: an address cannot be listened on.
        :raises DomiError: it was started before, or the node has a gateway already.
        """
        if self._state != "new":
            raise DomiError(f"this gateway is {self._state}: make another one to start again")
        self._state = "starting"
        try:
            if self.node.state == "new":
                self._owns_node = True
                await self.node.start()
            self._begin()
            for part in (self._websockets, self._tcp, self._pages):
                if part is not None:
                    await part.start()
        except BaseException:
            await self.close()
            raise
        self._state = "serving"

    def _begin(self) -> None:
        config, node = self.config, self.node
        self._machine = node.id
        self._sessions = Sessions(
            Ids(node.id),
            config.grace,
            config.history,
            config.history_bytes,
            self._client_limit,
            self._session_ended,
        )
        self._routes = Routes(node, config, self._sessions, self.zones, node.count)
        node.attach(_Wing(self))
        node.subscribe(LibraryChannel.GATEWAY, self._routes.hear)
        # A message that is dropped because others are more would put a zone out of step.
        node.when_full("raise", channel=LibraryChannel.ZONE)
        self._spawn(self._follow())
        self._spawn(self._sweep())
        self._routes.peers_changed()

    async def close(self) -> None:
        """Stop listening, tell the clients (1001) and end their sessions. All calls wait for it."""
        await self.close_itself()
        if self._owns_node:
            await self.node.close()

    async def close_itself(self) -> None:
        """As :meth:`close`, and leave the node to whom it belongs."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._state = "closed"
        for part in (self._websockets, self._tcp, self._pages):
            if part is not None:
                part.stop()
        for connection in list(self._connections):
            connection.close(CloseCode.GOING_AWAY, "the gateway closes")
        if self._machine >= 0:
            for session in self._sessions:
                self._sessions.end(session)
            await self._routes.close()
            with contextlib.suppress(DomiError):
                self.node.unsubscribe(LibraryChannel.GATEWAY)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._see_off()
        for part in (self._websockets, self._tcp, self._pages):
            if part is not None:
                await part.close()
        self._closed.set()

    async def _see_off(self) -> None:
        """Give the clients a moment to take what they were told."""
        if self._connections:
            self._deserted.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._deserted.wait(), _FAREWELL)
        for connection in list(self._connections):
            connection.abort(CloseCode.GOING_AWAY, "the gateway closes")
        if self._connections:
            self._deserted.clear()
            await self._deserted.wait()

    async def wait_closed(self) -> None:
        """Wait until it is closed, by whomever."""
        await self._closed.wait()

    async def drain(self) -> None:
        """Take no new clients, and wait until those that are there have gone."""
        if self._state == "serving":
            self._state = "draining"
        if self._machine >= 0 and len(self._sessions):
            self._empty.clear()
            await self._empty.wait()

    async def __aenter__(self) -> Gateway:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<Gateway of node {self.node.id} {self._state}>"

    # ------------------------------------------------------------------------------ for programs

    @property
    def state(self) -> str:
        """``new``, ``starting``, ``serving``, ``draining`` or ``closed``."""
        return self._state

    @property
    def port(self) -> int | None:
        """The TCP port for WebSockets, once it has started; None where it takes none."""
        return None if self._websockets is None else self._websockets.port

    @property
    def tcp_port(self) -> int | None:
        """The TCP port for raw frames, likewise."""
        return None if self._tcp is None else self._tcp.port

    @property
    def http_port(self) -> int | None:
        """The TCP port of the pages, likewise."""
        return None if self._pages is None else self._pages.port

    @property
    def clients(self) -> int:
        """Connections of clients."""
        return len(self._connections)

    @property
    def users(self) -> frozenset[int]:
        """The users that have a session here, those that are away among them."""
        if self._machine < 0:
            return frozenset()
        return frozenset(session.user for session in self._sessions)

    def handle(self, event: int, handler: Any = ...) -> Any:
        """Have ``handler(message)`` called for what clients send to the gateway itself.

        Without a handler this is a decorator. An ``async def`` becomes a task for each message.

        :param event: 50-65535.
        :raises ValueError: the event is not one of those.
        :raises DomiError: it has a handler already.
        """
        check_event(event)
        if handler is ...:
            return lambda function: self.handle(event, function) or function
        if not callable(handler):
            raise TypeError(f"handler {handler!r} is not callable")
        if event in self._handlers:
            raise DomiError(f"event {event} has a handler already")
        self._handlers[event] = handler
        return None

    def send(self, user: int, event: int, data: bytes) -> bool:
        """Send to a client, now or when it is back; whether it has a session here.

        :param event: 50-65535.
        """
        check_event(event)
        session = None if self._machine < 0 else self._sessions.get(user)
        if session is None:
            return False
        self._sessions.send(session, encode_frame(event, data))
        return True

    def disconnect(self, user: int, reason: str) -> bool:
        """End the session of a client, which is told why (1008); whether it had one here."""
        session = None if self._machine < 0 else self._sessions.get(user)
        if session is None:
            return False
        if session.connection is not None:
            session.connection.close(CloseCode.POLICY, reason)
        self._sessions.end(session)
        return True

    # ------------------------------------------------------------------------------ connections

    def refusal(self) -> str | None:
        """Why no more clients are taken; None while they are."""
        if self._state not in {"serving", "starting"}:
            return f"this gateway is {self._state}"
        if len(self._connections) > self._client_limit:
            return f"this gateway has {self._client_limit} clients, as many as it may have"
        return None

    def began(self, connection: Connection) -> None:
        """It is there, and has said nothing yet."""
        self._connections.add(connection)

    def allows(self, connection: Connection) -> bool:
        """Whether one more of its messages may come; if not, it has been cut."""
        if connection.stage is Stage.CLOSED:
            return False
        config = self.config
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
            self._take(connection, event, data, extend)
        elif connection.stage is Stage.JUDGED:
            assert connection.waiting is not None
            if len(connection.waiting) >= _MOST_WAITING:
                why = f"{_MOST_WAITING} frames behind HELLO, before its answer"
                self.cut(connection, CloseCode.FLOOD, why)
                return
            connection.waiting.append((event, data, extend))
        elif connection.stage is Stage.NEW:
            self._greet(connection, event, data, extend)

    def ended(self, connection: Connection, code: int, reason: str) -> None:
        """It is gone."""
        connection.stage = Stage.CLOSED
        self._connections.discard(connection)
        if not self._connections:
            self._deserted.set()
        session, connection.session = connection.session, None
        if session is None or session.connection is not connection:
            return
        log.debug("user %d: its connection is gone (%d): %s", session.user, code, reason)
        if code in ENDS_SESSION:
            session.connection = None
            self._sessions.end(session)
        elif self._sessions.detach(session):
            self._routes.went_away(session)

    def slow(self, connection: Connection, queued: int) -> None:
        """So many bytes wait to be written to it, which are too many."""
        self.node.count("clients_slow")
        why = f"{queued} bytes wait to be read by it: at most {self.config.write_limit} may"
        connection.abort(CloseCode.SLOW, why)

    def cut(self, connection: Connection, code: CloseCode, reason: str) -> None:
        """It may not go on: close it, and end its session if that is over then."""
        self.node.count("clients_cut")
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
        elif self.config.authenticate is None:
            self._welcome(connection, b"")
            self._take(connection, event, data, extend)
        else:
            why = f"event {event} before HELLO"
            self.cut(connection, CloseCode.UNAUTHENTICATED, why)

    def _judge(self, connection: Connection, data: bytes) -> None:
        authenticate = self.config.authenticate
        if authenticate is None:
            self._welcome(connection, b"")
            return
        connection.stage = Stage.JUDGED
        connection.waiting = []
        login = Login(data, connection.address, connection.path, connection.headers)
        self._spawn(self._ask(connection, authenticate, login))

    async def _ask(self, connection: Connection, authenticate: Any, login: Login) -> None:
        why = "authenticate refused"
        identity = None
        try:
            answer = authenticate(login)
            if inspect.isawaitable(answer):
                answer = await answer
            identity = identity_of(answer)
        except AuthError as error:
            why = str(error) or why
        except Exception:
            log.exception("authenticate failed for client %s", login.address)
            why = "it could not be judged"
        if connection.stage is not Stage.JUDGED:
            return
        if identity is None:
            self.node.count("clients_refused")
            self.cut(connection, CloseCode.UNAUTHENTICATED, why)
            return
        waiting, connection.waiting = connection.waiting or [], None
        self._welcome(connection, identity)
        for event, data, extend in waiting:
            self._take(connection, event, data, extend)

    def _welcome(self, connection: Connection, identity: bytes) -> None:
        session = self._sessions.begin(identity)
        connection.stage = Stage.OPEN
        connection.send(frames.welcome(session.id, self.config.grace))
        self._sessions.attach(session, connection)

    def _resume(self, connection: Connection, data: bytes) -> None:
        if len(data) != frames.RESUME.size:
            self.cut(
                connection,
                CloseCode.PROTOCOL_ERROR,
                f"a RESUME of {len(data)} bytes: {frames.RESUME.size} are wanted",
            )
            return
        id, received = frames.RESUME.unpack(data)
        session = self._sessions.find(id, received)
        if isinstance(session, str):
            self.node.count("sessions_expired")
            connection.send(frames.expired(session))
            return
        other = session.connection
        if other is not None:
            other.session = None
            other.close(CloseCode.REPLACED, "another connection has resumed the session")
        missed = self._sessions.missed(session, received)
        connection.stage = Stage.OPEN
        connection.send(frames.resumed(session.received, self.config.grace))
        self._sessions.attach(session, connection)
        self.node.count("sessions_resumed")
        for frame in missed:
            if session.connection is connection:
                connection.send(frame)
        if other is None and session.connection is connection:
            self._routes.came_back(session)

    # ------------------------------------------------------------------------------ frames

    def _take(self, connection: Connection, event: int, data: bytes, extend: bytes) -> None:
        """A frame of a client that was let in."""
        session = connection.session
        if session is None:
            return
        if event >= COUNTED_FROM:
            session.received += 1
        if event == LibraryEvent.GROUP:
            try:
                address = frames.address_of(extend)
            except FrameError as error:
                self.cut(connection, CloseCode.PROTOCOL_ERROR, str(error))
                return
            self._routes.send(session, address, data)
        elif extend:
            why = f"an extend of {len(extend)} bytes with event {event}: only event 8 has one"
            self.cut(connection, CloseCode.PROTOCOL_ERROR, why)
        elif event >= USER_EVENT:
            self._handle(session, event, data)
        elif event == LibraryEvent.HEARTBEAT:
            self._beat(connection, data)
        elif event == LibraryEvent.BYE:
            connection.close(CloseCode.NORMAL, "")
            self._sessions.end(session)
        else:
            why = f"event {event}, which no client with a session may send"
            self.cut(connection, CloseCode.PROTOCOL_ERROR, why)

    def _beat(self, connection: Connection, data: bytes) -> None:
        if data == frames.PING:
            connection.send(encode_frame(LibraryEvent.HEARTBEAT, frames.PONG))

    def _handle(self, session: Session, event: int, data: bytes) -> None:
        handler = self._handlers.get(event)
        if handler is None:
            why = f"this gateway handles no event {event}"
            self._sessions.send(session, frames.refused(0, event, Refusal.NO_HANDLER, why))
            return
        message = ClientMessage(self, session.user, session.identity, event, data)
        try:
            result = handler(message)
        except Exception as error:
            self._failed(session, event, error)
            return
        if inspect.isawaitable(result):
            self._spawn(self._await(session, event, result))

    async def _await(self, session: Session, event: int, result: Any) -> None:
        try:
            await result
        except Exception as error:
            self._failed(session, event, error)

    def _failed(self, session: Session, event: int, error: Exception) -> None:
        log.error("the handler of event %d failed", event, exc_info=error)
        self.node.count("gateway_handler_errors")
        why = f"{type(error).__name__}: {error}"
        self._sessions.send(session, frames.refused(0, event, Refusal.FAILED, why))

    def _session_ended(self, session: Session) -> None:
        self._routes.ended(session)
        if not len(self._sessions):
            self._empty.set()

    # ------------------------------------------------------------------------------ by the clock

    async def _sweep(self) -> None:
        """Ping who is silent, and cut who does not answer or never says who it is, for ever."""
        config = self.config
        shortest = min(config.ping_interval, config.ping_timeout, config.authenticate_timeout)
        while True:
            await asyncio.sleep(max(0.01, min(1.0, shortest / _SWEEPS)))
            now = time.monotonic()
            for connection in list(self._connections):
                self._look_at(connection, now)

    def _look_at(self, connection: Connection, now: float) -> None:
        config = self.config
        silent = now - connection.heard_at
        if connection.stage is Stage.CLOSED:
            return
        is_let_in = connection.stage is Stage.OPEN or (
            config.authenticate is None and connection.is_ready
        )
        if not is_let_in:
            if now - connection.opened_at > config.authenticate_timeout:
                why = f"not let in within {config.authenticate_timeout:g} s"
                self.cut(connection, CloseCode.UNAUTHENTICATED, why)
        elif silent > config.ping_interval:
            if not connection.pinged:
                connection.pinged = True
                connection.ping()
            elif silent > config.ping_interval + config.ping_timeout:
                self.node.count("clients_silent")
                connection.abort(CloseCode.SILENT, f"no sign of life for {silent:.1f} s")

    async def _follow(self) -> None:
        """Notice which nodes come and go."""
        async for _ in self.node.events():
            self._routes.peers_changed()
            if self.node.id != self._machine:
                self._displaced()

    def _displaced(self) -> None:
        """Another node has this machine id, which is in the ids of all users here."""
        log.warning("this node has another machine id: the sessions of its clients are over")
        self._machine = self.node.id
        self._sessions.renumber(Ids(self.node.id))
        for connection in list(self._connections):
            connection.close(CloseCode.GOING_AWAY, "the gateway has another place in the cluster")
        for session in self._sessions:
            self._sessions.end(session)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Wing:
    """The gateway as its node knows it, which closes it and is not to be closed by it."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def drain(self) -> None:
        await self._gateway.drain()

    async def close(self) -> None:
        await self._gateway.close_itself()


def check_event(event: object) -> None:
    """Raise unless it is an event of programs."""
    if not isinstance(event, int) or isinstance(event, bool):
        raise TypeError(f"event {event!r}: an event is an int")
    if not USER_EVENT <= event <= LAST_EVENT:
        raise ValueError(
            f"event {event}: programs have {USER_EVENT}-{LAST_EVENT}; those below are the library's"
        )
