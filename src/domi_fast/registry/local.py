"""The registry protocol over a :class:`~domi_fast.registry.store.Store`, for one event loop.

What the backends of one machine have in common: leases, claims, watches and the wait for a lock.
A backend adds how a piece of work reaches the store (:meth:`LocalRegistry._read`,
:meth:`LocalRegistry._write`) and calls :meth:`LocalRegistry._wake` after every change.
"""

from __future__ import annotations

import asyncio
import secrets
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeVar

from ..errors import RegistryError
from .base import (
    Claim,
    Cursor,
    Entry,
    Snapshot,
    Version,
    Watch,
)
from .database import Busy
from .held import HeldClaim, HeldLease
from .opened import OpenedRegistry
from .store import Store
from .watching import OpenedWatch

T = TypeVar("T")

BATCH: Final = 256


class LocalRegistry(OpenedRegistry):
    """What both backends do alike."""

    # ------------------------------------------------------------------ what a backend adds

    @abstractmethod
    async def _read(self, work: Callable[[Store], T]) -> T:
        """Do work that changes nothing and may be dropped at a cancellation."""

    @abstractmethod
    async def _write(
        self,
        work: Callable[[Store], T],
        undo: Callable[[Store], object] | None = None,
    ) -> T:
        """Do work that changes something.

        :param undo: is done after the work, whether that happened or not, if the call is cancelled.
        """

    @abstractmethod
    def _post(self, work: Callable[[Store], object]) -> None:
        """Have work done after what was written so far; nobody waits for it."""

    # ------------------------------------------------------------------ the protocol

    async def _grant(self, ttl: float) -> int:
        number = secrets.randbits(63)
        span = int(ttl * 1e9)
        await self._write(lambda s: s.grant(number, span), undo=lambda s: s.revoke([number]))
        return number

    async def _revoke(self, lease: HeldLease) -> None:
        await self._write(lambda s: s.revoke([lease.number]))

    def _post_revoke(self, lease: HeldLease) -> None:
        self._post(partial(Store.revoke, leases=[lease.number]))

    async def _get(self, key: str) -> Entry | None:
        return await self._read(lambda s: s.get(key))

    async def _list(self, prefix: str) -> Snapshot:
        return await self._read(lambda s: s.list(prefix))

    async def _put(
        self, key: str, value: bytes, expect: Version | None, lease: HeldLease | None
    ) -> Entry:
        number = None if lease is None else lease.number
        return await self._write(lambda s: s.put(key, value, expect, number))

    async def _create(self, key: str, value: bytes, lease: HeldLease | None) -> Entry:
        number = None if lease is None else lease.number
        return await self._write(lambda s: s.create(key, value, number))

    async def _delete(self, key: str, expect: Version | None) -> bool:
        return await self._write(lambda s: s.delete(key, expect))

    def _watch(self, prefix: str, since: Cursor) -> Watch:
        return LocalWatch(self, prefix, since)

    async def _claim(self, keys: Sequence[str], value: bytes, lease: HeldLease) -> Claim:
        token = secrets.randbits(63)
        key, epoch = await self._write(
            lambda s: s.claim(keys, value, lease.number, token), undo=lambda s: s.withdraw(token)
        )
        return LocalClaim(self, key, epoch, lease, token)

    async def _acquire(self, name: str, lease: HeldLease, value: bytes) -> Claim:
        token = secrets.randbits(63)
        withdraw = partial(Store.withdraw, claim=token)
        epoch = await self._write(
            lambda s: s.enqueue(name, value, lease.number, token), undo=withdraw
        )
        try:
            while epoch is None:
                self._check()
                lease.check()
                # Taken before the look, so that no change falls between the two.
                changed = self._changed
                epoch = await self._patient_read(lambda s: s.turn(token))
                if epoch is None:
                    await changed.wait()
        except BaseException:
            self._post(withdraw)
            raise
        return LocalClaim(self, name, epoch, lease, token)

    async def _patient_read(self, work: Callable[[Store], T]) -> T:
        """Read; where a lock outlasts a single call's patience, go on trying."""
        while True:
            try:
                return await self._read(work)
            except Busy:  # noqa: PERF203 - the loop is there for it
                await asyncio.sleep(0.05)


class LocalClaim(HeldClaim):
    """A held key; see :class:`~domi_fast.registry.base.Claim`."""

    def __init__(
        self, registry: LocalRegistry, key: str, epoch: int, lease: HeldLease, token: int
    ) -> None:
        super().__init__(registry, key, epoch, lease)
        self._registry = registry
        self._token = token

    async def _update(self, value: bytes) -> None:
        await self._registry._write(lambda s: s.update(self._token, value))

    async def _release(self) -> None:
        await self._registry._write(lambda s: s.withdraw(self._token))


class LocalWatch(OpenedWatch):
    """A watch that reads the log from its own cursor on, when it is asked for an event."""

    def __init__(self, registry: LocalRegistry, prefix: str, since: Cursor) -> None:
        super().__init__(registry)
        self._registry = registry
        self._prefix = prefix
        self._cursor = since

    def end(self) -> None:
        super().end()
        self._registry._wake()

    async def _more(self) -> None:
        # Taken before the look, so that no change falls between the two.
        changed = self._registry._changed
        try:
            batch = await self._registry._patient_read(
                lambda s: s.events(self._prefix, self._cursor, BATCH)
            )
        except RegistryError:
            if self.over:
                return
            raise
        if self.over:
            return
        self.events.extend(batch.events)
        self._cursor = batch.cursor
        if not self.events:
            await changed.wait()
