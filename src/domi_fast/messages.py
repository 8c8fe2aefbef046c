"""Messages: the contexts of one channel, one after the other, for tasks."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ._core import Context, Router, Scheduler
from .errors import DomiError, Overloaded


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


@asynccontextmanager
async def watch(
    source: Router | Scheduler,
    router: Router,
    watches: weakref.WeakSet[Messages],
    channel: int,
    maxsize: int,
) -> AsyncIterator[Messages]:
    """Subscribe at ``source`` for the length of a block; what is left over goes to ``router``.

    ``watches`` has the iterator meanwhile, for whoever has to end it.
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

    source.subscribe(channel, arrived)
    messages = Messages(queue)
    watches.add(messages)
    try:
        yield messages
    finally:
        # The handler may be gone, or another by now.
        if source.handlers().get(channel) is arrived:
            with contextlib.suppress(DomiError):
                source.unsubscribe(channel)
        left = [queue.get_nowait() for _ in range(queue.qsize())]
        router.abandon([context for context in left if context is not None])
        messages.finish()
