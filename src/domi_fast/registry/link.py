"""The way to a registry's servers: what is tried again and what is undone, however it is called.

:class:`Link` makes blocking calls in threads, over one channel at a time. A channel is used until a
call over it fails as if its server were away; it is closed then, which ends every call and watch on
it, and the next call opens another.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, Generic, Protocol, TypeAlias, TypeVar

from ..errors import RegistryError

TIMEOUT: Final = 2.0
"""Seconds that one call may take before its server counts as away."""

PATIENCE: Final = 5.0
"""Seconds for which a call goes on trying servers."""

PAUSE: Final = 0.1
"""Seconds between two tries."""

CLOSED: Final = "the registry was closed before it had answered"

_THREADS: Final = 8

T = TypeVar("T")


class Away(RegistryError):
    """The endpoint could not be reached, or did not answer.

    :ivar sent: it may have got the call all the same, and done what it says.
    """

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


Begin: TypeAlias = Callable[[], "asyncio.Future[T]"]
"""Begins a call, and gives what it will return or raise."""


class Calls(ABC):
    """All calls of one registry. Belongs to its loop."""

    def __init__(self) -> None:
        self._closed = False
        # What any later call waits for.
        self._first: set[asyncio.Future[Any]] = set()

    @abstractmethod
    def abandon(self) -> None:
        """Be gone: what is queued is not done."""

    async def close(self) -> None:
        """What was begun is still done."""
        self._closed = True
        if self._first:
            await asyncio.wait(self._first, timeout=TIMEOUT)
        self.abandon()

    async def _patiently(
        self, begin: Begin[T], *, again: bool, undo: Begin[object] | None = None
    ) -> T:
        """What the call returns or raises, begun after whatever has to be done first.

        :param again: it may be done twice, so that one of which nobody knows is tried again.
        :param undo: is done afterwards if nobody will know of it: the call was cancelled or failed.
        """
        before = self._first - {asyncio.current_task()}
        if before:
            await asyncio.wait(before)
        end = time.monotonic() + PATIENCE
        job: asyncio.Future[T] | None = None
        try:
            while True:
                job = begin()
                try:
                    return await asyncio.shield(job)
                except Away as away:
                    if (away.sent and not again) or time.monotonic() >= end:
                        raise
                await asyncio.sleep(PAUSE)
        except (Away, asyncio.CancelledError) as error:
            if self._closed and (isinstance(error, Away) or (job is not None and job.cancelled())):
                # Neither is the server away, nor was who waits for it cancelled.
                raise RegistryError(CLOSED) from None
            if job is not None:
                if undo is None:
                    job.cancel()
                else:
                    self._undo_later(undo, job)
            raise

    def _undo_later(self, undo: Begin[object], job: asyncio.Future[T] | None = None) -> None:
        """Have it done after the job, before any call that follows; nobody hears of a failure."""
        if not self._closed:
            self._do_first(asyncio.ensure_future(self._undo(undo, job)))

    def _do_first(self, task: asyncio.Future[Any]) -> None:
        """Have it done before any call that follows."""
        self._first.add(task)
        task.add_done_callback(self._first.discard)

    @staticmethod
    async def _undo(undo: Begin[object], job: asyncio.Future[T] | None) -> None:
        if job is not None:
            await asyncio.gather(job, return_exceptions=True)
        with contextlib.suppress(RegistryError):
            await undo()


class Closable(Protocol):
    def close(self) -> None:
        """End every call on it. Any thread may do so, and does it once."""


C = TypeVar("C", bound=Closable)


class Link(Calls, Generic[C]):
    """:meth:`call`, :meth:`undo` and :meth:`post` belong to the registry's loop.

    :param name: of the servers, for the threads.
    :param connect: opens a channel, in a thread, to another server each time. Raises Away.
    """

    def __init__(self, name: str, connect: Callable[[], C]) -> None:
        super().__init__()
        self._connect = connect
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"registry {name}")
        self._lock = threading.Lock()
        self._channel: C | None = None

    async def call(
        self,
        work: Callable[[C], T],
        *,
        again: bool,
        undo: Callable[[C], object] | None = None,
    ) -> T:
        """What ``work`` returns or raises, done in a thread, after whatever is being undone.

        :param again: it may be done twice, so that one of which nobody knows is tried again.
        :param undo: is done afterwards if nobody will know of it: the call was cancelled or failed.
        """
        return await self._patiently(
            partial(self._begin, work),
            again=again,
            undo=None if undo is None else partial(self._begin, undo),
        )

    def undo(self, work: Callable[[C], object]) -> None:
        """Have it done, before any call that follows; nobody hears of its failure."""
        self._undo_later(partial(self._begin, work))

    def post(self, work: Callable[[C], object]) -> None:
        """Have it done; nobody waits for it, nor hears of its failure."""
        if not self._closed:
            self._pool.submit(self._attempt, work)

    def abandon(self) -> None:
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.drop(None)

    def _begin(self, work: Callable[[C], T]) -> asyncio.Future[T]:
        try:
            return asyncio.wrap_future(self._pool.submit(self._attempt, work))
        except RuntimeError:
            raise RegistryError(CLOSED) from None

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
