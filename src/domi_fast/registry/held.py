"""What is held in an open registry: leases, and claims under them."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import Any, Protocol

from ..errors import RegistryError
from .base import Lease, LeaseLost, Limits


class Holder(Protocol):
    """What a lease and a claim need of their registry."""

    limits: Limits
    _loop: asyncio.AbstractEventLoop | None
    _leases: dict[int, HeldLease]

    def _check(self) -> None:
        """Raise RegistryError unless this is the loop of an open registry."""

    async def _surely(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for it; if that is cancelled, it is done all the same."""

    async def _revoke(self, lease: HeldLease) -> None:
        """End the lease in the registry."""

    def _post_revoke(self, lease: HeldLease) -> None:
        """Have the lease ended in the registry; nobody waits for it."""

    def _wake(self) -> None:
        """Something may have changed."""


class HeldLease:
    """A lease; see :class:`~domi_fast.registry.base.Lease`.

    Another thread may call :meth:`renewed`; all else belongs to the loop.

    :ivar number: what the registry knows it by.
    """

    def __init__(self, registry: Holder, number: int, ttl: float, valid_until: float) -> None:
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
        await self.registry._surely(self.registry._revoke(self))
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
        self.registry._post_revoke(self)
        self.registry._wake()

    def _due(self) -> None:
        left = self._valid_until - time.monotonic()
        if left <= 0:
            self.lose()
        else:
            self._timer = self._loop.call_later(left, self._due)


class HeldClaim(ABC):
    """A claim; see :class:`~domi_fast.registry.base.Claim`. A backend adds what it asks for."""

    def __init__(self, registry: Holder, key: str, epoch: int, lease: HeldLease) -> None:
        self.key = key
        self.epoch = epoch
        self.lease: Lease = lease
        self._lease = lease
        self._holder = registry
        self._released = False

    @abstractmethod
    async def _update(self, value: bytes) -> None:
        """Put another value under the key, if this claim holds it; else raise LeaseLost."""

    @abstractmethod
    async def _release(self) -> None:
        """Delete the key, if this claim holds it."""

    async def update(self, value: bytes) -> None:
        self._holder._check()
        self._holder.limits.check_value(value)
        if self._released:
            raise LeaseLost(f"the claim of {self.key!r} was released")
        self._lease.check()
        await self._update(value)

    async def release(self) -> None:
        if self._released or self._lease.over:
            return
        self._holder._check()
        self._released = True
        try:
            await self._holder._surely(self._release())
        except RegistryError:
            self._released = False
            raise

    def _is_over(self) -> LeaseLost:
        return LeaseLost(f"the claim of {self.key!r} is over: another has taken or deleted it")
