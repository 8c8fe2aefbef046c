"""Endpoint: what nodes, guests and serial mode have in common, above all the core's verbs."""

from __future__ import annotations

import asyncio
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any

from ._core import Router, Scheduler, Verbs
from .config import check_on_error
from .errors import DomiError
from .messages import Messages, watch

VERBS = (
    "subscribe",
    "unsubscribe",
    "notify",
    "publish",
    "call",
    "request",
    "ventilator",
    "notify_many",
    "publish_many",
    "call_many",
    "reply_many",
    "counters",
)


class Endpoint(ABC):
    """Sends, subscribes and closes once; Node and Client add how to connect, Serial how to run.

    :param router: the core's router, of this or of the node that this stands on.
    :param verbs: what sends: the router, or what gives it messages of a serial thread. Its methods
        become the endpoint's own, of each instance: a subclass cannot override a verb, and one that
        tries is a TypeError.
    :param watched: where the channels of ``watch_channel`` are subscribed.
    """

    def __init_subclass__(cls) -> None:
        for verb in VERBS:
            if verb in cls.__dict__:
                raise TypeError(
                    f"{cls.__name__}.{verb}: verbs are the core's own and cannot be overridden; "
                    "give the method another name"
                )

    def __init__(self, router: Router, verbs: Verbs, watched: Router | Scheduler) -> None:
        self._router = router
        self._watched = watched
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Future[None] | None = None
        self._watches: weakref.WeakSet[Messages] = weakref.WeakSet()
        self.notify = verbs.notify
        self.publish = verbs.publish
        self.call = verbs.call
        self.ventilator = verbs.ventilator
        self.notify_many = verbs.notify_many
        self.publish_many = verbs.publish_many
        self.call_many = verbs.call_many
        self.reply_many = verbs.reply_many
        self.counters = router.counters

    async def close(self) -> None:
        """Every call waits for the one closing; to cancel a call does not stop it.

        :raises DomiError: it was called on another loop than the one that it was started on.
        """
        if self._loop not in (None, asyncio.get_running_loop()):
            raise DomiError("closed on another event loop than the one that it was started on")
        await asyncio.shield(self._begin_closing())

    def _begin_closing(self) -> asyncio.Future[None]:
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        return self._closing

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
        async with watch(self._watched, self._router, self._watches, channel, maxsize) as messages:
            yield messages

    def _end_watches(self) -> None:
        for messages in list(self._watches):
            messages.finish()
