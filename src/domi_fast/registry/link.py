"""The way to a registry's servers: blocking calls in threads, over one channel at a time.

A channel is used until a call over it fails as if its server were away; it is closed then, which
ends every call and watch on it, and the next call opens another.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, Generic, Protocol, TypeVar

from ..errors import RegistryError

TIMEOUT: Final = 2.0
"""Seconds that one call may take before its server counts as away."""

PATIENCE: Final = 5.0
"""Seconds for which a call goes on trying servers."""

_PAUSE: Final = 0.1
_THREADS: Final = 8


class Away(RegistryError):
    """The endpoint could not be reached, or did not answer.

    :ivar sent: it may have got the call all the same, and done what it says.
    """

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class Closable(Protocol):
    def close(self) -> None:
        """End every call on it. Any thread may do so, and does it once."""


T = TypeVar("T")
C = TypeVar("C", bound=Closable)


class Link(Generic[C]):
    """All calls of one registry. :meth:`call` and :meth:`post` belong to its loop.

    :param name: of the servers, for the threads.
    :param connect: opens a channel, in a thread, to another server each time. Raises Away.
    """

    def __init__(self, name: str, connect: Callable[[], C]) -> None:
        self._connect = connect
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"registry {name}")
        self._lock = threading.Lock()
        self._channel: C | None = None
        self._closed = False
        self._undoing: set[asyncio.Task[Any]] = set()

    async def call(
        self,
        work: Callable[[C], T],
        *,
        again: bool,
        undo: Callable[[C], object] | None = None,
    ) -> T:
        """What ``work`` returns or raises, done in a thread, after what nobody waits for any more.

        :param again: it may be done twice, so that one of which nobody knows is tried again.
        :param undo: is done afterwards if nobody will know of it: the call was cancelled or failed.
        """
        before = self._undoing - {asyncio.current_task()}
        if before:
            await asyncio.wait(before)
        end = time.monotonic() + PATIENCE
        job: Future[T] | None = None
        try:
            while True:
                job = self._pool.submit(self._attempt, work)
                try:
                    return await asyncio.wrap_future(job)
                except Away as away:
                    if (away.sent and not again) or time.monotonic() >= end:
                        raise
                await asyncio.sleep(_PAUSE)
        except (Away, asyncio.CancelledError):
            if undo is not None and job is not None:
                self.undo(undo, after=job)
            raise

    def undo(self, work: Callable[[C], object], *, after: Future[Any] | None = None) -> None:
        """Have it done, before any call that follows; nobody hears of its failure."""
        if not self._closed:
            self.finish(asyncio.ensure_future(self._undo(work, after)))

    def finish(self, task: asyncio.Task[Any]) -> None:
        """Have the task done before any call that follows."""
        self._undoing.add(task)
        task.add_done_callback(self._undoing.discard)

    async def _undo(self, work: Callable[[C], object], after: Future[Any] | None) -> None:
        if after is not None and not after.cancelled():
            await asyncio.gather(asyncio.wrap_future(after), return_exceptions=True)
        with contextlib.suppress(RegistryError):
            await asyncio.wrap_future(self._pool.submit(self._attempt, work))

    def post(self, work: Callable[[C], object]) -> None:
        """Have it done; nobody waits for it, nor hears of its failure."""
        if not self._closed:
            self._pool.submit(self._attempt, work)

    async def close(self) -> None:
        """What was begun is still done."""
        self._closed = True
        if self._undoing:
            await asyncio.wait(self._undoing, timeout=TIMEOUT)
        self.abandon()

    def abandon(self) -> None:
        """Be gone: what is queued is not done."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.drop(None)

    # ------------------------------------------------------------------ from any thread

    def channel(self) -> C:
        """The channel of the moment. Raises Away."""
        with self._lock:
            if self._channel is None:
                self._channel = self._connect()
            return self._channel

    def drop(self, channel: C | None) -> None:
        """This channel's server is away (None: whichever it is): use another from now on."""
        with self._lock:
            if self._channel is None or channel not in {None, self._channel}:
                return
            channel, self._channel = self._channel, None
        channel.close()

    def _attempt(self, work: Callable[[C], T]) -> T:
        channel = self.channel()
        try:
            return work(channel)
        except Away:
            self.drop(channel)
            raise
