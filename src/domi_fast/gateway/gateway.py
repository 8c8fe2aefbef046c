"""The gateway of a node: what its clients say goes to groups, or to the program's own handlers."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from .. import DomiError, LibraryChannel, Node, encode_frame
from ..descriptors import most_descriptors
from ..errors import FrameError
from . import frames
from .config import GatewayConfig
from .entrance import Entrance
from .events import COUNTED_FROM, LAST_EVENT, USER_EVENT, CloseCode, LibraryEvent, Refusal
from .ids import Ids
from .routes import Routes
from .sessions import Session, Sessions
from .tcp import TcpListener
from .zones import Zones

if TYPE_CHECKING:
    from .pages import Pages
    from .websocket import WebSocketListener

log = logging.getLogger(__name__)

# Bytes that a client's message has in front of it in the mesh, at most.
_MESH_HEAD: Final = 512
# Seconds for tasks, and for what zones have to hear, at the end.
_PATIENCE: Final = 1.0


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
    :raises TypeError, ValueError: a setting is of the wrong kind or out of its range.
    :raises DomiError: a setting asks for what is not installed.
    """

    def __init__(self, node: Node, **settings: Any) -> None:
        if not isinstance(node, Node):
            raise TypeError(f"node {node!r}: a Node is wanted")
        GatewayConfig.check_names("Gateway", settings)
        self.config = config = GatewayConfig(**settings)
        if config.message_limit + _MESH_HEAD > node.config.frame_limit:
            raise ValueError(
                f"message_limit {config.message_limit}: the node's frame_limit of "
                f"{node.config.frame_limit} has to be {_MESH_HEAD} bytes more"
            )
        self.node = node
        self.zones = Zones()
        self._state = "new"
        self._owns_node = False
        self._handlers: dict[int, Handler] = {}
        self._running = 0
        self._machine = -1
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing: asyncio.Future[None] | None = None
        self._closed = asyncio.Event()
        self._empty = asyncio.Event()
        self._wing: _Wing | None = None
        most = config.client_limit or max(1, most_descriptors() * 3 // 4)
        self._sessions = Sessions(
            config.grace, config.history, config.history_bytes, most, self._session_ended
        )
        self._routes = Routes(node, config, self._sessions, self.zones)
        self._entrance = Entrance(
            config,
            self._sessions,
            most,
            take=self._take,
            away=self._routes.went_away,
            back=self._routes.came_back,
            count=node.count,
        )
        self._websockets = self._make_websockets()
        self._tcp = None if config.tcp_port is None else TcpListener(config, self._entrance)
        self._pages = self._make_pages()

    def _make_websockets(self) -> WebSocketListener | None:
        if self.config.port is None:
            return None
        from .websocket import WebSocketListener

        return WebSocketListener(self.config, self._entrance)

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
        node = self.node
        try:
            node.subscribe(LibraryChannel.GATEWAY, self._routes.hear)
        except DomiError as error:
            raise DomiError(f"node {node.id} cannot have this gateway: {error}") from None
        self._wing = _Wing(self)
        node.attach(self._wing)
        # A message that is dropped because others are more would put a zone out of step.
        node.when_full("raise", channel=LibraryChannel.ZONE)
        self._machine = node.id
        self._sessions.number(Ids(node.id))
        self._spawn(self._follow())
        self._spawn(self._entrance.sweep(self._routes.peers_changed))
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
        self._entrance.closed = "this gateway is closed"
        for part in (self._websockets, self._tcp, self._pages):
            if part is not None:
                part.stop()
        self._entrance.tell_all("the gateway closes")
        self._sessions.end_all()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_PATIENCE)
        if self._wing is not None:
            await self._routes.close(_PATIENCE)
            with contextlib.suppress(DomiError):
                self.node.unsubscribe(LibraryChannel.GATEWAY)
            self.node.detach(self._wing)
        await self._entrance.see_off()
        for part in (self._websockets, self._tcp, self._pages):
            if part is not None:
                await part.close()
        self._closed.set()

    async def wait_closed(self) -> None:
        """Wait until it is closed, by whomever."""
        await self._closed.wait()

    async def drain(self) -> None:
        """Take no new clients, and wait until those that are there have gone."""
        if self._state == "serving":
            self._state = "draining"
            self._entrance.closed = "this gateway is draining: use another"
        while len(self._sessions):
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
        return len(self._entrance)

    @property
    def users(self) -> frozenset[int]:
        """The users that have a session here, those that are away among them."""
        return frozenset(session.user for session in self._sessions)

    @overload
    def handle(self, event: int) -> Callable[[H], H]: ...
    @overload
    def handle(self, event: int, fn: H) -> H: ...
    def handle(self, event: int, fn: H | None = None) -> H | Callable[[H], H]:
        """Have ``fn(message)`` called for what clients send to the gateway itself.

        Without ``fn`` it is a decorator. An ``async def`` becomes a task for each message.

        :param event: 50-65535.
        :raises TypeError, ValueError: the event is not one of those.
        :raises DomiError: it has a handler already.
        """
        check_event(event)
        if fn is None:
            return lambda decorated: self.handle(event, decorated)
        if not callable(fn):
            raise TypeError(f"handler {fn!r} is not callable: a function of one message is wanted")
        if event in self._handlers:
            raise DomiError(f"event {event} has a handler already: {self._handlers[event]!r}")
        self._handlers[event] = fn
        return fn

    def send(self, user: int, event: int, data: bytes) -> bool:
        """Send to a client, now or when it is back; whether it has a session here.

        :param event: 50-65535.
        """
        check_event(event)
        session = self._sessions.get(user)
        if session is None:
            return False
        self._sessions.send(session, encode_frame(event, data))
        return True

    def disconnect(self, user: int, reason: str = "the service has ended the session") -> bool:
        """End the session of a client, which is told why (1008); whether it had one here."""
        if not isinstance(reason, str):
            raise TypeError(f"reason {reason!r}: text is wanted")
        session = self._sessions.get(user)
        if session is None:
            return False
        if session.connection is not None:
            session.connection.close(CloseCode.POLICY, reason)
        self._sessions.end(session)
        return True

    # ------------------------------------------------------------------------------ frames

    def _take(self, session: Session, event: int, data: bytes, extend: bytes) -> None:
        """A frame of a client that was let in."""
        if event >= COUNTED_FROM:
            session.received += 1
        if event == LibraryEvent.GROUP:
            try:
                address = frames.address_of(extend)
            except FrameError as error:
                self._refuse(session, str(error))
                return
            self._routes.send(session, address, data)
        elif extend:
            only = f"only event {int(LibraryEvent.GROUP)} has one"
            self._refuse(session, f"an extend of {len(extend)} bytes with event {event}: {only}")
        elif event >= USER_EVENT:
            self._handle(session, event, data)
        else:
            self._refuse(session, f"event {event}, which no client with a session may send")

    def _refuse(self, session: Session, why: str) -> None:
        """The client has sent what it may not."""
        if session.connection is not None:
            self._entrance.cut(session.connection, CloseCode.PROTOCOL_ERROR, why)

    def _handle(self, session: Session, event: int, data: bytes) -> None:
        handler = self._handlers.get(event)
        if handler is None:
            why = f"this gateway handles no event {event}"
            self._answer(session, event, Refusal.NO_HANDLER, why)
            return
        if self._running >= self.config.handler_limit:
            why = f"{self._running} handlers run, as many as may (handler_limit)"
            self._answer(session, event, Refusal.OVERLOADED, why)
            return
        message = ClientMessage(self, session.user, session.identity, event, data)
        try:
            result = handler(message)
        except (Exception, asyncio.CancelledError) as error:
            self._failed(session, event, error)
            return
        if inspect.isawaitable(result):
            self._running += 1
            self._spawn(self._await(session, event, result))

    async def _await(self, session: Session, event: int, result: Awaitable[object]) -> None:
        try:
            await result
        except Exception as error:
            self._failed(session, event, error)
        finally:
            self._running -= 1

    def _failed(self, session: Session, event: int, error: BaseException) -> None:
        log.error("the handler of event %d failed", event, exc_info=error)
        self.node.count("gateway_handler_errors")
        self._answer(session, event, Refusal.FAILED, frames.told(error))

    def _answer(self, session: Session, event: int, code: Refusal, why: str) -> None:
        self._sessions.send(session, frames.refused(0, event, code, why))

    # ------------------------------------------------------------------------------ changes

    def _session_ended(self, session: Session) -> None:
        self._routes.ended(session)
        if not len(self._sessions):
            self._empty.set()

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
        self._sessions.number(Ids(self.node.id))
        self._entrance.tell_all("the gateway has another place in the cluster")
        self._sessions.end_all()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
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
