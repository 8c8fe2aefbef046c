"""The registry inside one process, for tests and for programs of a single process.

Registries of one name share one store, also between threads that each run an event loop. It lives
as long as one of them is open. A call never waits for anything but the store's lock, which is held
for some ten microseconds, so it is done on the calling loop.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

from ..errors import RegistryError
from .base import Limits
from .database import Database
from .held import HeldLease
from .local import LocalRegistry
from .store import Peek, Store

T = TypeVar("T")

LIMITS: Final = Limits(min_ttl=0.1, expiry_bound=0.1, max_value=512 << 10)

# Leases are renewed three times in their length, so that one late renewal does no harm.
_RENEWALS: Final = 3


class _Space:
    """What the registries of one name share. The lock guards all of it."""

    def __init__(self, name: str, first_revision: int) -> None:
        self.lock = threading.Lock()
        self.members: set[MemoryRegistry] = set()
        # Used by several threads, one at a time.
        db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self.store = Store(Database(db, f"memory://{name}"))
        self.store.prepare("", first_revision)
        self.seen = self.store.peek()


_spaces: dict[str, _Space] = {}
_spaces_lock = threading.Lock()
# Epochs grow also when the last registry of a name is closed and the name is used again.
_highest_revision = 0


def _news(before: Peek, after: Peek) -> bool:
    """Whether others must look: something changed, or a lease may end before they expect it."""
    if after.revision != before.revision:
        return True
    return after.expiry is not None and (before.expiry is None or after.expiry < before.expiry)


def _join(name: str, member: MemoryRegistry) -> _Space:
    with _spaces_lock:
        space = _spaces.get(name)
        if space is None:
            space = _spaces[name] = _Space(name, _highest_revision)
        with space.lock:
            space.members.add(member)
        return space


def _leave(name: str, space: _Space, member: MemoryRegistry) -> None:
    global _highest_revision
    with _spaces_lock, space.lock:
        if member not in space.members:
            return
        space.members.remove(member)
        if not space.members:
            _highest_revision = max(_highest_revision, space.store.peek().revision)
            space.store.close()
            del _spaces[name]


def _after_fork_in_child() -> None:
    # A thread that does not exist here may have held the lock.
    global _spaces_lock
    _spaces_lock = threading.Lock()
    _spaces.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


class MemoryRegistry(LocalRegistry):
    """The registry ``memory://name``; see :class:`~domi_fast.registry.base.Registry`."""

    def __init__(self, name: str) -> None:
        super().__init__(f"memory://{name}", LIMITS)
        self._name = name
        self._space: _Space | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        self._begin()
        self._space = _join(self._name, self)
        self._tick()

    async def close(self) -> None:
        if self._closed:
            return
        if self._loop is not None:
            self._check()
            leases = list(self._leases)
            self._forget_leases()
            if leases:
                self._do(lambda s: s.revoke(leases))
        self._halt()

    def _halt(self) -> None:
        """Be gone as a killed process is: without a word to the others."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for lease in list(self._leases.values()):
            lease._timer.cancel()
        if self._space is not None:
            _leave(self._name, self._space, self)
        self._wake()

    async def _read(self, work: Callable[[Store], T]) -> T:
        return self._do(work)

    async def _write(
        self,
        work: Callable[[Store], T],
        undo: Callable[[Store], object] | None = None,
    ) -> T:
        # Never waits, so there is nothing that a cancellation could interrupt.
        return self._do(work)

    def _post(self, work: Callable[[Store], object]) -> None:
        if not self._closed:
            self._do(work)

    def _do(self, work: Callable[[Store], T]) -> T:
        space = self._space
        if space is None or self._closed:
            raise RegistryError(f"the registry {self.url} is closed; open a new one")
        with space.lock:
            try:
                return work(space.store)
            finally:
                before, space.seen = space.seen, space.store.peek()
                if _news(before, space.seen):
                    for member in tuple(space.members):
                        member._notify(space)

    def _notify(self, space: _Space) -> None:
        """Called by any thread that has changed the store and holds its lock."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._on_change)
        except RuntimeError:
            # The loop was closed and nobody closed the registry: its leases run out.
            space.members.discard(self)

    def _on_change(self) -> None:
        if not self._closed:
            self._wake()
            self._arm()

    def _granted(self, lease: HeldLease) -> None:
        self._arm()

    def _tick(self) -> None:
        """Renew what is due and end what is over."""
        now = time.monotonic()
        if self._keep_alive:
            due = {
                lease.number: int(lease.ttl * 1e9)
                for lease in self._leases.values()
                if self._renewal(lease) <= now
            }
            if due:
                lost = self._do(lambda s: s.renew(due))
                for number in due:
                    lease = self._leases[number]
                    if number in lost:
                        lease.lose()
                    else:
                        lease.renewed(now + lease.ttl)
        assert self._space is not None
        expiry = self._space.seen.expiry
        if expiry is not None and expiry <= time.monotonic_ns():
            self._do(Store.sweep)
        self._arm()

    def _renewal(self, lease: HeldLease) -> float:
        return lease.valid_until - lease.ttl + lease.ttl / _RENEWALS

    def _arm(self) -> None:
        """Set the timer to the next renewal or the next end of somebody's lease."""
        assert self._loop is not None
        assert self._space is not None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        times = [self._renewal(lease) for lease in self._leases.values()] * self._keep_alive
        expiry = self._space.seen.expiry
        if expiry is not None:
            times.append(expiry / 1e9)
        if times:
            # A timer may fire a little early; without the millisecond it would then fire in a row.
            delay = max(0.0, min(times) - time.monotonic()) + 0.001
            self._timer = self._loop.call_later(delay, self._tick)
