"""The registry protocol over a :class:`~domi_fast.registry.store.Store`, for one event loop.

What the backends of one machine have in common: leases, claims, watches and the wait for a lock.
A backend adds how a piece of work reaches the store (:meth:`LocalRegistry._read`,
:meth:`LocalRegistry._write`) and calls :meth:`LocalRegistry._wake` after every change.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeVar

from ..errors import RegistryError
from .base import (
    Claim,
    Cursor,
    Entry,
    Event,
    Lease,
    LeaseLost,
    Limits,
    Snapshot,
    Version,
    Watch,
    check_key,
    check_prefix,
)
from .store import Busy, Store

T = TypeVar("T")

BATCH: Final = 256


class LocalRegistry(ABC):
    """What both backends do alike. Belongs to the loop that opens it and to this process."""

    url: str
    limits: Limits

    def __init__(self, url: str, limits: Limits) -> None:
        self.url = url
        self.limits = limits
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._closed = False
        self._changed = asyncio.Event()
        self._leases: dict[int, LocalLease] = {}
        # Leases are renewed while this is True. A test clears it to play a holder that hangs.
        self._keep_alive = True

    # ------------------------------------------------------------------ what a backend adds

    @abstractmethod
    async def open(self) -> None:
        """See :class:`~domi_fast.registry.base.Registry`."""

    @abstractmethod
    async def close(self) -> None:
        """See :class:`~domi_fast.registry.base.Registry`."""

    @abstractmethod
    def _granted(self, lease: LocalLease) -> None:
        """A lease is there that has to be kept alive from now on."""

    @abstractmethod
    async def _read(self, work: Callable[[Store], T]) -> T:
        """Do work that changes nothing and may be dropped at a cancellation."""

    @abstractmethod
    async def _write(
        self,
        work: Callable[[Store], T],
        undo: Callable[[Store], object] | None = None,
        *,
        sure: bool = False,
    ) -> T:
        """Do work that changes something.

        :param undo: is done after the work, whether that happened or not, if the call is cancelled.
        :param sure: the work is done even if the call is cancelled.
        """

    @abstractmethod
    def _post(self, work: Callable[[Store], object]) -> None:
        """Have work done after what was written so far; nobody waits for it."""

    # ------------------------------------------------------------------ the protocol

    async def grant(self, ttl: float) -> Lease:
        self._check()
        self.limits.check_ttl(ttl)
        # Before the lease is asked for, so that it never seems longer than it is.
        asked = time.monotonic()
        number = secrets.randbits(63)
        span = int(ttl * 1e9)
        await self._write(lambda s: s.grant(number, span), undo=lambda s: s.revoke([number]))
        lease = LocalLease(self, number, ttl, asked + ttl)
        self._leases[number] = lease
        self._granted(lease)
        return lease

    async def get(self, key: str) -> Entry | None:
        self._check()
        check_key(key)
        return await self._read(lambda s: s.get(key))

    async def list(self, prefix: str) -> Snapshot:
        self._check()
        check_prefix(prefix)
        return await self._read(lambda s: s.list(prefix))

    async def put(
        self, key: str, value: bytes, *, expect: Version | None = None, lease: Lease | None = None
    ) -> Entry:
        self._check()
        check_key(key)
        self.limits.check_value(value)
        number = None if lease is None else self._own(lease).number
        return await self._write(lambda s: s.put(key, value, expect, number))

    async def create(self, key: str, value: bytes, *, lease: Lease | None = None) -> Entry:
        self._check()
        check_key(key)
        self.limits.check_value(value)
        number = None if lease is None else self._own(lease).number
        return await self._write(lambda s: s.create(key, value, number))

    async def delete(self, key: str, *, expect: Version | None = None) -> bool:
        self._check()
        check_key(key)
        return await self._write(lambda s: s.delete(key, expect))

    def watch(self, prefix: str, *, since: Cursor) -> Watch:
        self._check()
        check_prefix(prefix)
        return LocalWatch(self, prefix, since)

    async def claim(self, keys: Sequence[str], value: bytes, lease: Lease) -> Claim:
        self._check()
        offered = list(keys)
        for key in offered:
            check_key(key)
        self.limits.check_value(value)
        own, token = self._own(lease), secrets.randbits(63)
        number = own.number
        key, epoch = await self._write(
            lambda s: s.claim(offered, value, number, token), undo=lambda s: s.withdraw(token)
        )
        return LocalClaim(self, key, epoch, own, token)

    async def acquire(self, name: str, lease: Lease, value: bytes = b"") -> Claim:
        self._check()
        check_key(name)
        self.limits.check_value(value)
        own, token = self._own(lease), secrets.randbits(63)
        number = own.number
        withdraw = partial(Store.withdraw, claim=token)
        epoch = await self._write(lambda s: s.enqueue(name, value, number, token), undo=withdraw)
        try:
            while epoch is None:
                self._check()
                own.check()
                # Taken before the look, so that no change falls between the two.
                changed = self._changed
                epoch = await self._patient_read(lambda s: s.turn(token))
                if epoch is None:
                    await changed.wait()
        except BaseException:
            self._post(withdraw)
            raise
        return LocalClaim(self, name, epoch, own, token)

    # ------------------------------------------------------------------ for leases and watches

    async def _patient_read(self, work: Callable[[Store], T]) -> T:
        """Read; where a lock outlasts a single call's patience, go on trying."""
        while True:
            try:
                return await self._read(work)
            except Busy:  # noqa: PERF203 - the loop is there for it
                await asyncio.sleep(0.05)

    def _check(self) -> None:
        """Raise RegistryError unless this is the process and the loop of an open registry."""
        if self._closed:
            raise RegistryError(f"the registry {self.url} is closed; open a new one")
        if self._loop is None:
            raise RegistryError(f"the registry {self.url} is not open; await its open() first")
        if self._pid != os.getpid():
            raise RegistryError(
                f"the registry {self.url} was opened in process {self._pid} and this is its "
                f"fork {os.getpid()}; open a new registry after the fork"
            )
        if asyncio.get_running_loop() is not self._loop:
            raise RegistryError(
                f"the registry {self.url} belongs to another event loop; open one for this loop"
            )

    def _own(self, lease: Lease) -> LocalLease:
        """The lease, if it is one of this registry and not over.

        Raises RegistryError for the lease of another, LeaseLost for one that is over.
        """
        if not isinstance(lease, LocalLease) or lease.registry is not self:
            raise RegistryError("the lease was granted by another registry than this one")
        lease.check()
        return lease

    def _wake(self) -> None:
        """Something may have changed. Called on the loop."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _forget_leases(self) -> None:
        """The owner ends all leases at once."""
        for lease in list(self._leases.values()):
            lease.end()


class LocalLease:
    """A lease; see :class:`~domi_fast.registry.base.Lease`.

    Another thread may call :meth:`renewed`; all else belongs to the loop.
    """

    def __init__(
        self, registry: LocalRegistry, number: int, ttl: float, valid_until: float
    ) -> None:
        self.registry = registry
        self.number = number
        self.ttl = ttl
        self.lost = asyncio.Event()
        self._valid_until = valid_until
        self._ended: float | None = None
        loop = registry._loop
        assert loop is not None
        self._loop = loop
        self._timer = loop.call_later(max(0.0, valid_until - time.monotonic()), self._due)

    @property
    def valid_until(self) -> float:
        return self._valid_until if self._ended is None else self._ended

    @property
    def over(self) -> bool:
        return self._ended is not None

    async def revoke(self) -> None:
        if self._ended is not None:
            return
        self.registry._check()
        self.end()
        await self.registry._write(lambda s: s.revoke([self.number]), sure=True)
        self.registry._wake()

    def renewed(self, valid_until: float) -> None:
        self._valid_until = valid_until

    def check(self) -> None:
        """Raise LeaseLost once the lease is over, also when no timer has noticed yet."""
        if self._ended is None and time.monotonic() >= self._valid_until:
            self.lose()
        if self._ended is not None:
            raise LeaseLost(f"the lease of {self.ttl} s is over: it has expired or was revoked")

    def end(self) -> None:
        """Nothing may rely on the lease from now on."""
        if self._ended is None:
            self._ended = min(self._valid_until, time.monotonic())
            self._timer.cancel()
            self.registry._leases.pop(self.number, None)

    def lose(self) -> None:
        """The lease has ended, and its owner did not end it."""
        if self._ended is not None:
            return
        self.end()
        self.lost.set()
        # The registry may see its end a little later than we do: nobody should wait for that.
        self.registry._post(partial(Store.revoke, leases=[self.number]))
        self.registry._wake()

    def _due(self) -> None:
        left = self._valid_until - time.monotonic()
        if left <= 0:
            self.lose()
        else:
            self._timer = self._loop.call_later(left, self._due)


class LocalClaim:
    """A held key; see :class:`~domi_fast.registry.base.Claim`."""

    def __init__(
        self, registry: LocalRegistry, key: str, epoch: int, lease: LocalLease, token: int
    ) -> None:
        self.key = key
        self.epoch = epoch
        self.lease: Lease = lease
        self._lease = lease
        self._registry = registry
        self._token = token
        self._released = False

    async def update(self, value: bytes) -> None:
        registry = self._registry
        registry._check()
        registry.limits.check_value(value)
        if self._released:
            raise LeaseLost(f"the claim of {self.key!r} was released")
        self._lease.check()
        await registry._write(lambda s: s.update(self._token, value))

    async def release(self) -> None:
        if self._released or self._lease.over:
            return
        self._registry._check()
        self._released = True
        try:
            await self._registry._write(lambda s: s.withdraw(self._token), sure=True)
        except RegistryError:
            self._released = False
            raise


class LocalWatch:
    """A watch that reads the log from its own cursor on, when it is asked for an event."""

    def __init__(self, registry: LocalRegistry, prefix: str, since: Cursor) -> None:
        self._registry = registry
        self._prefix = prefix
        self._cursor = since
        self._events: deque[Event] = deque()
        self._closed = False
        self._waiting = False

    def __aiter__(self) -> LocalWatch:
        return self

    async def __anext__(self) -> Event:
        if self._waiting:
            raise RegistryError("two tasks wait in one watch; open a watch for each")
        self._waiting = True
        try:
            while not self._events:
                if self._closed or self._registry._closed:
                    raise StopAsyncIteration
                # Taken before the look, so that no change falls between the two.
                changed = self._registry._changed
                await self._look()
                if not self._events:
                    await changed.wait()
            return self._events.popleft()
        finally:
            self._waiting = False

    async def aclose(self) -> None:
        self._closed = True
        self._events.clear()
        self._registry._wake()

    async def _look(self) -> None:
        self._registry._check()
        try:
            batch = await self._registry._patient_read(
                lambda s: s.events(self._prefix, self._cursor, BATCH)
            )
        except RegistryError:
            if self._closed or self._registry._closed:
                return
            raise
        if not self._closed:
            self._events.extend(batch.events)
            self._cursor = batch.cursor
