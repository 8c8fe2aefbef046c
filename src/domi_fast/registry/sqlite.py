"""The registry in a SQLite file: for all processes of one machine, with nothing to start.

Each registry has one thread, and the connection is that thread's alone; the event loop hands it
work and is handed the results, so SQLite never holds the loop up. Between pieces of work the thread
renews its leases, and sweeps those of the dead. A process that is killed leaves locks to the
kernel, a torn transaction to SQLite's write-ahead log, and its leases to whoever touches the file
next.

Whether another process has changed the file the loop asks every 20 ms, by the time and size of the
write-ahead log, which takes microseconds; only then is the thread woken, which would hold up the
loop each time that both want to run Python. The log is written before the change can be seen, so
the thread looks until it sees one, for half a second at most; and as often without a sign.

A write that finds the file locked is tried again for ``patience`` seconds without blocking the
thread: meanwhile reads go on. Only a process that was stopped in the middle of a write can use up
that time; the end of a lease is then noticed by the loop's own clock.
"""

from __future__ import annotations

import asyncio
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar
from urllib.parse import quote

from ..errors import RegistryError
from .base import Limits
from .database import Busy, Full
from .held import HeldLease
from .local import LocalRegistry
from .sqlite_file import StoreFile
from .store import Peek, Store

T = TypeVar("T")

LIMITS: Final = Limits(min_ttl=0.2, expiry_bound=0.1, max_value=512 << 10)

POLL: Final = 0.020
# Seconds after which the thread looks without a sign of a change; times that it looks after one,
# and times once it has seen it: what is written within a tick of the kernel has the same time.
LOOK: Final = 0.5
LOOKS: Final = 25
LOOKS_AFTERWARDS: Final = 2
PATIENCE: Final = 5.0

# How long to wait before a locked file is tried again: a transaction takes about 0.1 ms.
_RETRY: Final = 0.002
# Leases are renewed three times in their length, so that one late renewal does no harm.
_RENEWALS: Final = 3
_ALWAYS: Final = float("inf")


class SqliteRegistry(LocalRegistry):
    """The registry ``sqlite:///path``; see :class:`~domi_fast.registry.base.Registry`.

    :param path: the absolute path of the file. It is made, for this user alone, when missing; its
        directory must exist and not be on a network file system.
    :param patience: seconds after which a write gives up on a file that stays locked.
    """

    def __init__(self, path: str, *, patience: float = PATIENCE) -> None:
        super().__init__(f"sqlite://{quote(path)}", LIMITS)
        self._path = path
        self._log = f"{path}-wal"
        self._patience = patience
        self._worker: _Worker | None = None
        self._glancing: asyncio.TimerHandle | None = None
        self._seen: object = None
        self._sights = 0
        self._looks = 0

    async def open(self) -> None:
        loop = self._begin()
        worker = self._worker = _Worker(self, self._path, loop, self._patience)
        worker.start()
        try:
            await worker.opened
        except BaseException:
            self._closed = True
            worker.stop(finish=False)
            raise
        if not self._closed:
            self._glance()

    async def close(self) -> None:
        worker = self._worker
        if worker is None:
            self._closed = True
            return
        if not self._closed:
            self._check()
            leases = list(self._leases)
            if leases:
                self._post(partial(Store.revoke, leases=leases))
            self._closed = True
            self._stop_glancing()
            self._forget_leases()
            self._wake()
            worker.stop(finish=True)
        # Shielded: the file is let go of even if nobody waits for it any more.
        await asyncio.shield(worker.ended)
        worker.join()

    async def _halt(self) -> None:
        """Be gone as a killed process is: without a word to the others."""
        assert self._worker is not None
        self._closed = True
        self._stop_glancing()
        for lease in list(self._leases.values()):
            lease._timer.cancel()
        self._worker.stop(finish=False)
        await asyncio.shield(self._worker.ended)
        self._worker.join()
        self._wake()

    def _granted(self, lease: HeldLease) -> None:
        assert self._worker is not None
        self._worker.wake()

    def _glance(self) -> None:
        """Have the thread look where the files are not as they were."""
        assert self._loop is not None
        assert self._worker is not None
        seen = (_stamp(self._path), _stamp(self._log))
        sights = self._worker.sights
        if sights != self._sights:
            self._looks = min(self._looks, LOOKS_AFTERWARDS)
        if seen != self._seen:
            self._looks = LOOKS if sights == self._sights else LOOKS_AFTERWARDS
        self._seen, self._sights = seen, sights
        if self._looks:
            self._looks -= 1
            self._worker.look()
        self._glancing = self._loop.call_later(POLL, self._glance)

    def _stop_glancing(self) -> None:
        if self._glancing is not None:
            self._glancing.cancel()

    async def _read(self, work: Callable[[Store], T]) -> T:
        job, outcome = self._submit(work, writes=False)
        try:
            return await outcome
        except asyncio.CancelledError:
            job.withdrawn = True
            raise

    async def _write(
        self,
        work: Callable[[Store], T],
        undo: Callable[[Store], object] | None = None,
    ) -> T:
        job, outcome = self._submit(work, writes=True)
        try:
            return await outcome
        except asyncio.CancelledError:
            job.withdrawn = True
            if undo is not None:
                self._post(undo)
            raise

    def _post(self, work: Callable[[Store], object]) -> None:
        if not self._closed and self._worker is not None:
            self._worker.put(_Job(work, None, _ALWAYS), writes=True)

    def _submit(
        self, work: Callable[[Store], T], *, writes: bool
    ) -> tuple[_Job, asyncio.Future[T]]:
        self._check()
        assert self._worker is not None
        assert self._loop is not None
        outcome: asyncio.Future[T] = self._loop.create_future()
        job = _Job(work, outcome, time.monotonic() + self._patience)
        self._worker.put(job, writes=writes)
        return job, outcome


class _Away(Busy):
    """The file was removed and cannot be made again at the moment."""


@dataclass(eq=False)
class _Job:
    """Work for the thread.

    :ivar future: of the loop, for the outcome; None if nobody waits for it.
    :ivar deadline: when to give up on a locked file, on ``time.monotonic()``.
    :ivar withdrawn: set by the loop if the work need not be done any more.
    """

    work: Callable[[Store], Any]
    future: asyncio.Future[Any] | None
    deadline: float
    withdrawn: bool = False

    def finish(self, result: Any, error: Exception | None) -> None:
        """Called on the loop."""
        if self.future is not None and not self.future.done():
            if error is None:
                self.future.set_result(result)
            else:
                self.future.set_exception(error)


class _Worker(threading.Thread):
    """The thread that owns the connection.

    The loop calls only :meth:`put`, :meth:`look`, :meth:`wake` and :meth:`stop`.

    :ivar sights: how often it has seen what has changed, its own changes included.
    """

    def __init__(
        self,
        registry: SqliteRegistry,
        path: str,
        loop: asyncio.AbstractEventLoop,
        patience: float,
    ) -> None:
        # A program that ends without closing its registry is not kept from ending.
        super().__init__(name=f"registry {path}", daemon=True)
        self.opened: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self._registry = registry
        self._path = path
        self._loop = loop
        self._patience = patience
        self._reads: deque[_Job] = deque()
        self._writes: deque[_Job] = deque()
        self._stopping = False
        self._finishing = False
        # Waiting in poll(2) and not on a lock: before Python 3.11 a lock's timeout is on the wall
        # clock, and whoever sets the date would decide when leases are renewed.
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._bell, select.POLLIN)
        # Guards the bell's descriptor and the end of the queues.
        self._lock = threading.Lock()
        self._gone = False
        self._file: StoreFile | None = None
        self._problem = ""
        self.sights = 0
        self._is_to_look = False
        self._next_look = 0.0
        self._peek = Peek(0, None)
        self._version = -1

    def put(self, job: _Job, *, writes: bool) -> None:
        with self._lock:
            if not self._gone:
                (self._writes if writes else self._reads).append(job)
                self._ring()
                return
        job.finish(None, self._closed_error())

    def look(self) -> None:
        """Have it see what has changed."""
        self._is_to_look = True
        self.wake()

    def wake(self) -> None:
        """Have it see when it is to do what next."""
        with self._lock:
            if not self._gone:
                self._ring()

    def stop(self, *, finish: bool) -> None:
        """:param finish: whether to do the writes that are queued."""
        with self._lock:
            self._finishing = finish
            self._stopping = True
            if not self._gone:
                self._ring()

    def _ring(self) -> None:
        os.eventfd_write(self._bell, 1)

    # ------------------------------------------------------------------ on the thread

    def run(self) -> None:
        try:
            if self._open_first():
                while not self._stopping and not self._loop.is_closed():
                    self._turn()
                self._finish()
        finally:
            if self._file is not None:
                self._file.close()
            with self._lock:
                self._gone = True
                os.close(self._bell)
            for jobs in (self._reads, self._writes):
                while jobs:
                    self._tell(jobs.popleft().finish, None, self._closed_error())
            self._tell(_settle, self.ended, None)

    def _open_first(self) -> bool:
        deadline = time.monotonic() + self._patience
        error: RegistryError | None = None
        while not self._stopping:
            try:
                self._use_file()
                break
            except Busy as exc:
                if time.monotonic() >= deadline:
                    error = self._locked(exc)
                    break
                time.sleep(_RETRY)
            except RegistryError as exc:
                error = exc
                break
        self._tell(_settle, self.opened, error)
        return error is None

    def _turn(self) -> None:
        self._wait()
        if self._is_to_look:
            self._is_to_look = False
            self._next_look = 0.0
        self._see_to_file()
        while self._reads and self._do(self._reads):
            pass
        wrote = bool(self._writes)
        while self._writes and self._do(self._writes):
            pass
        # What goes wrong in these two is tried again at the next turn. A lease whose renewals fail
        # is noticed by the loop, and a file that cannot be read by the next call.
        with suppress(RegistryError):
            self._renew()
        with suppress(RegistryError):
            self._look(force=wrote)
        if self._file is not None and not self._writes:
            self._file.database.tidy()

    def _wait(self) -> None:
        """Sleep until there is work or it is time to look, or to renew a lease."""
        now = time.monotonic()
        # A renewal that has failed is not tried again at once.
        renewal = max(now + POLL, min(map(_renewal, self._kept_alive()), default=_ALWAYS))
        delay = min(self._next_look, renewal) - now
        if self._reads or self._writes:
            delay = min(delay, _RETRY)
        self._poll.poll(max(0.0, delay) * 1000)
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)

    def _do(self, jobs: deque[_Job]) -> bool:
        """Do the first of the jobs; False if it has to wait because the file is locked."""
        job = jobs[0]
        result: Any = None
        error: Exception | None = None
        if not job.withdrawn:
            try:
                if self._file is None:
                    raise _Away(self._problem)
                result = job.work(self._file.store)
            except Busy as exc:
                if time.monotonic() < job.deadline:
                    return False
                error = exc if isinstance(exc, (_Away, Full)) else self._locked(exc)
            except RegistryError as exc:
                error = exc
            except Exception as exc:
                # A fault of ours: whoever waits must hear of it, or else the thread ends with it.
                if job.future is None:
                    raise
                error = exc
        jobs.popleft()
        if job.future is not None:
            self._tell(job.finish, result, error)
        return True

    def _renew(self) -> None:
        """Renew the leases that are due, all in one transaction."""
        # Before the renewal is sent, so that no lease seems longer than it is.
        now = time.monotonic()
        due = {lease.number: lease for lease in self._kept_alive() if now >= _renewal(lease)}
        if not due or self._file is None:
            return
        lost = self._file.store.renew({n: int(lease.ttl * 1e9) for n, lease in due.items()})
        for number, lease in due.items():
            if number in lost:
                self._tell(lease.lose)
            else:
                lease.renewed(now + lease.ttl)

    def _kept_alive(self) -> list[HeldLease]:
        leases = self._registry._leases.values() if self._registry._keep_alive else ()
        return [lease for lease in list(leases) if not lease.over]

    def _look(self, *, force: bool) -> None:
        """See what has changed, and end leases that are over. ``force`` after work of our own."""
        now = time.monotonic()
        if self._file is None or (now < self._next_look and not force):
            return
        self._next_look = now + POLL  # if this fails
        version = self._file.store.data_version()
        if force or version != self._version or self._sweep_due():
            self._see(self._file.store, version)
        expiry = _ALWAYS if self._peek.expiry is None else self._peek.expiry * 1e-9
        self._next_look = min(now + LOOK, max(now + POLL, expiry))

    def _see(self, store: Store, version: int) -> None:
        before, self._peek = self._peek, store.peek()
        # Kept only now: what was not looked at is to be looked at again.
        self._version = version
        self.sights += 1
        if self._peek.revision != before.revision:
            self._tell(self._registry._wake)
        if self._sweep_due():
            store.sweep()
            self._peek = store.peek()
            self._tell(self._registry._wake)

    def _sweep_due(self) -> bool:
        return self._peek.expiry is not None and self._peek.expiry <= time.monotonic_ns()

    def _use_file(self) -> None:
        self._file = StoreFile(self._path)
        self._problem = ""
        self._version = -1
        self._peek = Peek(-1, None)

    def _see_to_file(self) -> None:
        """Where the file was removed or replaced, go on with the one that is there now."""
        if self._file is not None:
            if self._file.is_there():
                return
            self._file.close()
            self._file = None
            # What was bound to them is in a file that nobody finds any more.
            for lease in list(self._registry._leases.values()):
                self._tell(lease.lose)
        elif time.monotonic() < self._next_look:
            return
        try:
            self._use_file()
        except RegistryError as exc:
            self._problem = f"{self._path} was removed or replaced: {exc}"
            self._next_look = time.monotonic() + POLL

    def _finish(self) -> None:
        """Do what is still queued: the end of our leases is the last of it."""
        if self._loop.is_closed():
            # Nobody closed the registry, and nobody is left to use what it holds.
            leases = list(self._registry._leases)
            self._writes.clear()
            self._writes.append(_Job(partial(Store.revoke, leases=leases), None, _ALWAYS))
        elif not self._finishing:
            return
        deadline = time.monotonic() + min(1.0, self._patience)
        while self._writes and time.monotonic() < deadline:
            if not self._do(self._writes):
                time.sleep(_RETRY)

    def _closed_error(self) -> RegistryError:
        return RegistryError(f"the registry {self._registry.url} is closed; open a new one")

    def _locked(self, exc: Busy) -> Busy:
        return Busy(
            f"{exc}, for {self._patience} s now; a process of the cluster may have been stopped "
            "in the middle of a write: continue it or kill it",
            limit=self._patience,
        )

    def _tell(self, call: Callable[..., object], *values: object) -> None:
        # A loop that was closed before its registry has nobody left to tell.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *values)


def _renewal(lease: HeldLease) -> float:
    """When a lease is to be renewed, on ``time.monotonic()``."""
    return lease.valid_until - lease.ttl + lease.ttl / _RENEWALS


def _stamp(path: str) -> tuple[int, ...] | None:
    """What changes when something is written into the file, or there is another in its place."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _settle(future: asyncio.Future[None], error: RegistryError | None) -> None:
    if not future.done():
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
