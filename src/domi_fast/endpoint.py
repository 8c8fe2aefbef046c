"""Endpoint: what a node and a guest have in common, above all the compiled router's verbs."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any

from ._core import Context, Router
from .config import check_on_error
from .errors import DomiError, Overloaded

VERBS = (
    "subscribe",
    "unsubscribe",
    "notify",
    "publish",
    "call",
    "request",
    "ventilator",
    "counters",
)


class Endpoint(ABC):
    """Sends, subscribes and closes once; :class:`Node` and :class:`Client` add how to connect.

    :param router: its methods become the endpoint's own, of each instance: a subclass cannot
        override a verb, and one that tries is a TypeError.
    """

    def __init_subclass__(cls) -> None:
        for verb in VERBS:
            if verb in cls.__dict__:
                raise TypeError(
                    f"{cls.__name__}.{verb}: verbs are the core's own and cannot be overridden; "
                    "give the method another name"
                )

    def __init__(self, router: Router) -> None:
        self._router = router
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Future[None] | None = None
        self._watches: weakref.WeakSet[Messages] = weakref.WeakSet()
        self.subscribe = router.subscribe
        self.unsubscribe = router.unsubscribe
        self.notify = router.notify
        self.publish = router.publish
        self.call = router.call
        self.request = router.request
        self.ventilator = router.ventilator
        self.counters = router.counters

    async def close(self) -> None:
        """Every call waits for the one closing; to cancel a call does not stop it.

        :raises DomiError: it was called on another loop than the one that it was started on.
        """
        if self._loop not in (None, asyncio.get_running_loop()):
            raise DomiError("closed on another event loop than the one that it was started on")
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    @abstractmethod
    async def _close(self) -> None: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def on_error(self) -> Callable[[DomiError, Any], object] | None:
        """Called with (exception, Frame) for what is refused or lost after its verb returned."""
        return self._router.on_error

    @on_error.setter
    def on_error(self, function: Callable[[DomiError, Any], object] | None) -> None:
        check_on_error(function)
        self._router.on_error = function

    @asynccontextmanager
    async def watch_channel(self, channel: int, maxsize: int = 1024) -> AsyncIterator[Messages]:
        """Subscribe for the length of a block; iterate over the contexts that arrive.

        :param maxsize: how many wait at most. When so many do, the newest is refused: a request is
            answered with Overloaded, anything else is dropped and counted
            (``handlers_overloaded``).
        """
        if maxsize < 1:
            raise ValueError(f"maxsize {maxsize}: at least 1 message must have room")
        queue: asyncio.Queue[Context | None] = asyncio.Queue(maxsize)

        def arrived(context: Context) -> None:
            try:
                queue.put_nowait(context)
            except asyncio.QueueFull:
                raise Overloaded(
                    f"{maxsize} messages of channel {channel} wait to be taken",
                    channel=channel,
                    limit=maxsize,
                ) from None

        self.subscribe(channel, arrived)
        messages = Messages(queue)
        self._watches.add(messages)
        try:
            yield messages
        finally:
            # The handler may be gone, or another by now.
            if self._router.handlers().get(channel) is arrived:
                with contextlib.suppress(DomiError):
                    self.unsubscribe(channel)
            left = [queue.get_nowait() for _ in range(queue.qsize())]
            self._router.abandon([context for context in left if context is not None])
            messages.finish()

    def _end_watches(self) -> None:
        for messages in list(self._watches):
            messages.finish()


class Messages:
    """What ``watch_channel`` gives: an iterator that ends with its block or its node.

    Several tasks may take from it; a wait that is cancelled loses nothing.
    """

    def __init__(self, queue: asyncio.Queue[Context | None]) -> None:
        self._queue = queue
        self._finished = False

    def __aiter__(self) -> Messages:
        return self

    async def __anext__(self) -> Context:
        context = None
        if not (self._finished and self._queue.empty()):
            context = await self._queue.get()
        if context is None:
            self.finish()  # for the next who waits
            raise StopAsyncIteration
        return context

    def finish(self) -> None:
        """End the iteration, for all who iterate, once what waits has been taken."""
        self._finished = True
        if self._queue.empty():
            self._queue.put_nowait(None)

    def __len__(self) -> int:
        """How many messages wait."""
        return self._queue.qsize()
