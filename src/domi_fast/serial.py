"""Serial: handlers and timers of a node that run one at a time, without locks."""

from __future__ import annotations

import asyncio
from typing import Any

from ._core import LoopScheduler, Scheduler, ThreadScheduler, Verbs
from .config import SerialConfig
from .endpoint import Endpoint
from .node import Node


class Serial(Endpoint):
    """Serial mode of one node: what is subscribed here runs one handler at a time, in turn.

    ``Serial(node, ring_size=2**21, tick=0.001, ...)``: every keyword is a field of
    :class:`~domi_fast.config.SerialConfig`, which says what is allowed.

    Messages wait in a ring; a tick takes them out for at most ``drain_budget`` seconds, then fires
    the timers that are due for at most ``timer_budget``. While the ring is full the node reads no
    more from its peers; with ``thread=True``, from those that send to it, as long as the thread
    keeps going. A message for which a thread that waits leaves no room is refused: a request gets
    Overloaded, the sender's ``on_error`` hears of anything else, and ``ring_full`` of the counters
    counts it.

    Handlers, timers and ``on_error`` run on the node's loop, or with ``thread=True`` on a thread of
    their own, from which the verbs go by way of a second ring of ``ring_size`` to the loop. These
    methods may be called from both threads, and from no other. ``request`` gives the serial thread
    a :class:`concurrent.futures.Future` and the loop thread what it can await.

    A component like its node, which is started before it and closed after it:
    ``run(node, serial)``.

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
        scheduler, verbs = _make(node, config)
        # Whoever watches is a task, and runs on the loop.
        super().__init__(node._router, verbs, node._router if thread else scheduler)
        self._node = node
        node._serials.add(self)
        self._scheduler = scheduler
        self.subscribe = scheduler.subscribe
        self.subscribe_race = scheduler.subscribe_race
        self.subscribe_all = scheduler.subscribe_all
        self.unsubscribe = scheduler.unsubscribe
        self.unsubscribe_group = scheduler.unsubscribe_group
        self.call_later = scheduler.call_later
        self.every = scheduler.every
        self.request = verbs.request
        self.drained = node.drained

    async def start(self) -> None:
        """Subscribe the channels at the node, which has started, and run.

        :raises DomiError: it has started before, the node has not started or runs on another
            loop, or a channel has a handler at the node.
        """
        self._scheduler.start()
        self._loop = asyncio.get_running_loop()

    async def close(self) -> None:
        """Take no more messages, run those that the ring holds, and drop the timers.

        What waits for a join is refused as if nobody subscribed. Every call waits for the one
        closing; to cancel a call does not stop it.

        :raises DomiError: it was called on another loop than the one that it was started on.
        """
        await super().close()

    async def _close(self) -> None:
        try:
            emptied = self._scheduler.stop_taking()
            if emptied is not None:
                await emptied
        finally:
            self._scheduler.finish()
            self._end_watches()

    async def __aenter__(self) -> Serial:
        await self.start()
        return self

    @property
    def node(self) -> Node:
        """The node whose channels these are."""
        return self._node

    @property
    def backlog(self) -> int:
        """Messages that wait in the ring."""
        return self._scheduler.backlog

    @property
    def waiting(self) -> int:
        """Messages that wait for those that they are to be joined with."""
        return self._scheduler.waiting


def _make(node: Node, config: SerialConfig) -> tuple[Scheduler, Verbs]:
    """What runs the handlers, and what sends from where they run."""
    arguments = (
        node._router,
        config.ring_size,
        config.tick,
        config.max_pending,
        config.drain_budget,
        config.timer_budget,
        config.busy_poll,
        f"serial-{node.config.name}",
    )
    if config.thread:
        scheduler = ThreadScheduler(*arguments)
        return scheduler, scheduler.verbs
    return LoopScheduler(*arguments), node._router
