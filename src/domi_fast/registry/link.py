"""The way to a registry's servers: what is tried again and what is undone, however it is called.

:class:`Link` makes blocking calls in threads, over one channel at a time. A channel is used until a
call over it fails as if its server were away; the next call opens another. The calls that are under
way over the old one have their own time still: a server that is too slow for one may be in time for
the others. With the last of them it is closed, which ends every watch on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
        # Held for moments only, for the loop takes it too.
        self._lock = threading.Lock()
        # The channel of the moment, or that it is being opened; what cannot be opened is not here.
        self._channel: Future[C] | None = None
        self._calls: Counter[C] = Counter()
        self._dropped: set[C] = set()  # those that some calls are under way over
        self._abandoned = False

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
        with self._lock:
            self._abandoned = True
            current, self._channel = self._channel, None
            ended, self._dropped = self._dropped, set()
        if current is not None and current.done():
            ended.add(current.result())
        for channel in ended:
            channel.close()

    def _begin(self, work: Callable[[C], T]) -> asyncio.Future[T]:
        try:
            return asyncio.wrap_future(self._pool.submit(self._attempt, work))
        except RuntimeError:
            raise RegistryError(CLOSED) from None

    # ------------------------------------------------------------------ from any other thread

    def channel(self) -> C:
        """The channel of the moment, once it is open; nobody opens a second one meanwhile.

        Raises Away, and RegistryError after the end.
        """
        with self._lock:
            if self._abandoned:
                raise RegistryError(CLOSED)
            opened = self._channel
            is_ours = opened is None
            if opened is None:
                opened = self._channel = Future()
        if is_ours:
            self._open(opened)
        return opened.result()

    def _open(self, opened: Future[C]) -> None:
        try:
            channel = self._connect()
        except BaseException as error:
            with self._lock:
                if self._channel is opened:
                    self._channel = None
            # What has no channel was not sent, whatever became of the login.
            opened.set_exception(Away(str(error), sent=False) if isinstance(error, Away) else error)
            return
        with self._lock:
            is_wanted = self._channel is opened
            if is_wanted:
                opened.set_result(channel)
        if not is_wanted:
            channel.close()
            opened.set_exception(RegistryError(CLOSED))

    def drop(self, channel: C) -> None:
        """This channel's server is away: use another from now on."""
        with self._lock:
            current = self._channel
            if current is None or not current.done() or current.result() is not channel:
                return
            self._channel = None
            if self._calls[channel]:
                self._dropped.add(channel)
                return
        channel.close()

    def _attempt(self, work: Callable[[C], T]) -> T:
        channel = self.channel()
        with self._lock:
            self._calls[channel] += 1
        try:
            return work(channel)
        except Away:
            self.drop(channel)
            raise
        finally:
            self._ended(channel)

    def _ended(self, channel: C) -> None:
        with self._lock:
            self._calls[channel] -= 1
            if self._calls[channel]:
                return
            del self._calls[channel]
            if channel not in self._dropped:
                return
            self._dropped.remove(channel)
        channel.close()
