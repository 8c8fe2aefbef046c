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

from .base import Claim, Cursor, Entry, LeaseLost, Limits, Snapshot, Version, Watch
from .etcd_claim import Attempt, Mark, Place, delete, get, is_at, put
from .etcd_link import Channel, connector, prefix_end
from .etcd_watch import EtcdWatch
from .held import HeldClaim, HeldLease
from .link import TIMEOUT, Link
from .remote import RENEWALS, RemoteRegistry, either
from .server_url import Endpoints

# etcd counts a lease in whole seconds, two at least with its defaults, and looks for those that are
# over twice a second.
LIMITS: Final = Limits(min_ttl=2.0, expiry_bound=2.5, max_value=512 << 10)


class EtcdRegistry(RemoteRegistry):
    """The registry ``etcd://host:port,...``; see :class:`~domi_fast.registry.base.Registry`.

    :param url: as it was given, without the password.
    :param root: what its keys begin with.
    """

    link: Link[Channel]

    def __init__(self, url: str, endpoints: Endpoints, root: str) -> None:
        super().__init__(url, LIMITS, Link("etcd", connector(endpoints)))
        self.keys = f"{root}/keys/".encode()
        self._claims = f"{root}/claims/".encode()
        self._queue = f"{root}/queue/".encode()

    # ------------------------------------------------------------------ leases

    async def _connect(self) -> None:
        await self.link.call(lambda c: c.range(key=self.keys, count_only=True), again=True)

    async def _grant(self, ttl: float) -> int:
        number = secrets.randbits(62) + 1
        await self.link.call(
            lambda c: c.grant(number, math.ceil(ttl)),
            again=False,
            undo=partial(Channel.revoke, number=number),
        )
        return number

    async def _renewed(self, lease: HeldLease) -> float | None:
        def work(channel: Channel) -> float | None:
            # Before it is asked for, so that it never seems longer than it is.
            asked = time.monotonic()
            alive = channel.keep_alive(lease.number, min(TIMEOUT, lease.ttl / RENEWALS))
            return asked + lease.ttl if alive else None

        return await self.link.call(work, again=True)

    async def _revoke(self, lease: HeldLease) -> None:
        with contextlib.suppress(LeaseLost):
            await self.link.call(partial(Channel.revoke, number=lease.number), again=True)

    def _post_revoke(self, lease: HeldLease) -> None:
        self.link.post(partial(Channel.revoke, number=lease.number))

    # ------------------------------------------------------------------ keys

    def entry(self, kv: Any) -> Entry:
        """What etcd has, as the protocol has it."""
        return Entry(
            bytes(kv.key)[len(self.keys) :].decode(errors="replace"),  # anybody may write there
            bytes(kv.value),
            int(kv.mod_revision),
            int(kv.create_revision),
        )

    def snapshot(self, channel: Channel, prefix: bytes) -> Snapshot:
        """All under a prefix. Blocks."""
        found = channel.range(key=prefix, range_end=prefix_end(prefix))
        return Snapshot(tuple(self.entry(kv) for kv in found.kvs), int(found.header.revision))

    async def _get(self, key: str) -> Entry | None:
        found = await self.link.call(lambda c: c.range(key=self._at(key)), again=True)
        return self.entry(found.kvs[0]) if found.kvs else None

    async def _list(self, prefix: str) -> Snapshot:
        return await self.link.call(lambda c: self.snapshot(c, self._at(prefix)), again=True)

    async def _put(
        self, key: str, value: bytes, expect: Version | None, lease: HeldLease | None
    ) -> Entry:
        number = 0 if lease is None else lease.number
        if expect is not None and not isinstance(expect, int):
            raise self._differs(key)

        def work(c: Channel) -> Entry | None:
            compare = [] if expect is None else [is_at(c, self._at(key), mod_revision=expect)]
            done = c.txn(compare, [put(c, self._at(key), value, number), get(c, self._at(key))])
            if not done.succeeded:
                return None
            return self.entry(done.responses[1].response_range.kvs[0])

        entry = await self.link.call(work, again=False)
        if entry is None:
            raise self._differs(key)
        return entry

    async def _create(self, key: str, value: bytes, lease: HeldLease | None) -> Entry:
        number = 0 if lease is None else lease.number
        at = self._at(key)

        def work(c: Channel) -> Entry | None:
            done = c.txn([is_at(c, at, create_revision=0)], [put(c, at, value, number)])
            revision = int(done.header.revision)
            return Entry(key, value, revision, revision) if done.succeeded else None

        entry = await self.link.call(work, again=False)
        if entry is None:
            raise self._exists(key)
        return entry

    async def _delete(self, key: str, expect: Version | None) -> bool:
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
            raise self._differs(key)
        return deleted

    def _watch(self, prefix: str, since: Cursor) -> Watch:
        return EtcdWatch(self, self._at(prefix), since)

    def _at(self, key: str) -> bytes:
        return self.keys + key.encode()

    # ------------------------------------------------------------------ claims

    async def _claim(self, keys: Sequence[str], value: bytes, lease: HeldLease) -> Claim:
        mark = Mark(self._claims, lease.number)
        attempt = Attempt(mark, [self._at(key) for key in keys], value)
        at, epoch = await self.link.call(attempt.take, again=True, undo=mark.withdraw)
        return EtcdClaim(self, at, epoch, lease, mark)

    async def _acquire(self, name: str, lease: HeldLease, value: bytes) -> Claim:
        mark = Mark(self._claims, lease.number)
        # No key has an empty part: what follows upon '//' belongs to this name alone.
        place = Place(mark, self._at(name), self._queue + name.encode() + b"//", value)
        try:
            await self.link.call(place.enter, again=True, undo=place.withdraw)
            while True:
                self._check()
                lease.check()
                # Taken before the look, so that no change falls between the two.
                changed = self._changed
                found = await self.link.call(place.look, again=True, undo=place.withdraw)
                if isinstance(found, int):
                    return EtcdClaim(self, self._at(name), found, lease, mark)
                await self._gone(found[0], found[1], changed)
        except BaseException:
            self.link.undo(place.withdraw)
            raise

    async def _gone(self, at: bytes, revision: int, changed: asyncio.Event) -> None:
        """Wait until this key has changed after the revision, or the event is set."""
        watch = EtcdWatch(self, at, revision, alone=True)
        try:
            await either(watch.__anext__(), changed.wait())
        finally:
            await watch.aclose()


class EtcdClaim(HeldClaim):
    """A held key; see :class:`~domi_fast.registry.base.Claim`."""

    def __init__(
        self, registry: EtcdRegistry, at: bytes, epoch: int, lease: HeldLease, mark: Mark
    ) -> None:
        super().__init__(registry, at[len(registry.keys) :].decode(), epoch, lease)
        self._at = at
        self._registry = registry
        self._mark = mark

    async def _update(self, value: bytes) -> None:
        done = await self._registry.link.call(
            lambda c: c.txn(
                self._mark.held(c, self._at, self.epoch),
                [put(c, self._at, value, self._lease.number)],
            ),
            again=True,
        )
        if not done.succeeded:
            raise self._is_over()

    async def _release(self) -> None:
        await self._registry.link.call(
            lambda c: self._mark.release(c, self._at, self.epoch), again=True
        )
