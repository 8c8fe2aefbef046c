"""The registry in etcd: for many machines.

A key ``k`` of the cluster is ``<root>/keys/k`` there, who waits for the lock ``n`` has a key of its
own under ``<root>/queue/n//``, and who holds a claim one under ``<root>/claims/``, by which it
knows its own work when it did not hear that it was done. Versions and cursors are etcd's revisions;
an epoch is the revision at which a key was created, which grows across its deletion.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from ..errors import RegistryError
from .base import (
    Claim,
    CompareFailed,
    Cursor,
    Entry,
    Lease,
    LeaseLost,
    Limits,
    NoKeyFree,
    Snapshot,
    Version,
    Watch,
    check_key,
    check_prefix,
)
from .etcd_claim import Attempt, Mark, Place, delete, get, is_at, put
from .etcd_link import TIMEOUT, Channel, Endpoints, Link, prefix_end
from .etcd_watch import EtcdWatch
from .opened import HeldLease, OpenedRegistry

# etcd counts a lease in whole seconds, two at least with its defaults, and looks for those that are
# over twice a second.
LIMITS: Final = Limits(min_ttl=2.0, expiry_bound=2.5, max_value=512 << 10)

# Leases are renewed three times in their length, so that one late renewal does no harm.
_RENEWALS: Final = 3


class EtcdRegistry(OpenedRegistry):
    """The registry ``etcd://host:port,...``; see :class:`~domi_fast.registry.base.Registry`.

    :param url: as it was given, without the password.
    :param root: what its keys begin with.
    """

    def __init__(self, url: str, endpoints: Endpoints, root: str) -> None:
        super().__init__(url, LIMITS)
        self.link = Link(endpoints)
        self.keys = f"{root}/keys/".encode()
        self._claims = f"{root}/claims/".encode()
        self._queue = f"{root}/queue/".encode()
        self.watches: set[EtcdWatch] = set()
        self._renewals: dict[int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ended = asyncio.Event()

    # ------------------------------------------------------------------ life

    async def open(self) -> None:
        self._begin()
        try:
            await self.link.call(lambda c: c.range(key=self.keys, count_only=True), again=True)
        except BaseException:
            self._closed = True
            self.link.abandon()
            raise

    async def close(self) -> None:
        if self._closed:
            return
        if self._loop is None:
            self._closed = True
            self.link.abandon()
            return
        self._check()
        numbers = list(self._leases)
        self._forget_leases()
        self._end()
        try:
            # Each server call has its own deadline; one that hangs is not waited for longer.
            await asyncio.wait_for(
                asyncio.gather(
                    *[self._end_lease(number) for number in numbers], return_exceptions=True
                ),
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

    def _wake(self) -> None:
        """A lease has ended, or the registry: who waits for a lock looks again."""
        ended, self._ended = self._ended, asyncio.Event()
        ended.set()

    # ------------------------------------------------------------------ leases

    async def grant(self, ttl: float) -> Lease:
        self._check()
        self.limits.check_ttl(ttl)
        # Before the lease is asked for, so that it never seems longer than it is.
        asked = time.monotonic()
        number = secrets.randbits(62) + 1
        await self.link.call(
            lambda c: c.grant(number, math.ceil(ttl)),
            again=False,
            undo=partial(Channel.revoke, number=number),
        )
        lease = HeldLease(self, number, ttl, asked + ttl)
        self._leases[number] = lease
        task = asyncio.ensure_future(self._renew(lease))
        self._renewals[number] = task
        task.add_done_callback(lambda _: self._renewals.pop(number, None))
        return lease

    async def _renew(self, lease: HeldLease) -> None:
        pause = lease.ttl / _RENEWALS
        while not lease.over:
            due = lease.valid_until - lease.ttl + pause
            await asyncio.sleep(max(pause / 10, due - time.monotonic()))
            if not self._keep_alive:
                continue
            try:
                until = await self.link.call(partial(self._renewed, lease), again=True)
            except RegistryError:
                continue
            if until is None:
                lease.lose()
            elif not lease.over:
                lease.renewed(until)

    @staticmethod
    def _renewed(lease: HeldLease, channel: Channel) -> float | None:
        """When a lease that was renewed is over; None if it is over already. Blocks."""
        # Before it is asked for, so that it never seems longer than it is.
        asked = time.monotonic()
        alive = channel.keep_alive(lease.number, min(TIMEOUT, lease.ttl / _RENEWALS))
        return asked + lease.ttl if alive else None

    async def _revoke(self, number: int) -> None:
        await self._surely(self._end_lease(number))

    async def _end_lease(self, number: int) -> None:
        with contextlib.suppress(LeaseLost):
            await self.link.call(partial(Channel.revoke, number=number), again=True)

    def _post_revoke(self, number: int) -> None:
        self.link.post(partial(Channel.revoke, number=number))

    async def _surely(self, work: Any) -> None:
        """Wait for it; if that is cancelled, it goes on."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    # ------------------------------------------------------------------ keys

    def entry(self, kv: Any) -> Entry:
        """What etcd has, as the protocol has it."""
        return Entry(
            bytes(kv.key)[len(self.keys) :].decode(),
            bytes(kv.value),
            int(kv.mod_revision),
            int(kv.create_revision),
        )

    def snapshot(self, channel: Channel, prefix: bytes) -> Snapshot:
        """All under a prefix. Blocks."""
        found = channel.range(key=prefix, range_end=prefix_end(prefix))
        return Snapshot(tuple(self.entry(kv) for kv in found.kvs), int(found.header.revision))

    async def get(self, key: str) -> Entry | None:
        self._check()
        check_key(key)
        found = await self.link.call(lambda c: c.range(key=self._at(key)), again=True)
        return self.entry(found.kvs[0]) if found.kvs else None

    async def list(self, prefix: str) -> Snapshot:
        self._check()
        check_prefix(prefix)
        return await self.link.call(lambda c: self.snapshot(c, self._at(prefix)), again=True)

    async def put(
        self, key: str, value: bytes, *, expect: Version | None = None, lease: Lease | None = None
    ) -> Entry:
        self._check()
        check_key(key)
        self.limits.check_value(value)
        number = 0 if lease is None else self._own(lease).number
        if expect is not None and not isinstance(expect, int):
            raise self._changed(key)

        def work(c: Channel) -> Entry | None:
            compare = [] if expect is None else [is_at(c, self._at(key), mod_revision=expect)]
            done = c.txn(compare, [put(c, self._at(key), value, number), get(c, self._at(key))])
            if not done.succeeded:
                return None
            return self.entry(done.responses[1].response_range.kvs[0])

        entry = await self.link.call(work, again=False)
        if entry is None:
            raise self._changed(key)
        return entry

    async def create(self, key: str, value: bytes, *, lease: Lease | None = None) -> Entry:
        self._check()
        check_key(key)
        self.limits.check_value(value)
        number = 0 if lease is None else self._own(lease).number
        at = self._at(key)

        def work(c: Channel) -> Entry | None:
            done = c.txn([is_at(c, at, create_revision=0)], [put(c, at, value, number)])
            revision = int(done.header.revision)
            return Entry(key, value, revision, revision) if done.succeeded else None

        entry = await self.link.call(work, again=False)
        if entry is None:
            raise CompareFailed(f"the key {key!r} exists")
        return entry

    async def delete(self, key: str, *, expect: Version | None = None) -> bool:
        self._check()
        check_key(key)
        at = self._at(key)
        revision = expect if isinstance(expect, int) else -1

        def work(c: Channel) -> bool | None:
            compare = [] if expect is None else [is_at(c, at, mod_revision=revision)]
            done = c.txn(compare, [delete(c, at)], [get(c, at)])
            if done.succeeded:
                return bool(done.responses[0].response_delete_range.deleted)
            return None if done.responses[0].response_range.kvs else False

        deleted = await self.link.call(work, again=False)
        if deleted is None:
            raise self._changed(key)
        return deleted

    def watch(self, prefix: str, *, since: Cursor) -> Watch:
        self._check()
        check_prefix(prefix)
        return EtcdWatch(self, self._at(prefix), since)

    def _at(self, key: str) -> bytes:
        return self.keys + key.encode()

    @staticmethod
    def _changed(key: str) -> CompareFailed:
        return CompareFailed(f"the key {key!r} is not at the expected version")

    # ------------------------------------------------------------------ claims

    async def claim(self, keys: Sequence[str], value: bytes, lease: Lease) -> Claim:
        self._check()
        offered = list(keys)
        for key in offered:
            check_key(key)
        self.limits.check_value(value)
        own = self._own(lease)
        if not offered:
            raise NoKeyFree("no key was offered")
        mark = Mark(self._claims, own.number)
        attempt = Attempt(mark, [self._at(key) for key in offered], value)
        at, epoch = await self.link.call(attempt.take, again=True, undo=mark.withdraw)
        return EtcdClaim(self, at, epoch, own, mark)

    async def acquire(self, name: str, lease: Lease, value: bytes = b"") -> Claim:
        self._check()
        check_key(name)
        self.limits.check_value(value)
        own = self._own(lease)
        mark = Mark(self._claims, own.number)
        # No key has an empty part: what follows upon '//' belongs to this name alone.
        place = Place(mark, self._at(name), self._queue + name.encode() + b"//", value)
        try:
            await self.link.call(place.enter, again=True, undo=place.withdraw)
            while True:
                self._check()
                own.check()
                # Taken before the look, so that no change falls between the two.
                ended = self._ended
                found = await self.link.call(place.look, again=True, undo=place.withdraw)
                if isinstance(found, int):
                    return EtcdClaim(self, self._at(name), found, own, mark)
                await self._gone(found[0], found[1], ended)
        except BaseException:
            self.link.undo(place.withdraw)
            raise

    async def _gone(self, at: bytes, revision: int, ended: asyncio.Event) -> None:
        """Wait until this key has changed after the revision, or the event is set."""
        watch = EtcdWatch(self, at, revision, alone=True)
        waits = [asyncio.ensure_future(w) for w in (watch.__anext__(), ended.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await watch.aclose()
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)


class EtcdClaim:
    """A held key; see :class:`~domi_fast.registry.base.Claim`."""

    def __init__(
        self, registry: EtcdRegistry, at: bytes, epoch: int, lease: HeldLease, mark: Mark
    ) -> None:
        self.key = at[len(registry.keys) :].decode()
        self.epoch = epoch
        self.lease: Lease = lease
        self._at = at
        self._lease = lease
        self._registry = registry
        self._mark = mark
        self._released = False

    async def update(self, value: bytes) -> None:
        registry = self._registry
        registry._check()
        registry.limits.check_value(value)
        if self._released:
            raise LeaseLost(f"the claim of {self.key!r} was released")
        self._lease.check()
        done = await registry.link.call(
            lambda c: c.txn(
                self._mark.held(c, self._at, self.epoch),
                [put(c, self._at, value, self._lease.number)],
            ),
            again=True,
        )
        if not done.succeeded:
            raise LeaseLost(f"the claim of {self.key!r} is over: another has taken or deleted it")

    async def release(self) -> None:
        if self._released or self._lease.over:
            return
        self._registry._check()
        self._released = True
        try:
            await self._registry._surely(
                self._registry.link.call(
                    lambda c: self._mark.release(c, self._at, self.epoch), again=True
                )
            )
        except RegistryError:
            self._released = False
            raise
