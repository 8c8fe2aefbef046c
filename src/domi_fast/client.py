"""Client: a guest that talks through one node and takes no machine id."""

from __future__ import annotations

import asyncio
import os
from typing import Any
from urllib.parse import urlsplit

from . import transport
from ._core import ROLE_UPLINK, Router, Session
from .authentication import GUEST, NO_MACHINE, NODE, Dialler, Guard, check_claim
from .channels import LibraryChannel
from .checks import check_number
from .config import GuestConfig
from .endpoint import Endpoint
from .errors import AuthError, PeerLost, masked
from .handshake import Offer, decode_welcome
from .mesh import acknowledged, drain
from .tls import Certificates, Tls, check_name

DRAIN_TIMEOUT = 2.0
CLOSING = "the guest is closing"


async def connect(
    url: str,
    *,
    name: str = "guest",
    cluster: str = "",
    secret: str | bytes | None = None,
    tls: Tls | None = None,
    node: str = "",
    timeout: float = 5.0,
    **settings: Any,
) -> Client:
    """Connect to one node of a cluster as a guest.

    :param url: ``tcp://host:port`` or ``unix:///path``: where the node listens.
    :param name: what the node's log calls this guest: 1-255 bytes of UTF-8.
    :param cluster: refuse to talk to a node of another cluster; empty: whatever it is.
    :param secret: the cluster's, where its nodes have one: 16-1,024 bytes, or text. None is the
        environment's ``DOMI_SECRET``.
    :param tls: the certificate that this guest shows, where the nodes show theirs.
    :param node: refuse to talk to a node of another name, which under TLS is that of its
        certificate; empty: whichever it is.
    :param timeout: seconds to get connected in, 0.001 to 86,400.
    :param settings: ``heartbeat_interval``, ``heartbeat_timeout``, ``request_timeout`` (seconds),
        ``phi_threshold``, ``queue_limit``, ``frame_limit`` (bytes) and ``on_error``, as for a node:
        see :class:`~domi_fast.config.GuestConfig`.
    :raises ValueError: the URL is not of one of the two forms, or a setting is out of its range.
    :raises TypeError: a setting does not exist, or is of the wrong kind.
    :raises DomiError: the files of ``tls`` cannot be used.
    :raises PeerLost: the node refused, did not answer, or has another secret or authority.
    :raises OSError: nobody listens there.
    :raises asyncio.TimeoutError: it took too long.
    """
    check_number("timeout", timeout, 0.001, 86400)
    client = Client(url, name=name, cluster=cluster, secret=secret, tls=tls, node=node, **settings)
    await client._connect(timeout)
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
        f"url {masked(str(url))!r}: tcp://host:port and unix:///path are allowed, for example "
        "tcp://127.0.0.1:7000"
    )


class Client(Endpoint):
    """A guest of one node: the same verbs, sent and answered by that node.

    Made by :func:`connect`, which also takes its settings. When the connection goes, requests in
    flight end with PeerLost and every verb raises it; connect again. Belongs to the loop that made
    it.
    """

    def __init__(self, url: str, **settings: Any) -> None:
        GuestConfig.check_names("Client", settings)
        self.config = config = GuestConfig(**settings)
        self.url = url
        self._address = _parse(url)
        self._offer = Offer(config.name, "0", config.cluster, epoch=0, instance=os.urandom(16))
        router = Router(
            heartbeat=config.heartbeat_interval,
            silence=config.heartbeat_timeout,
            phi=config.phi_threshold,
            handshake=86400.0,  # connect() has a timeout of its own
            timeout=config.request_timeout,
            queue_limit=config.queue_limit,
            frame_limit=config.frame_limit,
            on_error=config.on_error,
        )
        super().__init__(router, router, router)
        self._certificates = None if config.tls is None else Certificates(config.tls, None)
        self.subscribe = router.subscribe
        self.unsubscribe = router.unsubscribe
        self.request = router.request
        self._session: Session | None = None
        # Whether the node has taken this guest, once that is known.
        self._taken: asyncio.Future[bool] | None = None
        self._node = -1

    async def _connect(self, timeout: float) -> None:
        """Connect, once; what is not connected in time, or at all, leaves nothing behind."""
        self._loop = asyncio.get_running_loop()
        # Not wait_for: before Python 3.12 it may end well though it was cancelled, and then nobody
        # would have the guest to close it.
        joining = asyncio.ensure_future(self._join())
        try:
            await asyncio.wait([joining], timeout=timeout)
            if not joining.done():
                raise asyncio.TimeoutError(f"{self.url} did not answer within {timeout} s")
            joining.result()
        except BaseException:
            joining.cancel()
            self._disconnect("the guest gives up")
            # Waits until the socket is closed, and asks for the exception, if there is another one.
            await asyncio.gather(joining, return_exceptions=True)
            raise

    async def _join(self) -> None:
        self._router.start(self)
        host, port, path = self._address
        tls = None if self._certificates is None else self._certificates.client()
        fd = await transport.dial(host, port, path)
        self._taken = asyncio.get_running_loop().create_future()
        self._session = session = Session(
            self._router,
            fd,
            ROLE_UPLINK,
            self.url,
            guard=self._make_guard(),
            tls=tls,
        )
        session.start()
        session.dial(LibraryChannel.GUEST_NAME, self._offer.encode(), b"")
        if not await self._taken:
            raise PeerLost(f"{self.url} did not take this guest: {session.reason}")

    def _make_guard(self) -> Guard | None:
        secret = self.config.secret
        if secret is None:
            return None
        assert isinstance(secret, bytes)
        return Dialler(secret, self.config.cluster, GUEST, NO_MACHINE, NO_MACHINE)

    def _disconnect(self, reason: str) -> None:
        if self._session is not None:
            self._session.close(reason)
        self._router.stop(reason)

    async def close(self) -> None:
        """Send what is queued (for up to 2 s), say goodbye and disconnect.

        Every call waits until that is done; cancelling one of them does not stop it.
        """
        await super().close()

    async def _close(self) -> None:
        try:
            if self._session is not None:
                await drain([self._session], DRAIN_TIMEOUT)
                self._session.close(CLOSING, closing=True)
                await acknowledged(self._router, DRAIN_TIMEOUT)
        finally:
            self._disconnect(CLOSING)

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
        self._node, offer, _ = decode_welcome(data)
        if session.guard is not None:
            check_claim(session.guard, NODE, self._node)
        if self._certificates is not None:
            check_name(session.certificate, offer.name, self._node)
        if self.config.node not in ("", offer.name):
            raise AuthError(f"this is node {offer.name!r}, and {self.config.node!r} was wanted")
        return self._node

    def joined(self, session: Session) -> None:
        self._decide(True)

    def refused(self, session: Session, was_up: bool) -> None:
        """See :class:`~domi_fast.mesh.Mesh`; :func:`connect` raises."""

    def overloaded(self, session: Session, queued: int) -> None:
        """Likewise; its verbs raise."""

    def lost(self, session: Session, was_up: bool) -> None:
        self._end_watches()
        self._decide(False)

    def _decide(self, taken: bool) -> None:
        if self._taken is not None and not self._taken.done():
            self._taken.set_result(taken)
