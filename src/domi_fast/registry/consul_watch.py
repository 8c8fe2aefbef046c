"""A watch in Consul, which tells what there is and not how it came to be."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from ..errors import RegistryError
from .base import Delete, Entry, Put, Reset, Snapshot
from .consul_agent import Row
from .consul_link import AgentLink
from .link import PAUSE
from .remote import Ending
from .watching import OpenedWatch, Watched


class WatchedConsul(Watched, Protocol):
    """What a watch needs of its registry.

    :ivar watches: those that have not ended.
    """

    link: AgentLink
    watches: set[Ending]
    _changed: asyncio.Event

    def entry(self, row: Row) -> Entry:
        """What Consul has, as the protocol has it."""


class ConsulWatch(OpenedWatch):
    """See :class:`~domi_fast.registry.base.Watch`.

    It compares what there is with what there was: a Reset comes first, then what differs.

    :param prefix: of the keys that it watches, as Consul has them.
    """

    def __init__(self, registry: WatchedConsul, prefix: str) -> None:
        super().__init__(registry)
        self._registry = registry
        self._prefix = prefix
        self._index = 0
        self._rows: dict[str, Row] | None = None
        # Outlives a cancelled wait, so that no question is asked twice.
        self._looking: asyncio.Task[None] | None = None
        registry.watches.add(self)

    async def _more(self) -> None:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(self._look())
        changed = asyncio.ensure_future(self._registry._changed.wait())
        try:
            await asyncio.wait({self._looking, changed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
        if self._looking.done() and not self._looking.cancelled():
            self._looking.result()

    def end(self) -> None:
        super().end()
        self._registry.watches.discard(self)
        if self._looking is not None:
            self._looking.cancel()

    async def _look(self) -> None:
        """Wait for a change and have its events."""
        try:
            agent = self._registry.link.agent
            index = await agent.await_change(self._prefix, self._index)
            if index == self._index:
                return
            rows, _ = await agent.list(self._prefix)
        except RegistryError:
            await asyncio.sleep(PAUSE)
            return
        self._index = index
        self._compare(rows)

    def _compare(self, rows: Sequence[Row]) -> None:
        before, self._rows = self._rows, {row.key: row for row in rows}
        entry = self._registry.entry
        if before is None:
            self.events.append(Reset(Snapshot(tuple(map(entry, rows)), self._index)))
            return
        there = {(row.key, row.created) for row in rows}
        gone = [row for row in before.values() if (row.key, row.created) not in there]
        self.events.extend(Delete(entry(row).key, self._index) for row in gone)
        put = sorted(set(rows) - set(before.values()), key=lambda row: row.modified)
        self.events.extend(Put(entry(row), self._index) for row in put)
