"""The registry in Consul: for many machines.

A key ``k`` of the cluster is ``<root>/keys/k`` there, and who waits for the lock ``n`` has a key of
its own under ``<root>/queue/``. A lease is a session; what is bound to it are the keys that it
holds, which go when it ends. Versions are Consul's indexes; an epoch is the index at which a key
was created, which grows across its deletion.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Final
from uuid import UUID

from ..errors import RegistryError
from .base import Claim, Cursor, Entry, Limits, Service, Snapshot, Version, Watch
from .consul_agent import Agent, Row
from .consul_keys import Attempt, Hold, Place, create, new_mark, put, remove
from .consul_link import AgentLink
from .consul_watch import ConsulWatch
from .held import HeldClaim, HeldLease
from .link import PAUSE
from .remote import RemoteRegistry, either
from .server_url import Endpoints

log = logging.getLogger(__name__)

# Consul takes sessions of 10 s at least with its defaults, and ends them after up to twice their
# length. A transaction may have 512 KiB, in which values are a third longer.
LIMITS: Final = Limits(min_ttl=10.0, expiry_bound=1.0, expiry_share=1.0, max_value=375 << 10)


class ConsulRegistry(RemoteRegistry):
    """The registry ``consul://host:port``; see :class:`~domi_fast.registry.base.Registry`.

    :param url: as it was given, without the token.
    :param root: what its keys begin with.
    """

    link: AgentLink

    def __init__(self, url: str, endpoints: Endpoints, root: str) -> None:
        super().__init__(url, LIMITS, AgentLink(endpoints))
        self.keys = f"{root}/keys/"
        self._queue = f"{root}/queue/"
        # What is shown for as long as a lease is renewed, by the lease's number.
        self._services: dict[int, list[Service]] = {}
        self._told: set[str] = set()
        # What is hidden is not shown again by what was under way.
        self._catalog = asyncio.Lock()

    # ------------------------------------------------------------------ leases

    async def _connect(self) -> None:
        # A single key: of a list, Consul leaves out in silence what a token may not read.
        await self.link.call(lambda a: a.read(self.keys), again=True)

    async def _grant(self, ttl: float) -> int:
        granted: list[str] = []

        async def work(agent: Agent) -> str:
            granted.append(await agent.create_session(math.ceil(ttl * 1000)))
            return granted[-1]

        async def undo(agent: Agent) -> None:
            for session in granted:
                await agent.destroy_session(session)

        # One of which nobody has heard holds nothing, and ends by itself.
        return UUID(await self.link.call(work, again=True, undo=undo)).int

    async def _renewed(self, lease: HeldLease) -> float | None:
        async def work(agent: Agent) -> float | None:
            # Before it is asked for, so that it never seems longer than it is.
            asked = time.monotonic()
            return asked + lease.ttl if await agent.renew_session(_session(lease)) else None

        until = await self.link.call(work, again=True)
        if until is not None:
            self._show(lease)
        return until

    async def _revoke(self, lease: HeldLease) -> None:
        await self.link.call(partial(self._end_of, lease), again=True)

    def _post_revoke(self, lease: HeldLease) -> None:
        self.link.post(partial(self._end_of, lease))

    async def _end_of(self, lease: HeldLease, agent: Agent) -> None:
        await agent.destroy_session(_session(lease))
        async with self._catalog:
            for service in self._services.pop(lease.number, ()):
                with suppress(RegistryError):  # its check will say it
                    await agent.hide(service)

    # ------------------------------------------------------------------ services

    def _announce(self, service: Service, lease: HeldLease) -> None:
        self._services.setdefault(lease.number, []).append(service)
        self._show(lease, anew=True)

    def _show(self, lease: HeldLease, *, anew: bool = False) -> None:
        for service in self._services.get(lease.number, ()):
            self.link.post(partial(self._show_one, service, lease, anew))

    async def _show_one(self, service: Service, lease: HeldLease, anew: bool, agent: Agent) -> None:
        try:
            async with self._catalog:
                # What the agent has under this name may be of an earlier owner.
                if not lease.over and (anew or not await agent.pass_check(service)):
                    await agent.show(service, lease.ttl)
        except RegistryError as error:
            if service.id not in self._told:
                self._told.add(service.id)
                log.warning("%s is not shown in Consul's catalog: %s", service.id, error)
        else:
            self._told.discard(service.id)

    # ------------------------------------------------------------------ keys

    def entry(self, row: Row) -> Entry:
        """What Consul has, as the protocol has it."""
        return Entry(row.key.removeprefix(self.keys), row.value, row.modified, row.created)

    async def _get(self, key: str) -> Entry | None:
        row = await self.link.call(lambda a: a.read(self._at(key)), again=True)
        return None if row is None else self.entry(row)

    async def _list(self, prefix: str) -> Snapshot:
        rows, index = await self.link.call(lambda a: a.list(self._at(prefix)), again=True)
        return Snapshot(tuple(map(self.entry, rows)), index)

    async def _put(
        self, key: str, value: bytes, expect: Version | None, lease: HeldLease | None
    ) -> Entry:
        if expect is not None and not isinstance(expect, int):
            raise self._differs(key)
        row = await self.link.call(
            lambda a: put(a, self._at(key), value, _session(lease) if lease else None, expect),
            again=False,
        )
        if row is None:
            raise self._differs(key)
        return Entry(key, value, row.modified, row.created)

    async def _create(self, key: str, value: bytes, lease: HeldLease | None) -> Entry:
        session, mark = _session(lease) if lease else None, new_mark()
        row = await self.link.call(
            lambda a: create(a, self._at(key), value, session, mark), again=False
        )
        if row is None:
            raise self._exists(key)
        return Entry(key, value, row.modified, row.created)

    async def _delete(self, key: str, expect: Version | None) -> bool:
        index = expect if expect is None or isinstance(expect, int) else -1
        deleted = await self.link.call(lambda a: remove(a, self._at(key), index), again=False)
        if deleted is None:
            raise self._differs(key)
        return deleted

    def _watch(self, prefix: str, since: Cursor) -> Watch:
        return ConsulWatch(self, self._at(prefix))

    def _at(self, key: str) -> str:
        return self.keys + key

    # ------------------------------------------------------------------ claims

    async def _claim(self, keys: Sequence[str], value: bytes, lease: HeldLease) -> Claim:
        attempt = Attempt(_session(lease), [self._at(key) for key in keys], value)
        hold = await self.link.call(attempt.take, again=True, undo=attempt.withdraw)
        return ConsulClaim(self, hold, lease)

    async def _acquire(self, name: str, lease: HeldLease, value: bytes) -> Claim:
        # Of one length, and without a '/': no queue is within another.
        queue = f"{self._queue}{hashlib.sha256(name.encode()).hexdigest()}/"
        place = Place(_session(lease), self._at(name), queue, value)
        try:
            await self.link.call(place.enter, again=True, undo=place.withdraw)
            while True:
                self._check()
                lease.check()
                # Taken before the look, so that no change falls between the two.
                changed = self._changed
                found = await self.link.call(place.look, again=True, undo=place.withdraw)
                if isinstance(found, Hold):
                    return ConsulClaim(self, found, lease)
                await either(self._gone(found), changed.wait())
        except BaseException:
            self.link.undo(place.withdraw)
            raise

    async def _gone(self, row: Row) -> None:
        """Wait until a key is not as it was."""
        while True:
            try:
                if await self.link.agent.has_changed(row):
                    return
            except RegistryError:  # noqa: PERF203 - the loop is there for it
                await asyncio.sleep(PAUSE)


class ConsulClaim(HeldClaim):
    """A held key; see :class:`~domi_fast.registry.base.Claim`."""

    def __init__(self, registry: ConsulRegistry, hold: Hold, lease: HeldLease) -> None:
        super().__init__(registry, hold.key.removeprefix(registry.keys), hold.epoch, lease)
        self._registry = registry
        self._hold = hold

    async def _update(self, value: bytes) -> None:
        if not await self._registry.link.call(partial(self._hold.update, value=value), again=True):
            raise self._is_over()

    async def _release(self) -> None:
        await self._registry.link.call(self._hold.release, again=True)


def _session(lease: HeldLease) -> str:
    """What Consul calls a lease."""
    return str(UUID(int=lease.number))
