"""Node: a member of a cluster. Its verbs are the compiled router's own methods."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from . import _core, errors
from ._core import Router
from .channels import LibraryChannel
from .config import NodeConfig
from .endpoint import Endpoint
from .errors import DomiError
from .mesh import Mesh, Peer
from .registry import default_url, open_registry

_core.bind(errors, LibraryChannel)


class Node(Endpoint):
    """A node of the mesh: it subscribes, sends and answers.

    ``Node(name, *, version="0", cluster="default", host="127.0.0.1", port=0, ...)``: every keyword
    is a field of :class:`~domi_fast.config.NodeConfig`, which says what is allowed.

    Use it as ``async with Node(...) as node``, or ``start`` and ``close`` it, or give it to
    :func:`~domi_fast.app.run`. It belongs to the event loop that started it; only a
    :class:`Context` may be answered from other threads. A closed node stays closed.

    :raises ValueError: a setting is out of its range.
    :raises DomiError: a setting asks for what this version does not have.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        NodeConfig.check_names("Node", settings)
        self.config = config = NodeConfig(name, **settings)
        router = Router(
            heartbeat=config.heartbeat_interval,
            silence=config.heartbeat_timeout,
            handshake=config.handshake_timeout,
            timeout=config.request_timeout,
            queue_limit=config.queue_limit,
            frame_limit=config.frame_limit,
            busy_poll=config.busy_poll,
            on_error=config.on_error,
        )
        super().__init__(router, router, router)
        self._mesh = Mesh(
            router, config, open_registry(config.registry or default_url(config.cluster))
        )
        self._state = "new"
        self._starting: asyncio.Future[None] | None = None
        self._closers: set[asyncio.Task[Any]] = set()
        self.subscribe = router.subscribe
        self.unsubscribe = router.unsubscribe
        self.request = router.request
        self.drained = router.drained
        self.subscribers = router.subscribers

    async def start(self) -> None:
        """Join the cluster.

        Returns when every registered peer is connected, or after ``start_timeout`` seconds with
        the missing ones logged.

        :raises ClusterFull: all 1,024 machine ids are taken.
        :raises VersionTooOld: a newer version of this name is in the cluster.
        :raises RegistryError: the registry cannot be reached.
        :raises OSError: the address cannot be listened on.
        """
        if self._state != "new":
            raise DomiError(f"this node is {self._state}: make another Node to start again")
        self._state = "started"
        self._loop = asyncio.get_running_loop()
        self._starting = asyncio.ensure_future(self._mesh.start())
        try:
            await self._starting
        except BaseException:
            closed_by_another = self._closing is not None
            await self.close()
            if closed_by_another:
                raise DomiError("the node was closed while it started") from None
            raise

    async def close(self) -> None:
        """Leave the cluster: finish the handlers that run, send what is queued, say goodbye.

        Waits up to ``drain_timeout`` seconds for each of the two. Every call waits until the node
        is closed; cancelling one of them does not stop the closing.
        """
        current = asyncio.current_task()
        if current is not None:
            self._closers.add(current)
        await super().close()

    async def _close(self) -> None:
        self._state = "closed"
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait([self._starting])
        self._end_watches()
        try:
            await self._mesh.drain_itself()
            # A handler that closes the node waits for this, and this does not wait for it.
            await self._end_handlers(self.config.drain_timeout)
        finally:
            await self._mesh.close()
        # What arrived meanwhile may have started more; nobody can be answered any more.
        await self._end_handlers(0.0)

    async def _end_handlers(self, timeout: float) -> None:
        tasks = self._router.handler_tasks() - self._closers
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=timeout)
            for task in pending:
                task.cancel()
            if pending:
                await asyncio.wait(pending, timeout=self.config.drain_timeout)

    async def __aenter__(self) -> Node:
        await self.start()
        return self

    @property
    def id(self) -> int:
        """The machine id, 0-1023; -1 before the start."""
        return self._router.id

    @property
    def port(self) -> int:
        """The TCP port that the node listens on; 0 before the start."""
        return self._mesh.port

    @property
    def peers(self) -> Mapping[int, Peer]:
        """The connected peers by machine id, without this node; a live view."""
        return self._mesh.peers

    async def wait_subscribed(
        self, channel: int, count: int = 1, timeout: float | None = None
    ) -> None:
        """Wait until at least ``count`` nodes (this one included) subscribe to ``channel``.

        :param timeout: seconds; None waits for as long as it takes.
        :raises asyncio.TimeoutError: there were not enough in time.
        """
        await self._mesh.wait_for(lambda: len(self._router.subscribers(channel)) >= count, timeout)

    async def wait_peers(self, count: int, timeout: float | None = None) -> None:
        """Wait until exactly ``count`` peers are connected. ``timeout`` as above."""
        await self._mesh.wait_for(lambda: len(self.peers) == count, timeout)
