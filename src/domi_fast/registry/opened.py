"""What an open registry is on its loop, whatever is behind it: whose, and what it is asked."""

from __future__ import annotations

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Sequence
from typing import Any

from ..errors import RegistryError
from .base import (
    Claim,
    CompareFailed,
    Cursor,
    Entry,
    Lease,
    Limits,
    NoKeyFree,
    Service,
    Snapshot,
    Version,
    Watch,
    check_key,
    check_prefix,
)
from .held import HeldLease


class OpenedRegistry(ABC):
    """Belongs to the loop that opens it and to this process.

    The methods of the protocol stand here, and check what they are given; a backend adds those
    that ask its store or its servers, under the same names with an underscore.

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
        self._tasks: set[asyncio.Task[Any]] = set()
        # Set, and replaced by another, whenever something may have changed.
        self._changed = asyncio.Event()
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
    async def _grant(self, ttl: float) -> int:
        """Start a lease; what the registry knows it by."""

    @abstractmethod
    def _granted(self, lease: HeldLease) -> None:
        """A lease is there that has to be kept alive from now on."""

    @abstractmethod
    async def _revoke(self, lease: HeldLease) -> None:
        """End the lease in the registry."""

    @abstractmethod
    def _post_revoke(self, lease: HeldLease) -> None:
        """Have the lease ended in the registry; nobody waits for it."""

    @abstractmethod
    async def _get(self, key: str) -> Entry | None: ...

    @abstractmethod
    async def _list(self, prefix: str) -> Snapshot: ...

    @abstractmethod
    async def _put(
        self, key: str, value: bytes, expect: Version | None, lease: HeldLease | None
    ) -> Entry: ...

    @abstractmethod
    async def _create(self, key: str, value: bytes, lease: HeldLease | None) -> Entry: ...

    @abstractmethod
    async def _delete(self, key: str, expect: Version | None) -> bool: ...

    @abstractmethod
    def _watch(self, prefix: str, since: Cursor) -> Watch: ...

    @abstractmethod
    async def _claim(self, keys: Sequence[str], value: bytes, lease: HeldLease) -> Claim:
        """At least one key is given."""

    @abstractmethod
    async def _acquire(self, name: str, lease: HeldLease, value: bytes) -> Claim: ...

    # ------------------------------------------------------------------ the protocol

    async def grant(self, ttl: float) -> Lease:
        self._check()
        self.limits.check_ttl(ttl)
        # Before the lease is asked for, so that it never seems longer than it is.
        asked = time.monotonic()
        number = await self._grant(ttl)
        lease = HeldLease(self, number, ttl, asked + ttl)
        self._leases[number] = lease
        self._granted(lease)
        return lease

    async def get(self, key: str) -> Entry | None:
        self._check()
        check_key(key)
        return await self._get(key)

    async def list(self, prefix: str) -> Snapshot:
        self._check()
        check_prefix(prefix)
        return await self._list(prefix)

    async def put(
        self, key: str, value: bytes, *, expect: Version | None = None, lease: Lease | None = None
    ) -> Entry:
        self._check()
        check_key(key)
        self.limits.check_value(value)
        return await self._put(key, value, expect, None if lease is None else self._own(lease))

    async def create(self, key: str, value: bytes, *, lease: Lease | None = None) -> Entry:
        self._check()
        check_key(key)
        self.limits.check_value(value)
        return await self._create(key, value, None if lease is None else self._own(lease))

    async def delete(self, key: str, *, expect: Version | None = None) -> bool:
        self._check()
        check_key(key)
        return await self._delete(key, expect)

    def watch(self, prefix: str, *, since: Cursor) -> Watch:
        self._check()
        check_prefix(prefix)
        return self._watch(prefix, since)

    async def claim(self, keys: Sequence[str], value: bytes, lease: Lease) -> Claim:
        self._check()
        offered = [*keys]
        for key in offered:
            check_key(key)
        self.limits.check_value(value)
        own = self._own(lease)
        if not offered:
            raise NoKeyFree("no key was offered")
        return await self._claim(offered, value, own)

    async def acquire(self, name: str, lease: Lease, value: bytes = b"") -> Claim:
        self._check()
        check_key(name)
        self.limits.check_value(value)
        return await self._acquire(name, self._own(lease), value)

    # ------------------------------------------------------------------ for a backend

    def _begin(self) -> asyncio.AbstractEventLoop:
        """This loop and this process open it. Raises RegistryError the second time."""
        if self._loop is not None or self._closed:
            raise RegistryError(f"the registry {self.url} was opened before; make a new one")
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        return self._loop

    def announce(self, service: Service, lease: Lease) -> None:
        self._check()
        self._announce(service, self._own(lease))

    def _announce(self, service: Service, lease: HeldLease) -> None:  # noqa: B027 - for a catalog
        """Show the service for as long as the lease is renewed."""

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

    def _wake(self) -> None:
        """Something may have changed: who waits looks again. Called on the loop."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _surely(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for it; if that is cancelled, it is done all the same."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            self._left(task)
            raise

    def _left(self, task: asyncio.Task[None]) -> None:  # noqa: B027 - a store keeps the order itself
        """Nobody waits for the task any more, whose work comes before that of later calls."""

    @staticmethod
    def _exists(key: str) -> CompareFailed:
        return CompareFailed(f"the key {key!r} exists")

    @staticmethod
    def _differs(key: str) -> CompareFailed:
        return CompareFailed(f"the key {key!r} is not at the expected version")
