"""What an open registry is on its loop, whatever is behind it: whose it is, and its leases."""

from __future__ import annotations

import asyncio
import os
import time
from abc import ABC, abstractmethod

from ..errors import RegistryError
from .base import Lease, LeaseLost, Limits


class OpenedRegistry(ABC):
    """Belongs to the loop that opens it and to this process.

    :ivar limits: see :class:`~domi_fast.registry.base.Limits`.
    """

    url: str
    limits: Limits

    def __init__(self, url: str, limits: Limits) -> None:
        self.url = url
        self.limits = limits
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._closed = False
        self._leases: dict[int, HeldLease] = {}
        # Leases are renewed while this is True. A test clears it to play a holder that hangs.
        self._keep_alive = True

    @abstractmethod
    async def _revoke(self, number: int) -> None:
        """End the lease in the registry, also when the call is cancelled."""

    @abstractmethod
    def _post_revoke(self, number: int) -> None:
        """Have the lease ended in the registry; nobody waits for it."""

    @abstractmethod
    def _wake(self) -> None:
        """Something may have changed: a lease has ended, or the registry was closed."""

    def _begin(self) -> asyncio.AbstractEventLoop:
        """This loop and this process open it. Raises RegistryError the second time."""
        if self._loop is not None or self._closed:
            raise RegistryError(f"the registry {self.url} was opened before; make a new one")
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        return self._loop

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

    def _own(self, lease: Lease) -> HeldLease:
        """The lease, if it is one of this registry and not over.

        Raises RegistryError for the lease of another, LeaseLost for one that is over.
        """
        if not isinstance(lease, HeldLease) or lease.registry is not self:
            raise RegistryError("the lease was granted by another registry than this one")
        lease.check()
        return lease

    def _forget_leases(self) -> None:
        """The owner ends all leases at once."""
        for lease in list(self._leases.values()):
            lease.end()


class HeldLease:
    """A lease; see :class:`~domi_fast.registry.base.Lease`.

    Another thread may call :meth:`renewed`; all else belongs to the loop.

    :ivar number: what the registry knows it by.
    """

    def __init__(
        self, registry: OpenedRegistry, number: int, ttl: float, valid_until: float
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
        await self.registry._revoke(self.number)
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
        self.registry._post_revoke(self.number)
        self.registry._wake()

    def _due(self) -> None:
        left = self._valid_until - time.monotonic()
        if left <= 0:
            self.lose()
        else:
            self._timer = self._loop.call_later(left, self._due)
