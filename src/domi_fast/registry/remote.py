"""What the registries on servers have in common: leases that are renewed, and the way out."""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections.abc import Coroutine
from typing import Any, Final, Protocol

from ..errors import RegistryError
from .base import Limits
from .held import HeldLease
from .link import TIMEOUT, Calls
from .opened import OpenedRegistry

# Leases are renewed three times in their length, so that one late renewal does no harm.
RENEWALS: Final = 3


async def either(*waits: Coroutine[Any, Any, object]) -> None:
    """Wait until one of them is done, and end the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Ending(Protocol):
    def end(self) -> None:
        """On the loop: no more events."""


class RemoteRegistry(OpenedRegistry):
    """A registry on servers.

    :ivar link: the way to them.
    :ivar watches: those that have to be told when the registry ends.
    """

    def __init__(self, url: str, limits: Limits, link: Calls) -> None:
        super().__init__(url, limits)
        self.link = link
        self.watches: set[Ending] = set()
        self._renewals: dict[int, asyncio.Task[None]] = {}

    @abstractmethod
    async def _connect(self) -> None:
        """The first call. Raises RegistryError."""

    @abstractmethod
    async def _renewed(self, lease: HeldLease) -> float | None:
        """When a lease that was renewed is over, at the latest; None if it is over already.

        Raises RegistryError.
        """

    def _pause_of(self, lease: HeldLease) -> float:
        """Seconds between two renewals."""
        return lease.ttl / RENEWALS

    async def open(self) -> None:
        self._begin()
        try:
            await self._connect()
        except BaseException:
            self._closed = True
            await self.link.close()
            raise

    async def close(self) -> None:
        if self._closed:
            return
        if self._loop is None:
            self._closed = True
            self.link.abandon()
            return
        self._check()
        leases = list(self._leases.values())
        self._forget_leases()
        self._end()
        try:
            # Each server call has its own deadline; one that hangs is not waited for longer.
            await asyncio.wait_for(
                asyncio.gather(*[self._revoke(lease) for lease in leases], return_exceptions=True),
                TIMEOUT + 1.0,
            )
        except asyncio.TimeoutError:
            pass  # the leases end by themselves
        finally:
            await self.link.close()

    def _halt(self) -> None:
        """Be gone as a killed process is: without a word to the others."""
        for lease in list(self._leases.values()):
            lease._timer.cancel()
        self._end()
        self.link.abandon()

    def _end(self) -> None:
        self._closed = True
        for task in self._renewals.values():
            task.cancel()
        for watch in list(self.watches):
            watch.end()
        self._wake()

    def _left(self, task: asyncio.Task[None]) -> None:
        self.link._do_first(task)

    def _granted(self, lease: HeldLease) -> None:
        task = asyncio.ensure_future(self._renew(lease))
        self._renewals[lease.number] = task
        task.add_done_callback(lambda _: self._renewals.pop(lease.number, None))

    async def _renew(self, lease: HeldLease) -> None:
        pause = self._pause_of(lease)
        while not lease.over:
            due = lease.valid_until - lease.ttl + pause
            await asyncio.sleep(max(pause / 10, due - time.monotonic()))
            if lease.over or not self._keep_alive:
                continue
            try:
                until = await self._renewed(lease)
            except RegistryError:
                continue
            if until is None:
                lease.lose()
            elif not lease.over:
                lease.renewed(until)
