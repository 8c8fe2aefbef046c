"""Client: a guest that talks through one node and takes no machine id."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from . import transport
from ._core import ROLE_UPLINK, Router, Session
from .channels import LibraryChannel
from .endpoint import Endpoint
from .errors import DomiError, PeerLost
from .handshake import Offer, decode_welcome
from .mesh import drain


async def connect(
    url: str,
    *,
    name: str = "guest",
    cluster: str = "",
    secret: str | bytes | None = None,
    timeout: float = 5.0,
    **settings: Any,
) -> Client:
    """Connect to one node of a cluster as a guest.

    :param url: ``tcp://host:port`` or ``unix:///path``: where the node listens.
    :param name: what the node's log calls this guest.
    :param cluster: refuse to talk to a node of another cluster; empty: whatever it is.
    :param timeout: seconds to get connected in.
    :param settings: ``heartbeat_interval``, ``heartbeat_timeout``, ``request_timeout`` (seconds),
        ``queue_limit``, ``frame_limit`` (bytes) and ``on_error``, as for a node.
    :raises ValueError: the URL is not of one of the two forms.
    :raises PeerLost: the node refused, or did not answer.
    :raises OSError: nobody listens there.
    :raises asyncio.TimeoutError: it took too long.
    """
    if secret is not None:
        raise DomiError("secret=...: this version has no authentication yet; leave it out")
    client = Client(url, name=name, cluster=cluster, **settings)
    await asyncio.wait_for(client.start(), timeout)
    return client


def _parse(url: str) -> tuple[str, int, str | None]:
    try:
        parts = urlsplit(url)
        plain = not (parts.query or parts.fragment or parts.username or parts.password)
        if plain and parts.scheme == "tcp" and parts.hostname and parts.port:
            if parts.path in ("", "/"):
                return parts.hostname, parts.port, None
        elif plain and parts.scheme == "unix" and not parts.netloc and len(parts.path) > 1:
            return "", 0, parts.path
    except (ValueError, TypeError, AttributeError):
        pass  # the message below says what is allowed
    raise ValueError(
        f"url {url!r}: tcp://host:port and unix:///path are allowed, for example "
        "tcp://127.0.0.1:7000"
    )


class Client(Endpoint):
    """A guest of one node: the same verbs, sent and answered by that node.

    Made by :func:`connect`. When the connection goes, requests in flight end with PeerLost and
    every verb raises it; connect again. Belongs to the loop that made it.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str = "guest",
        cluster: str = "",
        heartbeat_interval: float = 5.0,
        heartbeat_timeout: float = 10.0,
        request_timeout: float = 5.0,
        queue_limit: int = 16 * 1024 * 1024,
        frame_limit: int = 16 * 1024 * 1024,
        on_error: Callable[[DomiError, Any], object] | None = None,
    ) -> None:
        self.url = url
        self._address = _parse(url)
        self._offer = Offer(name, "0", cluster, epoch=0, instance=os.urandom(16))
        router = Router(
            heartbeat=heartbeat_interval,
            silence=heartbeat_timeout,
            timeout=request_timeout,
            queue_limit=queue_limit,
            frame_limit=frame_limit,
            on_error=on_error,
        )
        super().__init__(router)
        self._session: Session | None = None
        self._connected: asyncio.Future[None] | None = None
        self._node = -1

    async def start(self) -> None:
        """Connect; :func:`connect` does it."""
        host, port, path = self._address
        fd = await transport.dial(host, port, path)
        self._router.start(self)
        self._connected = asyncio.get_running_loop().create_future()
        self._session = session = Session(self._router, fd, ROLE_UPLINK, self.url)
        try:
            session.start()
            session.dial(LibraryChannel.GUEST_NAME, self._offer.encode(), b"")
            await self._connected
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Send what is queued (for up to 2 s), say goodbye and disconnect.

        Every call waits until that is done; cancelling one of them does not stop it.
        """
        await super().close()

    async def _close(self) -> None:
        session = self._session
        try:
            if session is not None:
                await drain([session], 2.0)
        finally:
            if session is not None:
                session.close("the guest is closing")
            self._router.stop("the guest is closing")

    async def __aenter__(self) -> Client:
        return self

    @property
    def node_id(self) -> int:
        """Machine id of the node that this guest talks through."""
        return self._node

    @property
    def connected(self) -> bool:
        return self._session is not None and self._session.up

    def drained(self) -> asyncio.Future[None]:
        """A future that is done once there is room to send."""
        return self._router.drained(self._node)

    # ----------------------------------------------------------------- what the core's router calls

    def welcomed(self, session: Session, data: bytes) -> int:
        self._node, _ = decode_welcome(data)
        return self._node

    def joined(self, session: Session) -> None:
        if self._connected is not None and not self._connected.done():
            self._connected.set_result(None)

    def routes_changed(self) -> None:
        """A guest keeps no account of who subscribes."""

    def lost(self, session: Session, was_up: bool) -> None:
        self._end_watches()
        if self._connected is not None and not self._connected.done():
            self._connected.set_exception(
                PeerLost(f"{self.url} did not take this guest: {session.reason}")
            )
