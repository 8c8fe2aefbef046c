"""Saver: puts the snapshots of a zone's groups into its store."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from .group import Group, Home

# Snapshots that the store is given at a time.
_AT_ONCE: Final = 16

log = logging.getLogger(__name__)


class Saver:
    """Knows which groups have changed since they were saved: those that have run a handler."""

    def __init__(self, zone: Home) -> None:
        self._zone = zone
        self._store = zone.config.snapshots
        self._changed: set[Group] = set()
        # A group is saved once at a time, or the older might win.
        self._locks: dict[Group, asyncio.Lock] = {}
        self._slots = asyncio.Semaphore(_AT_ONCE)

    def note(self, group: Group) -> None:
        if self._store is not None:
            self._changed.add(group)

    def forget(self, group: Group) -> None:
        self._changed.discard(group)
        self._locks.pop(group, None)

    async def settled(self, group: Group) -> None:
        """Wait until the group is not being saved."""
        lock = self._locks.get(group)
        if lock is not None:
            async with lock:
                pass

    async def save(self, group: Group) -> bool:
        """Save it if it has changed. Whether it is saved, or nothing is to be."""
        if self._store is None or group not in self._changed:
            return True
        async with self._locks.setdefault(group, asyncio.Lock()):
            # A group that moves is the other zone's to save, if it goes.
            if group not in self._changed or group._fixed:
                return not group._fixed
            try:
                await group._mailbox.hold()
                try:
                    if self._gone(group):
                        return True
                    snapshot = group._packed()
                    self._changed.discard(group)
                finally:
                    group._mailbox.release()
                async with self._slots:
                    if self._gone(group):
                        return True
                    await self._store.save(self._zone.service, group.id, snapshot)
                return True
            except Exception:
                log.exception("%r cannot be saved", group)
                self._zone.node.count("group_save_errors")
                if not self._gone(group):
                    self._changed.add(group)
                return False

    def _gone(self, group: Group) -> bool:
        """Whether it is not the zone's any more, and its snapshot another's to write."""
        return self._zone._groups.get(group.id) is not group

    async def run(self, interval: float) -> None:
        """Save what has changed, every ``interval`` seconds."""
        while True:
            await asyncio.sleep(interval)
            for group in list(self._changed):
                lock = self._locks.get(group)
                if lock is None or not lock.locked():
                    self._zone._spawn(self.save(group))

    async def save_all(self) -> None:
        await asyncio.gather(*[self.save(group) for group in list(self._changed)])
