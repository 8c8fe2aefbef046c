"""A watch in ZooKeeper: a look at what its own one-shot watches have told of.

ZooKeeper tells that a node has changed, once, and not how. Each look sets the watches again in the
same call that reads, so that no change falls between the two. When the connection was lost, and
all watches with it, everything is looked at anew: a Reset.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from .base import Delete, Put, Reset, Version
from .link import PAUSE, Away, Link
from .remote import Ending
from .watching import OpenedWatch, Watched
from .zookeeper_nodes import Tree, decoded, encoded, entry, names_of, nodes, snapshot
from .zookeeper_session import Session


class WatchedZooKeeper(Watched, Protocol):
    """What a watch needs of its registry, which passes on what the session is told.

    :ivar watches: those that have not ended.
    """

    link: Link[Session]
    tree: Tree
    watches: set[Ending]


class ZooKeeperWatch(OpenedWatch):
    """See :class:`~domi_fast.registry.base.Watch`. Its cursors mean nothing."""

    def __init__(self, registry: WatchedZooKeeper, prefix: str) -> None:
        super().__init__(registry)
        self._registry = registry
        self._prefix = prefix
        self._begin = encoded(prefix)
        self._news = asyncio.Event()
        # The version of each node at the last look; None until there was one.
        self._seen: dict[str, Version] | None = None
        # What has changed since then: these nodes, and whether names have come or gone.
        self._changed: set[str] = set()
        self._listing = False
        self._losses = 0
        registry.watches.add(self)

    def told(self, path: str | None) -> None:
        """On the loop: this node has changed; with None, the connection was lost."""
        if path is None:
            self._losses += 1
            self._seen = None
        elif path == self._registry.tree.keys:
            self._listing = True
        else:
            name = path.rpartition("/")[2]
            if not name.startswith(self._begin):
                return
            self._changed.add(name)
        self._news.set()

    def end(self) -> None:
        super().end()
        self._registry.watches.discard(self)
        self._news.set()

    async def _more(self) -> None:
        self._news.clear()
        try:
            if self._seen is None:
                await self._reset()
            elif self._changed or self._listing:
                await self._look(self._seen)
            else:
                await self._news.wait()
        except Away:
            if not self.over:
                await asyncio.sleep(PAUSE)

    async def _reset(self) -> None:
        losses = self._losses
        self._changed.clear()
        self._listing = False
        tree = self._registry.tree
        found = await self._registry.link.call(
            lambda c: snapshot(c, tree, self._prefix, c.on_change), again=True
        )
        if losses == self._losses and not self.over:
            self._seen = {encoded(e.key): e.version for e in found.entries}
            self.events.append(Reset(found))

    async def _look(self, seen: dict[str, Version]) -> None:
        changed, self._changed = self._changed, set()
        listing, self._listing = self._listing, False
        try:
            names, found = await self._registry.link.call(
                lambda c: self._read(c, seen, changed, listing), again=True
            )
        except BaseException:
            self._changed |= changed
            self._listing |= listing
            raise
        if self._seen is not seen or self.over:
            return  # the connection was lost meanwhile
        gone = {name for name, node in found.items() if node is None}
        if names is not None:
            gone |= seen.keys() - names
        for name in sorted(gone & seen.keys()):
            del seen[name]
            self.events.append(Delete(decoded(name), None))
        there = [(name, *node) for name, node in found.items() if node is not None]
        for name, data, stat in sorted(there, key=lambda each: each[2].mzxid):
            put = entry(name, data, stat)
            if seen.get(name) != put.version:
                seen[name] = put.version
                self.events.append(Put(put, None))

    def _read(
        self, session: Session, seen: dict[str, Version], changed: set[str], listing: bool
    ) -> tuple[set[str] | None, dict[str, Any]]:
        """The names that there are, if they were asked for; nodes that may have changed. Blocks."""
        tree, names = self._registry.tree, None
        wanted = set(changed)
        if listing:
            listed = names_of(session, tree, session.on_change)
            names = {name for name in listed if name.startswith(self._begin)}
            wanted |= names - seen.keys()
        return names, dict(nodes(session, tree, list(wanted), session.on_change))
