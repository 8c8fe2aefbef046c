"""Saver: puts the snapshots of a zone's groups into its store."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .group import Group
    from .zone import Zone

log = logging.getLogger(__name__)


class Saver:
    """Knows which groups have changed since they were saved: those that have run a handler."""

    def __init__(self, zone: Zone) -> None:
        self._zone = zone
        self._store = zone.config.snapshots
        self._changed: set[Group] = set()
        # A group may be saved by its ending and by the clock: one at a time, or the older wins.
        self._saving = asyncio.Lock()

    def note(self, group: Group) -> None:
        if self._store is not None:
            self._changed.add(group)

    def forget(self, group: Group) -> None:
        self._changed.discard(group)

    async def save(self, group: Group) -> bool:
        """Save it if it has changed. Whether it is saved, or nothing is to be."""
        if self._store is None:
            return True
        async with self._saving:
            if group not in self._changed:
                return True
            self._changed.discard(group)
            try:
                snapshot = await group.snapshot()
                if group.id in self._zone.groups:
                    await self._store.save(self._zone.service, group.id, snapshot)
                return True
            except Exception:
                log.exception("%r cannot be saved", group)
                self._zone.node.count("group_save_errors")
                self._changed.add(group)
                return False

    async def run(self, interval: float) -> None:
        """Save what has changed, every ``interval`` seconds."""
        while True:
            await asyncio.sleep(interval)
            await self.save_all()

    async def save_all(self) -> None:
        for group in list(self._changed):
            await self.save(group)
