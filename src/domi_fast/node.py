"""Node: a member of a cluster. Its verbs are the compiled router's own methods."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any

from . import _core, errors
from ._core import Context, Router
from .channels import LibraryChannel
from .config import NodeConfig
from .errors import DomiError, Overloaded
from .mesh import Mesh, Peer
from .registry import default_url, open_registry

_core.bind(errors, LibraryChannel)


class Node:
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
        try:
            self.config = NodeConfig(name, **settings)
        except TypeError:
            fields = NodeConfig.__dataclass_fields__
            unknown = sorted(set(settings) - set(fields))
            if not unknown:
                raise
            raise TypeError(
                f"Node has no setting {', '.join(unknown)}; it has {', '.join(fields)}"
            ) from None
        config = self.config
        self._router = router = Router(
            heartbeat=config.heartbeat_interval,
            silence=config.heartbeat_timeout,
            handshake=config.handshake_timeout,
            timeout=config.request_timeout,
            queue_limit=config.queue_limit,
            frame_limit=config.frame_limit,
            on_error=config.on_error,
        )
        self._mesh = Mesh(
            router, config, open_registry(config.registry or default_url(config.cluster))
        )
        self._state = "new"
        self.subscribe = router.subscribe
        self.unsubscribe = router.unsubscribe
        self.notify = router.notify
        self.publish = router.publish
        self.call = router.call
        self.request = router.request
        self.ventilator = router.ventilator
        self.drained = router.drained
        self.counters = router.counters
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
        try:
            await self._mesh.start()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Leave the cluster: finish the handlers that run, send what is queued, say goodbye.

        Waits up to ``drain_timeout`` seconds for each of the two. A second call does nothing.
        """
        if self._state in ("closing", "closed"):
            return
        self._state = "closing"
        try:
            tasks = self._router.handler_tasks() - {asyncio.current_task()}
            if tasks:
                _, pending = await asyncio.wait(tasks, timeout=self.config.drain_timeout)
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)
        finally:
            await self._mesh.close()
            self._state = "closed"

    async def __aenter__(self) -> Node:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

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

    @property
    def on_error(self) -> Callable[[DomiError, Any], object] | None:
        """Called with (exception, Frame) for what is refused or lost after its verb returned."""
        return self._router.on_error

    @on_error.setter
    def on_error(self, function: Callable[[DomiError, Any], object] | None) -> None:
        if function is not None and not callable(function):
            raise TypeError(f"on_error {function!r} is not callable")
        self._router.on_error = function

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

    @asynccontextmanager
    async def watch_channel(self, channel: int, maxsize: int = 1024) -> AsyncIterator[Messages]:
        """Subscribe for the length of a block; iterate over the contexts that arrive.

        :param maxsize: how many wait at most. When so many do, the newest is refused: a request is
            answered with Overloaded, anything else is dropped and counted
            (``handlers_overloaded``).
        """
        async with watch(self._router, channel, maxsize) as messages:
            yield messages


class Messages:
    """What ``watch_channel`` gives: an iterator without an end, of which a cancelled wait loses
    nothing.
    """

    def __init__(self, queue: asyncio.Queue[Context]) -> None:
        self._queue = queue

    def __aiter__(self) -> Messages:
        return self

    async def __anext__(self) -> Context:
        return await self._queue.get()

    def __len__(self) -> int:
        """How many messages wait."""
        return self._queue.qsize()


@asynccontextmanager
async def watch(router: Router, channel: int, maxsize: int) -> AsyncIterator[Messages]:
    """What ``watch_channel`` of nodes and guests does."""
    if maxsize < 1:
        raise ValueError(f"maxsize {maxsize}: at least 1 message must have room")
    queue: asyncio.Queue[Context] = asyncio.Queue(maxsize)

    def arrived(context: Context) -> None:
        try:
            queue.put_nowait(context)
        except asyncio.QueueFull:
            raise Overloaded(
                f"{maxsize} messages of channel {channel} wait to be taken",
                channel=channel,
                limit=maxsize,
            ) from None

    router.subscribe(channel, arrived)
    try:
        yield Messages(queue)
    finally:
        with contextlib.suppress(DomiError):
            router.unsubscribe(channel)
