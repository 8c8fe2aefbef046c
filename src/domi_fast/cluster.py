"""Elections, locks and names of a cluster, kept in its registry.

A leadership is a key ``domi/<cluster>/leaders/<name>`` (``locks`` for a lock) that is held under a
lease of its own: to lose one costs neither the node nor its other leaderships. Who waits stands in
the registry's queue, first come first served. The holder stops at its own ``valid_until``, which is
never later than the registry's end of the lease; nobody else has begun by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import sys
import time
from collections.abc import AsyncIterator, Collection, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from .checks import check_number
from .config import NodeConfig
from .errors import DeadlineExceeded, DomiError, LeadershipLost, RegistryError
from .keys import Keys
from .membership import Membership
from .names import Keeper, Names
from .registry.base import Claim, Lease, Registry

log = logging.getLogger(__name__)

RETRY_PAUSE = 0.2


@dataclass(frozen=True)
class Leader:
    """Who leads, as the registry has it.

    :ivar id: its machine id.
    :ivar name: the name of its node.
    :ivar token: the fencing token of its leadership.
    """

    id: int
    name: str
    token: int


class Leadership:
    """What a block of :meth:`Cluster.elect` or :meth:`Cluster.lock` holds.

    It belongs to the loop of its node; ``valid_until`` and :meth:`check` are for any thread.

    :ivar name: what it is the leadership of.
    :ivar token: the fencing token: larger than that of every earlier leadership of the name. Send
        it along with what is written elsewhere, and have a smaller one refused there.
    :ivar lost: set once the leadership is over, also when its block was left.
    """

    def __init__(self, what: str, name: str, claim: Claim) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.name = name
        self.token = claim.epoch
        self.lost = asyncio.Event()
        self._what = what
        self._lease = claim.lease
        self._loop = asyncio.get_running_loop()
        self._ended: tuple[float, str] | None = None
        self._task: asyncio.Task[Any] = task
        self._cancelled = False
        self._cancelling = _cancelling(task)
        self._left: asyncio.Future[None] = self._loop.create_future()
        self._watcher = asyncio.ensure_future(self._watch())

    @property
    def valid_until(self) -> float:
        """When it is over unless it is renewed, which happens by itself, three times in its length.

        In seconds of ``time.monotonic()``; once it is over, a time that has passed.
        """
        ended = self._ended
        return self._lease.valid_until if ended is None else ended[0]

    def check(self) -> None:
        """Return while this leads, by the clock of this moment, however long nothing ran before.

        :raises LeadershipLost: it is over; it never comes back.
        """
        if self._ended is None:
            if time.monotonic() < self._lease.valid_until:
                return
            why = "its lease ran out before it was renewed"
            # For good: the registry may be a little behind, and renew what has run out here.
            self._note(why)
            with contextlib.suppress(RuntimeError):  # the loop was closed, and the block with it
                self._loop.call_soon_threadsafe(self._end, why)
        raise self._error()

    def __repr__(self) -> str:
        state = "held" if self._ended is None else "over"
        return f"<Leadership {self.name!r} token={self.token} {state}>"

    async def _watch(self) -> None:
        await self._lease.lost.wait()
        self._end("its lease ended; the registry was out of reach for too long, or has ended it")

    def _note(self, why: str) -> None:
        if self._ended is None:
            self._ended = (min(self._lease.valid_until, time.monotonic()), why)

    def _end(self, why: str, *, cancel: bool = True) -> None:
        """On the loop: it is over.

        :param cancel: whether to cancel the block, if that is not left yet.
        """
        self._note(why)
        if not self.lost.is_set():
            self.lost.set()
            if cancel:
                self._cancelled = True
                self._task.cancel()

    def _uncancel(self) -> bool:
        """Take the cancellation by :meth:`_end` back; whether it was the only one."""
        if not self._cancelled:
            return False
        self._cancelled = False
        if sys.version_info >= (3, 11):
            return self._task.uncancel() <= self._cancelling
        return True

    def _leave(self) -> None:
        """The block is left, however it was."""
        self._watcher.cancel()
        self._uncancel()
        self._end("its block was left", cancel=False)
        self._left.set_result(None)

    def _error(self) -> LeadershipLost:
        assert self._ended is not None
        return LeadershipLost(f"{self._what} (token {self.token}) is over: {self._ended[1]}")


class Cluster:
    """Elections, locks and names of a node's cluster; ``node.cluster``. Belongs to its loop."""

    def __init__(self, config: NodeConfig, registry: Registry, members: Membership) -> None:
        self._config = config
        self._registry = registry
        self._keys = Keys(config, members)
        self._names = Keeper(config, registry, self._keys)
        self._closed = False
        self._joining: set[asyncio.Task[Claim]] = set()
        self._held: set[Leadership] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def elect(
        self, name: str, timeout: float | None = None
    ) -> AbstractAsyncContextManager[Leadership]:
        """Lead for the length of a block: wait for the leadership ``name``, and resign at the end.

        Elections are held in turn, first come first served, also between tasks of one node. One
        leader at a time: when it leaves its block, the next begins at once; when it dies, within
        ``lease_ttl`` and the registry's own delay. While the registry is out of reach, this waits
        for it.

        When the leadership is lost inside the block (the registry was out of reach for longer than
        the lease, the process was stopped, the node is closed), the block is cancelled, as
        :func:`asyncio.timeout` does it, and ends with LeadershipLost. A block that came to its end
        though its leadership was over ends with it too.

        :param name: 1 to 128 letters, digits, ``.``, ``_`` and ``-``; no ``.`` in front.
        :param timeout: seconds to wait, from 0.001; None waits for as long as it takes.
        :raises ValueError: the name or the timeout is not allowed.
        :raises DeadlineExceeded: it did not lead in time, and waits no longer.
        :raises LeadershipLost: at the end of the block: the leadership was over before.
        :raises DomiError: the node has not started, or was closed.
        """
        return self._hold("leaders", f"the leadership of {name!r}", name, timeout)

    def lock(
        self, name: str, timeout: float | None = None
    ) -> AbstractAsyncContextManager[Leadership]:
        """Hold the lock ``name`` for the length of a block: :meth:`elect` under another word.

        Locks and elections have names of their own. A task that holds a lock and asks for it again
        waits for itself.
        """
        return self._hold("locks", f"the lock {name!r}", name, timeout)

    async def leader(self, name: str) -> Leader | None:
        """Who leads now, by the registry; None when nobody does.

        One that was killed is named until its lease is over.

        :raises ValueError: the name is not allowed.
        :raises RegistryError: the registry cannot be reached.
        :raises DomiError: the node has not started, or was closed.
        """
        key = self._keys.key("leaders", name)
        self._check()
        entry = await self._registry.get(key)
        if entry is None:
            return None
        holder = self._keys.read(entry)[0]
        return Leader(holder.id, holder.name, holder.epoch)

    def names(self, kind: str) -> Names:
        """The names of one kind, of which a node may have many.

        :param kind: as a name of :meth:`elect`. Names of different kinds have nothing in common.
        :raises ValueError: the kind is not allowed.
        """
        return Names(self._names, kind)

    # ------------------------------------------------------------------ what the node calls

    def open(self) -> None:
        """The node starts, on this loop."""
        self._keys.open()

    def stop(self) -> None:
        """The node is closing: who waits hears of it, and nobody begins."""
        self._closed = True
        for joining in self._joining:
            joining.cancel()

    async def close(self, closers: Collection[asyncio.Task[Any]]) -> None:
        """Give the names back, end the blocks, and wait ``drain_timeout`` seconds for each of the
        blocks and the registry.

        :param closers: tasks that wait for this, and which therefore are not waited for.
        """
        lease = await self._names.end()
        if lease is not None:
            self._spawn(_revoke(lease))
        blocks = []
        for held in list(self._held):
            closes_itself = held._task in closers
            held._end("the node was closed", cancel=not closes_itself)
            if closes_itself:
                self._spawn(_revoke(held._lease))
            else:
                blocks.append(held._left)
        if blocks:
            await asyncio.wait(blocks, timeout=self._config.drain_timeout)
        # Those that begin meanwhile too; the registry will see run out what is not given back.
        end = time.monotonic() + self._config.drain_timeout
        while self._tasks and time.monotonic() < end:
            await asyncio.wait(self._tasks, timeout=end - time.monotonic())
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # ------------------------------------------------------------------ holding and waiting

    @asynccontextmanager
    async def _hold(
        self, folder: str, what: str, name: str, timeout: float | None
    ) -> AsyncIterator[Leadership]:
        key = self._keys.key(folder, name)
        if timeout is not None:
            check_number("timeout", timeout, 0.001, 86400)
        self._check()
        held = Leadership(what, name, await self._take(key, what, timeout))
        self._held.add(held)
        try:
            yield held
            held.check()
        except asyncio.CancelledError as error:
            if held._uncancel():
                raise held._error() from error
            raise
        finally:
            held._leave()
            self._held.discard(held)
            await asyncio.wait([self._spawn(_revoke(held._lease))])

    async def _take(self, key: str, what: str, timeout: float | None) -> Claim:
        # Not wait_for: before Python 3.12 it may lose a result that comes with a cancellation.
        joining = asyncio.ensure_future(self._queue_up(key, what))
        self._joining.add(joining)
        try:
            await asyncio.wait([joining], timeout=timeout)
            if self._closed:
                raise DomiError(f"the node was closed while it waited for {what}")
            if not joining.done():
                raise DeadlineExceeded(f"{what} could not be had within {timeout} s", limit=timeout)
            return joining.result()
        except BaseException:
            joining.cancel()
            self._spawn(_abandon(joining))
            raise
        finally:
            self._joining.discard(joining)

    async def _queue_up(self, key: str, what: str) -> Claim:
        """Wait for the key; when the registry fails or the lease is lost meanwhile, begin anew."""
        while True:
            lease: Lease | None = None
            try:
                ttl = max(self._config.lease_ttl, self._registry.limits.min_ttl)
                lease = await self._registry.grant(ttl)
                claim = await self._registry.acquire(key, lease, self._keys.sign())
                if time.monotonic() < lease.valid_until:
                    return claim
                log.warning("%s: %s came too late to be used", self._config.name, what)
                self._spawn(_revoke(lease))
            except BaseException as error:
                if lease is not None:
                    self._spawn(_revoke(lease))
                if not isinstance(error, (RegistryError, OSError)):
                    raise
                log.warning("%s: cannot wait for %s: %s", self._config.name, what, error)
            await asyncio.sleep(RETRY_PAUSE * random.uniform(0.5, 1.5))

    def _check(self) -> None:
        if self._closed:
            raise DomiError("the node was closed: it takes part in no election and has no lock")
        self._keys.check()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _revoke(lease: Lease) -> None:
    """Give back what is held under it; a registry out of reach will see it run out."""
    with contextlib.suppress(DomiError, OSError):
        await lease.revoke()


async def _abandon(joining: asyncio.Task[Claim]) -> None:
    """Nobody waits for it any more: give back what it may have won."""
    await asyncio.wait([joining])
    if not joining.cancelled() and joining.exception() is None:
        await _revoke(joining.result().lease)


def _cancelling(task: asyncio.Task[Any]) -> int:
    """How many cancellations of the task are under way; not known before Python 3.11."""
    if sys.version_info >= (3, 11):
        return task.cancelling()
    return 0
