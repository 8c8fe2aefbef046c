"""Serial: handlers and timers of a node that run one at a time, without locks."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any

from ._core import Scheduler
from .config import SerialConfig
from .errors import DomiError
from .messages import Messages, watch
from .node import Node


class Serial:
    """Serial mode of one node: what is subscribed here runs one handler at a time, in turn.

    ``Serial(node, ring_size=2**21, tick=0.001, ...)``: every keyword is a field of
    :class:`~domi_fast.config.SerialConfig`, which says what is allowed.

    Messages wait in a ring; a tick takes them out for at most ``drain_budget`` seconds, then fires
    the timers that are due for at most ``timer_budget``. A message for which the ring has no room
    is refused: a request gets Overloaded, the sender's ``on_error`` hears of anything else, and
    ``ring_full`` of the node's counters counts it.

    A component like its node, which is started before it and closed after it:
    ``run(node, serial)``. It sends with the node's own verbs.

    :raises ValueError, TypeError: a setting is out of its range, unknown or of the wrong kind.
    """

    def __init__(
        self,
        node: Node,
        ring_size: int = 2**21,
        tick: float = 0.001,
        thread: bool = False,
        **settings: Any,
    ) -> None:
        SerialConfig.check_names("Serial", settings)
        self.config = config = SerialConfig(ring_size, tick, thread, **settings)
        if not isinstance(node, Node):
            raise TypeError(f"node {node!r}: a Node is wanted")
        self._node = node
        self._scheduler = scheduler = Scheduler(
            node._router,
            config.ring_size,
            config.tick,
            config.max_pending,
            config.drain_budget,
            config.timer_budget,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Future[None] | None = None
        self._watches: weakref.WeakSet[Messages] = weakref.WeakSet()
        self.subscribe = scheduler.subscribe
        self.subscribe_race = scheduler.subscribe_race
        self.subscribe_all = scheduler.subscribe_all
        self.unsubscribe = scheduler.unsubscribe
        self.unsubscribe_group = scheduler.unsubscribe_group
        self.call_later = scheduler.call_later
        self.every = scheduler.every
        self.notify = node.notify
        self.publish = node.publish
        self.call = node.call
        self.request = node.request
        self.ventilator = node.ventilator
        self.notify_many = node.notify_many
        self.publish_many = node.publish_many
        self.call_many = node.call_many
        self.reply_many = node.reply_many
        self.drained = node.drained
        self.counters = node.counters

    async def start(self) -> None:
        """Subscribe the channels at the node, which has started, and run.

        :raises DomiError: it has started before, the node has not started, or a channel has a
            handler at the node.
        """
        self._scheduler.start()
        self._loop = asyncio.get_running_loop()

    async def close(self) -> None:
        """Take no more messages, run those that the ring holds, and drop the timers.

        What waits for a join is refused as if nobody subscribed. Every call waits for the one
        closing; to cancel a call does not stop it.

        :raises DomiError: it was called on another loop than the one that it was started on.
        """
        if self._loop not in (None, asyncio.get_running_loop()):
            raise DomiError("closed on another event loop than the one that it was started on")
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            emptied = self._scheduler.stop_taking()
            if emptied is not None:
                await emptied
        finally:
            self._scheduler.finish()
            for messages in list(self._watches):
                messages.finish()

    async def __aenter__(self) -> Serial:
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
    def node(self) -> Node:
        """The node whose channels these are."""
        return self._node

    @property
    def on_error(self) -> Callable[[DomiError, Any], object] | None:
        """The node's ``on_error``, which runs on the same thread as the handlers."""
        return self._node.on_error

    @on_error.setter
    def on_error(self, function: Callable[[DomiError, Any], object] | None) -> None:
        self._node.on_error = function

    @property
    def backlog(self) -> int:
        """Messages that wait in the ring."""
        return self._scheduler.backlog

    @property
    def waiting(self) -> int:
        """Messages that wait for those that they are to be joined with."""
        return self._scheduler.waiting

    def watch_channel(
        self, channel: int, maxsize: int = 1024
    ) -> AbstractAsyncContextManager[Messages]:
        """As :meth:`Node.watch_channel`, with the messages in their turn among the handlers'."""
        return watch(self._scheduler, self._node._router, self._watches, channel, maxsize)
