"""The registry in ZooKeeper: for many machines.

A lease is a session of its own, with its own connection: what is bound to it are ephemeral nodes,
and its end is the session's. Another session serves whatever is bound to none, and watches. A
version is (czxid, version), an epoch the czxid, the transaction that created the node.

**How long a lease holds.** The ensemble's leader ends a session that it has not heard of for its
timeout; the member that the client speaks to tells the leader at each half tick of whom it has
heard. A renewal is a round trip to the leader, every half tick. Its answer shows that the way from
the member to the leader was open, so that what the member had heard up to half a tick before the
renewal was asked for has been told: the renewal before this one, asked for one pause of half a
tick earlier or more. A session lasts two pauses longer than its lease, so that the lease need not
be the shorter for it; and nothing but renewals keeps it alive.
Half a tick is taken to be a quarter of the shortest session, which is two ticks long unless
ZooKeeper was told otherwise.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

from ..errors import RegistryError
from . import zookeeper_nodes as zk
from .base import Claim, Cursor, Entry, LeaseLost, Limits, Snapshot, Version, Watch
from .held import HeldClaim, HeldLease
from .link import Link
from .remote import RemoteRegistry, either
from .server_url import Endpoints
from .zookeeper_session import Session, load_kazoo
from .zookeeper_watch import ZooKeeperWatch

T = TypeVar("T")

MAX_VALUE: Final = 512 << 10
"""Half of what ZooKeeper takes in one request unless told otherwise."""

_SHORTEST: Final = 4.0
"""Seconds of the shortest session, with ZooKeeper's default tick of two seconds."""

_LEAST: Final = 1.0
"""A shorter one is not made use of."""

# A registry that was made anew refuses a client that has seen later transactions than it has: one
# that is refused for so long begins as a new client.
_GIVEN_UP: Final = 15.0


def _limits(shortest: float) -> Limits:
    """Where the shortest session lasts so many seconds."""
    pause = shortest / 4
    # A dead owner was heard of up to one renewal after the last one that it knows of, the session
    # is two longer than the lease, and ends up to a tick late.
    return Limits(min_ttl=3 * pause, expiry_bound=5 * pause + 0.5, max_value=MAX_VALUE)


class ZooKeeperLink(Link[Session]):
    """Its channel finds its way to another server by itself, and is kept.

    :param prepare: sees to it that the nodes are there that have to be.
    """

    def __init__(self, connect: Callable[[], Session], prepare: Callable[[Session], None]) -> None:
        super().__init__("zookeeper", connect)
        self._prepare = prepare

    def _attempt(self, work: Callable[[Session], T]) -> T:
        def prepared(session: Session) -> T:
            if not session.prepared:
                self._prepare(session)
                session.prepared = True
            return work(session)

        return super()._attempt(prepared)

    def drop(self, channel: Session) -> None:
        if channel.away_for() > _GIVEN_UP:
            super().drop(channel)


class ZooKeeperRegistry(RemoteRegistry):
    """The registry ``zookeeper://host:port,...``; see :class:`~domi_fast.registry.base.Registry`.

    :param url: as it was given, without the password.
    :param root: what its nodes are below.
    """

    link: Link[Session]

    def __init__(self, url: str, endpoints: Endpoints, root: str) -> None:
        self.tree = zk.Tree(root)
        link = ZooKeeperLink(self._new_channel, self.tree.prepare)
        super().__init__(url, _limits(_SHORTEST), link)
        self._kazoo = load_kazoo()
        self._endpoints = endpoints
        self._pause = _limits(_SHORTEST).min_ttl / 3
        self._sessions: dict[int, Session] = {}

    # ------------------------------------------------------------------ sessions

    def _new_channel(self) -> Session:
        # The shortest session that there is: nothing is bound to it, and it tells how long it is.
        session = Session(self._kazoo, self._endpoints, 0.001, told=self._told)
        session.start()
        return session

    async def _connect(self) -> None:
        for file in (self._endpoints.ca, self._endpoints.cert, self._endpoints.key):
            if file is not None and not os.access(file, os.R_OK):
                raise RegistryError(
                    f"the file {file}, which the URL names for TLS, is not readable"
                )
        shortest = await self.link.call(_timeout, again=True)
        self.limits = _limits(max(_LEAST, shortest))
        self._pause = self.limits.min_ttl / 3

    def _told(self, path: str | None) -> None:
        """On a thread of the session's."""
        loop = self._loop
        assert loop is not None
        with suppress(RuntimeError):  # the loop was closed, and nobody closed the registry
            loop.call_soon_threadsafe(self._pass_on, path)

    def _pass_on(self, path: str | None) -> None:
        for watch in list(self.watches):
            assert isinstance(watch, ZooKeeperWatch)
            watch.told(path)

    def _halt(self) -> None:
        for session in self._sessions.values():
            session.abandon()
        super()._halt()

    # ------------------------------------------------------------------ leases

    async def _grant(self, ttl: float) -> int:
        wanted = ttl + 2 * self._pause
        session = Session(self._kazoo, self._endpoints, wanted, mortal=True)
        session.start()
        try:
            await self.link.call(lambda _: session.wait(), again=False)
            self._check()
            if session.timeout < wanted - 0.001:
                longest = session.timeout - 2 * self._pause
                raise RegistryError(
                    f"a lease of {ttl} s: this ZooKeeper grants at most {longest:.1f} s; raise "
                    "its maxSessionTimeout",
                    limit=longest,
                )
        except BaseException:
            session.close()
            raise
        self._sessions[session.number] = session
        return session.number

    def _granted(self, lease: HeldLease) -> None:
        # It counts from the greeting that was answered, however long the way there was.
        lease.renewed(self._sessions[lease.number].heard[0] + lease.ttl)
        super()._granted(lease)

    def _pause_of(self, lease: HeldLease) -> float:
        return self._pause

    async def _renewed(self, lease: HeldLease) -> float | None:
        session = self._sessions[lease.number]

        def work(_: Session) -> float:
            asked = time.monotonic()
            session.sync(max(self._pause, 0.5))
            return asked

        try:
            asked = await self.link.call(work, again=False)
        except LeaseLost:
            return None
        heard = session.heard
        while len(heard) > 1 and heard[1] <= asked - self._pause:
            heard.popleft()
        heard.append(asked)
        return min(asked, heard[0] + 2 * self._pause) + lease.ttl

    async def _revoke(self, lease: HeldLease) -> None:
        session = self._sessions.pop(lease.number)
        try:
            with suppress(LeaseLost):
                await self.link.call(lambda _: session.end(), again=True)
        except BaseException:
            session.close()
            raise

    def _post_revoke(self, lease: HeldLease) -> None:
        self._sessions.pop(lease.number).close()

    def session_of(self, lease: HeldLease) -> Session:
        """Raises LeaseLost."""
        lease.check()
        return self._sessions[lease.number]

    # ------------------------------------------------------------------ keys

    async def _get(self, key: str) -> Entry | None:
        return await self.link.call(lambda c: zk.get(c, self.tree, key), again=True)

    async def _list(self, prefix: str) -> Snapshot:
        return await self.link.call(lambda c: zk.snapshot(c, self.tree, prefix), again=True)

    async def _put(
        self, key: str, value: bytes, expect: Version | None, lease: HeldLease | None
    ) -> Entry:
        own = None if lease is None else self.session_of(lease)
        entry = await self.link.call(
            lambda c: zk.put(own or c, self.tree, key, value, expect, bound=own is not None),
            again=False,
        )
        if entry is None:
            raise self._differs(key)
        return entry

    async def _create(self, key: str, value: bytes, lease: HeldLease | None) -> Entry:
        own = None if lease is None else self.session_of(lease)
        data = zk.new_tag() + value
        epoch = await self.link.call(
            lambda c: zk.create(own or c, self.tree, key, data, bound=own is not None),
            again=False,
        )
        if epoch is None:
            raise self._exists(key)
        return Entry(key, value, (epoch, 0), epoch)

    async def _delete(self, key: str, expect: Version | None) -> bool:
        deleted = await self.link.call(lambda c: zk.delete(c, self.tree, key, expect), again=False)
        if deleted is None:
            raise self._differs(key)
        return deleted

    def _watch(self, prefix: str, since: Cursor) -> Watch:
        return ZooKeeperWatch(self, prefix)

    # ------------------------------------------------------------------ claims

    async def _claim(self, keys: Sequence[str], value: bytes, lease: HeldLease) -> Claim:
        attempt = zk.Attempt(self.session_of(lease), self.tree, value)
        key, epoch = await self.link.call(
            lambda _: attempt.first(keys), again=True, undo=lambda _: attempt.withdraw()
        )
        return ZooKeeperClaim(self, key, epoch, lease, attempt.session)

    async def _acquire(self, name: str, lease: HeldLease, value: bytes) -> Claim:
        place = zk.Place(self.session_of(lease), self.tree, name, value)
        bell = _Bell()

        def withdraw(_: Session) -> None:
            place.withdraw()

        try:
            await self.link.call(lambda _: place.enter(), again=True, undo=withdraw)
            while True:
                self._check()
                lease.check()
                # Before the look, so that no change falls between the two.
                changed = self._changed
                bell.rung.clear()
                epoch = await self.link.call(
                    lambda _: place.look(bell.ring), again=True, undo=withdraw
                )
                if epoch is not None:
                    return ZooKeeperClaim(self, name, epoch, lease, place.session)
                await either(bell.rung.wait(), changed.wait())
        except BaseException:
            self.link.undo(withdraw)
            raise


def _timeout(session: Session) -> float:
    session.wait()
    return session.timeout


class ZooKeeperClaim(HeldClaim):
    """A held key; see :class:`~domi_fast.registry.base.Claim`."""

    def __init__(
        self, registry: ZooKeeperRegistry, key: str, epoch: int, lease: HeldLease, session: Session
    ) -> None:
        super().__init__(registry, key, epoch, lease)
        self._registry = registry
        self._holding = zk.Holding(session, registry.tree, key, epoch)

    async def _update(self, value: bytes) -> None:
        held = await self._registry.link.call(lambda _: self._holding.update(value), again=True)
        if not held:
            raise self._is_over()

    async def _release(self) -> None:
        with suppress(LeaseLost):
            await self._registry.link.call(lambda _: self._holding.release(), again=True)


class _Bell:
    """An event that any thread may set."""

    def __init__(self) -> None:
        self.rung = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def ring(self, _: Any) -> None:
        with suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(self.rung.set)
