"""A gateway's pages: which node is to serve somebody who asks, and the client for web pages."""

from __future__ import annotations

import functools
import importlib.resources
from typing import Any, Final

from .. import DomiError, Node
from ..config import parse_version
from ..memory import used_share
from ..transport import listen_tcp
from .config import GatewayConfig
from .zones import Zones

try:
    from aiohttp import web
except ImportError as error:
    raise DomiError(
        f"a gateway's http_port= needs the extra [gateway], which cannot be imported ({error}): "
        "pip install 'domi-fast[gateway]'"
    ) from error

MEMORY_LIMIT: Final = 0.9
"""The share of its memory above which a node is not proposed to anybody."""
_CLOSING_TIME: Final = 1.0


class Pages:
    """Serves them, from ``start`` to ``close``. Belongs to the loop that started it.

    :ivar port: the TCP port, once it has started.
    """

    def __init__(self, config: GatewayConfig, node: Node, zones: Zones) -> None:
        self._config = config
        self._node = node
        self._zones = zones
        self._runner: web.AppRunner | None = None
        self.port: int | None = None

    async def start(self) -> None:
        """Listen. Raises OSError, which names the address, when that cannot be."""
        app = web.Application()
        app.router.add_get("/place/{service}", self._place)
        app.router.add_get("/client.js", self._client)
        try:
            sock = listen_tcp(self._config.host, self._config.http_port or 0)
        except OSError as error:
            raise OSError(error.errno, f"http_port: {error.strerror}") from None
        self.port = int(sock.getsockname()[1])
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_CLOSING_TIME)
        await self._runner.setup()
        await web.SockSite(self._runner, sock, ssl_context=self._config.tls).start()

    def stop(self) -> None:
        """The answers under way go on until :meth:`close`."""

    async def close(self) -> None:
        """Stop listening; answers under way have a second."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _client(self, request: web.Request) -> web.Response:
        return self._answer(request, web.Response(body=_script(), content_type="text/javascript"))

    async def _place(self, request: web.Request) -> web.Response:
        service = request.match_info["service"]
        found = self._zone(service) or self._other(service)
        if found is None:
            why = f"no node of service {service!r} is there"
            return self._answer(request, web.json_response({"error": why}, status=404))
        status = 503 if "error" in found else 200
        return self._answer(request, web.json_response(found, status=status))

    def _zone(self, service: str) -> dict[str, Any] | None:
        """Where a group of this service would be made; None when that is no zone."""
        states = self._zones.of(service)
        if not states:
            return None
        state = self._zones.place(service)
        if state is None:
            full = self._zones.is_full(service)
            why = "use more than they may of their memory" if full else "take no new groups"
            return {
                "error": f"the zones of service {service!r} ({len(states)}) {why}: try again later"
            }
        return {
            "service": service,
            "node": str(state.zone),
            "machine": state.machine,
            "address": _address(state.host, state.port),
            "version": str(state.version),
            "memory": round(state.memory, 4),
        }

    def _other(self, service: str) -> dict[str, Any] | None:
        """The node of this name that uses least of its memory; None when there is none."""
        node, found = self._node, []
        if node.config.name == service and node.state == "serving":
            here = _address(node.config.host, node.port)
            found.append((used_share(), node.id, here, parse_version(node.config.version)))
        for peer in node.peers.values():
            if peer.name == service and peer.state == "serving":
                memory = peer.memory or 0.0
                found.append((memory, peer.id, peer.listener, parse_version(peer.version)))
        if not found:
            return None
        newest = max(version for *_, version in found)
        memory, machine, address, version = min(each for each in found if each[3] == newest)
        if memory > MEMORY_LIMIT:
            return {
                "error": f"all {len(found)} nodes of service {service!r} use more than "
                f"{MEMORY_LIMIT:.0%} of their memory: try again later"
            }
        return {
            "service": service,
            "node": str(machine),
            "machine": machine,
            "address": address,
            "version": str(version),
            "memory": round(memory, 4),
        }

    def _answer(self, request: web.Request, response: web.Response) -> web.Response:
        """With the leave for a page of another origin to read it, where that may connect."""
        origin = request.headers.get("Origin")
        if origin is not None and self._config.allows(origin, request.headers.get("Host", "")):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Vary"] = "Origin"
        return response


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@functools.cache
def _script() -> bytes:
    return importlib.resources.files(__package__).joinpath("client.js").read_bytes()
