"""The registry protocol over a :class:`~domi_fast.registry.store.Store`, for one event loop.

What the backends of one machine have in common: leases, claims, watches and the wait for a lock.
A backend adds how a piece of work reaches the store (:meth:`LocalRegistry._read`,
:meth:`LocalRegistry._write`) and calls :meth:`LocalRegistry._wake` after every change.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from abc import abstractmethod
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
from .opened import HeldLease, OpenedRegistry
from .store import Busy, Store

T = TypeVar("T")

BATCH: Final = 256


class LocalRegistry(OpenedRegistry):
    """What both backends do alike."""

    def __init__(self, url: str, limits: Limits) -> None:
        super().__init__(url, limits)
        self._changed = asyncio.Event()

    # ------------------------------------------------------------------ what a backend adds

    @abstractmethod
    async def open(self) -> None:
        """See :class:`~domi_fast.registry.base.Registry`."""

    @abstractmethod
    async def close(self) -> None:
        """See :class:`~domi_fast.registry.base.Registry`."""

    @abstractmethod
    def _granted(self, lease: HeldLease) -> None:
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
        lease = HeldLease(self, number, ttl, asked + ttl)
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

    async def _revoke(self, number: int) -> None:
        await self._write(lambda s: s.revoke([number]), sure=True)

    def _post_revoke(self, number: int) -> None:
        self._post(partial(Store.revoke, leases=[number]))

    def _wake(self) -> None:
        """Something may have changed. Called on the loop."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class LocalClaim:
    """A held key; see :class:`~domi_fast.registry.base.Claim`."""

    def __init__(
        self, registry: LocalRegistry, key: str, epoch: int, lease: HeldLease, token: int
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
