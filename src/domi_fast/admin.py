"""The admin pages of a node, over HTTP: what it is and does; and pause, resume, drain and exit.

Reading is a GET and open to whoever reaches the port. What changes the node is a POST, and refused
unless the caller shows the token or, where there is none, calls from this machine; a web page in
somebody's browser does neither (docs/admin.md). Everything here belongs to the node's loop.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import math
import os
import socket
import time
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, Protocol
from urllib.parse import urlsplit

from . import metrics, transport
from .config import check_token, is_loopback
from .errors import DomiError

try:
    from aiohttp import web
except ImportError as error:
    raise DomiError(
        f"http_port= needs the extra [admin], which cannot be imported ({error}): "
        "pip install 'domi-fast[admin]'"
    ) from error

log = logging.getLogger(__name__)

TOKEN_VARIABLE = "DOMI_ADMIN_TOKEN"
REQUEST_TIME = 10.0
"""Seconds that a connection has for a whole request, from its opening or from its last answer."""
CLOSING_TIME = 1.0
MAX_CONNECTIONS = 100
MAX_LINE = 4096
DRAIN_DEADLINE = 30.0
MAX_DEADLINE = 86400.0

# What a proxy adds: the one that connects is then not the one that asks.
_FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")


class Administered(metrics.Measured, Protocol):
    """What is asked of a node; its own attributes, of these names."""

    @property
    def port(self) -> int: ...
    def subscribers(self, channel: int, /) -> list[int]: ...
    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    async def drain(self, deadline: float, *, until_closed: bool = True) -> bool: ...
    async def close(self) -> None: ...


class _Refused(Exception):
    """Why there is no page: an HTTP status, and what is allowed."""

    def __init__(self, status: int, why: str, *, allow: str | None = None) -> None:
        super().__init__(why)
        self.status = status
        self.headers = {} if allow is None else {"Allow": allow}
        if status == 401:
            self.headers["WWW-Authenticate"] = 'Bearer realm="domi"'


class _Connection(web.RequestHandler):
    """Answers what is no request of ours as the pages answer, and says nothing of it to the log.

    aiohttp would log and send back the words that it could not read, a token among them. Of some,
    as a host that no name can be made of, it cannot even make a request: these are cut.
    """

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except Exception:
            self.force_close()

    async def start(self) -> None:
        try:
            await super().start()
        except Exception:
            self.force_close()

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Nothing: a page that fails is logged where it is called."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        answer = _json(
            {
                "error": f"this is not understood: HTTP/1.1 is, with lines and headers of at most "
                f"{MAX_LINE} bytes"
            },
            status,
        )
        answer.force_close()
        return _signed(answer)


class _Connections(web.Server):
    """Limits what connections may take: how many there are, and the time for a whole request.

    aiohttp's own time-out runs between requests only, so one that comes a byte at a time would
    keep its connection for ever.

    :param refused: called with the transport of each that is one too many.
    """

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        refused: Callable[[asyncio.Transport], None],
    ) -> None:
        super().__init__(
            handler,
            access_log=None,
            max_line_size=MAX_LINE,
            max_field_size=MAX_LINE,
            keepalive_timeout=REQUEST_TIME,
            lingering_time=0.0,
        )
        self._timers: dict[web.RequestHandler, asyncio.TimerHandle] = {}
        self._refused = refused

    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self._timers) >= MAX_CONNECTIONS:
            # Not at once: aiohttp expects that a connection which is made lasts a turn of the loop.
            asyncio.get_running_loop().call_soon(transport.abort)
            self._refused(transport)
            return
        self._timers[handler] = self._later(transport)

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        self.stop_time(handler)
        super().connection_lost(handler, exc)

    def stop_time(self, handler: web.RequestHandler) -> None:
        """A whole request has come, or the connection has gone."""
        timer = self._timers.pop(handler, None)
        if timer is not None:
            timer.cancel()

    def start_time(self, handler: web.RequestHandler) -> None:
        """The answer is there: it is to be taken, and another request to come, in time."""
        if handler.transport is not None:
            self._timers[handler] = self._later(handler.transport)

    def _later(self, transport: asyncio.Transport) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(REQUEST_TIME, transport.abort)


class AdminServer:
    """Serves the pages of one node, from ``start`` to ``close``.

    :param note: counts one more of what has this name.
    :ivar port: the TCP port, once it has started.
    :ivar routes: each path's method and what answers it.
    :raises ValueError: the token in the environment is none.
    """

    def __init__(self, node: Administered, note: Callable[[str], None]) -> None:
        self._node = node
        self.note = note
        config = node.config
        token = config.admin_token or os.environ.get(TOKEN_VARIABLE) or None
        if token is not None and config.admin_token is None:
            check_token(TOKEN_VARIABLE, token)
        self._token = token
        self._started = 0.0
        self._sock: socket.socket | None = None
        self._connections: _Connections | None = None
        self._runner: web.ServerRunner | None = None
        self._closing: asyncio.Future[None] | None = None
        self.port: int | None = None
        self.routes: dict[str, tuple[str, Callable[[web.BaseRequest], Awaitable[Any]]]] = {
            "/ping": ("GET", self._ping),
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._metrics),
            "/node": ("GET", self._describe),
            "/peers": ("GET", self._peers),
            "/channels": ("GET", self._channels),
            "/pause": ("POST", self._pause),
            "/resume": ("POST", self._resume),
            "/drain": ("POST", self._drain),
            "/exit": ("POST", self._exit),
        }

    async def start(self) -> None:
        """Listen. Raises OSError, which names the address, when that cannot be."""
        config = self._node.config
        try:
            self._sock = transport.listen_tcp(config.host, config.http_port or 0)
        except OSError as error:
            raise OSError(error.errno, f"http_port: {error.strerror}") from None
        self.port = int(self._sock.getsockname()[1])
        self._started = time.monotonic()
        _servers.add(self)
        self._connections = _Connections(self._handle, self._refuse_connection)
        self._runner = web.ServerRunner(self._connections, shutdown_timeout=CLOSING_TIME)
        await self._runner.setup()
        await web.SockSite(self._runner, self._sock).start()

    async def close(self) -> None:
        """Stop listening; answers under way have ``CLOSING_TIME`` seconds."""
        _servers.discard(self)
        if self._runner is not None:
            await self._runner.cleanup()
        if self._sock is not None:
            self._sock.close()

    def abandon(self) -> None:
        """Close the copy of the socket in a forked child; the loop is the parent's."""
        if self._sock is not None and self._sock.fileno() >= 0:
            os.close(self._sock.detach())

    # ------------------------------------------------------------------------------------- requests

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        assert self._connections is not None
        self._connections.stop_time(request.protocol)
        try:
            method, page = self._route(request)
            if method == "POST":
                self._check_caller(request)
            found = await page(request)
            answer = found if isinstance(found, web.Response) else _json(found)
        except _Refused as refused:
            self._tell(request, refused)
            answer = _json({"error": str(refused)}, refused.status, refused.headers)
            answer.force_close()
        except DomiError as error:
            answer = _json({"error": str(error)}, 409)
        except Exception:
            log.exception("the admin page %s failed", request.path)
            answer = _json({"error": "this page failed; the node's log says why"}, 500)
        finally:
            self._connections.start_time(request.protocol)
        return _signed(answer)

    def _refuse_connection(self, transport: asyncio.Transport) -> None:
        self.note("refused_admin_connections")
        log.debug("refused %s: there are %d connections", _caller(transport), MAX_CONNECTIONS)

    def _tell(self, request: web.BaseRequest, refused: _Refused) -> None:
        """Count and log who may not; nothing of the request, which may have a token anywhere."""
        if refused.status not in (401, 403):
            return
        self.note("refused_admin_callers")
        log.debug("refused %s (%d): %s", _caller(request.transport), refused.status, refused)

    def _route(self, request: web.BaseRequest) -> tuple[str, Callable[[Any], Awaitable[Any]]]:
        self._check_host(request)
        route = self.routes.get(request.path)
        if route is None:
            raise _Refused(404, f"there is no such page; there are {', '.join(self.routes)}")
        allowed = route[0]
        if request.method != allowed and (request.method, allowed) != ("HEAD", "GET"):
            raise _Refused(405, f"{request.path} is asked for with {allowed}", allow=allowed)
        if request.can_read_body:
            raise _Refused(413, "a request has no body here")
        unknown = set(request.query) - ({"deadline"} if request.path == "/drain" else set())
        if unknown:
            raise _Refused(400, f"{request.path} knows no {', '.join(sorted(unknown))}")
        return route

    def _check_host(self, request: web.BaseRequest) -> None:
        """A page elsewhere whose name was made to lead here shows itself by that name."""
        if is_loopback(self._node.config.host) and not all(
            _is_loopback_host(host) for host in request.headers.getall("Host", [])
        ):
            raise _Refused(403, "this node listens on loopback, and is to be asked by that name")

    def _check_caller(self, request: web.BaseRequest) -> None:
        """Raise unless this caller may change the node."""
        if not _is_same_origin(request):
            raise _Refused(403, "web pages of other origins may not do this")
        if self._token is not None:
            if not _shows(request, self._token):
                raise _Refused(
                    401, "this needs the node's admin token: Authorization: Bearer TOKEN"
                )
            return
        if not _is_from_loopback(request):
            raise _Refused(
                401,
                "this node has no admin token, and without one only its own machine may do this, "
                "by its loopback address: set admin_token=",
            )
        hosts = request.headers.getall("Host", [])
        if len(hosts) != 1 or not _is_loopback_host(hosts[0]):
            raise _Refused(403, "without an admin token the Host must be a loopback address")

    # ---------------------------------------------------------------------------------------- pages

    async def _ping(self, request: web.BaseRequest) -> object:
        return web.Response(text="pong\n")

    async def _health(self, request: web.BaseRequest) -> object:
        node = self._node
        fit = node.state == "serving" and node.registered
        return _json({"state": node.state, "registered": node.registered}, 200 if fit else 503)

    async def _metrics(self, request: web.BaseRequest) -> object:
        page = metrics.render(self._node).encode()
        return web.Response(body=page, headers={"Content-Type": metrics.CONTENT_TYPE})

    async def _describe(self, request: web.BaseRequest) -> object:
        node, config = self._node, self._node.config
        return {
            "id": node.id,
            "name": config.name,
            "version": config.version,
            "cluster": config.cluster,
            "state": node.state,
            "registered": node.registered,
            "host": config.host,
            "port": node.port,
            "unix_path": config.unix_path,
            "http_port": self.port,
            "pid": os.getpid(),
            "uptime": round(time.monotonic() - self._started, 3),
            "rss": metrics.rss(),
            "peers": len(node.peers),
            "channels": len(node.channels),
            "queued": sum(peer.queued for peer in node.peers.values()),
            "counters": node.counters(),
        }

    async def _peers(self, request: web.BaseRequest) -> object:
        return [
            {
                "id": peer.id,
                "name": peer.name,
                "version": peer.version,
                "state": peer.state,
                "address": peer.address,
                "plain": peer.plain,
                "queued": peer.queued,
                "channels": sorted(peer.channels),
            }
            for peer in sorted(self._node.peers.values(), key=lambda peer: peer.id)
        ]

    async def _channels(self, request: web.BaseRequest) -> object:
        node = self._node
        known = set(node.channels).union(*(peer.channels for peer in node.peers.values()))
        return [
            {"channel": channel, "nodes": sorted(node.subscribers(channel))}
            for channel in sorted(known)
        ]

    async def _pause(self, request: web.BaseRequest) -> object:
        await self._node.pause()
        return {"state": self._node.state}

    async def _resume(self, request: web.BaseRequest) -> object:
        await self._node.resume()
        return {"state": self._node.state}

    async def _drain(self, request: web.BaseRequest) -> object:
        given = request.query.getall("deadline", [str(DRAIN_DEADLINE)])[-1]
        try:
            deadline = float(given)
        except ValueError:
            deadline = math.nan
        if not 0 <= deadline <= MAX_DEADLINE:
            raise _Refused(
                400, f"deadline {given!r}: seconds from 0 to {MAX_DEADLINE:g} are allowed"
            )
        # The node waits for the answers under way before it closes.
        return {"finished": await self._node.drain(deadline, until_closed=False)}

    async def _exit(self, request: web.BaseRequest) -> object:
        self._closing = asyncio.ensure_future(self._node.close())
        return _json({"exiting": True}, 202)


def _caller(transport: asyncio.BaseTransport | None) -> str:
    peer = transport.get_extra_info("peername") if transport else None
    return f"{peer[0]}:{peer[1]}" if peer else "who has gone"


def _json(found: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        text=json.dumps(found) + "\n",
        status=status,
        headers=headers,
        content_type="application/json",
    )


def _signed(answer: web.Response) -> web.Response:
    """The answer with the headers that all answers have."""
    answer.headers["Server"] = "domi_fast"
    answer.headers["Cache-Control"] = "no-store"
    answer.headers["X-Content-Type-Options"] = "nosniff"
    return answer


def _shows(request: web.BaseRequest, token: str) -> bool:
    given = request.headers.getall("Authorization", [])
    scheme, _, shown = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    known = hmac.compare_digest(shown.strip().encode(errors="surrogateescape"), token.encode())
    return known and scheme.lower() == "bearer"


def _is_from_loopback(request: web.BaseRequest) -> bool:
    """Whether the one who asks is on this machine, and no proxy that asks for somebody else."""
    peer = request.transport.get_extra_info("peername") if request.transport else None
    if not peer or any(header in request.headers for header in _FORWARDED):
        return False
    address = ipaddress.ip_address(peer[0].partition("%")[0])
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _is_loopback_host(host: str) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


def _is_same_origin(request: web.BaseRequest) -> bool:
    """Whether this comes from one of our own pages, or from what is no browser."""
    if request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        return False
    origins = request.headers.getall("Origin", [])
    return all(origin == f"http://{request.headers.get('Host')}" for origin in origins)


_servers: weakref.WeakSet[AdminServer] = weakref.WeakSet()


def _abandon_servers() -> None:
    for server in list(_servers):
        server.abandon()


os.register_at_fork(after_in_child=_abandon_servers)
