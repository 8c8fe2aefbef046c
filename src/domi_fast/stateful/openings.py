"""Openings: how a group comes to be in a zone, once in the whole cluster."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine
from typing import Any, Final

from ..errors import DomiError, NameTaken, RegistryError
from ..gateway import wire
from ..gateway.events import Refusal
from ..gateway.frames import told
from ..gateway.links import Link
from ..gateway.wire import NOWHERE, ToGateway
from ..gateway.zones import kind_of
from ..names import Name
from . import snapshots
from .claims import RETRY_PAUSE, Closed, give_back
from .endings import Endings
from .group import Group, Home

log = logging.getLogger(__name__)

# A zone that was killed has its groups until its lease is over.
DEAD_HOLDER: Final = 4.0


class Openings:
    """What a zone is about to have, and who waits for it.

    A group is claimed in the registry under its id. Who has claimed it looks whether it is on its
    way from one zone to another at that moment, when its name may be free for an instant: then it
    is given back at once.
    """

    def __init__(self, zone: Home, endings: Endings) -> None:
        self._zone = zone
        self._endings = endings
        self._waiting: dict[int, list[Link]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __contains__(self, id: int) -> bool:
        return id in self._waiting

    def __len__(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        """The node has started: it can be asked for names."""
        kind = kind_of(self._zone.service)
        cluster = self._zone.node.cluster
        self.names = cluster.names(kind)
        self.moves = cluster.names(f"handovers.{kind}")
        self._value = json.dumps({"zone": str(self._zone.id)}).encode()

    async def claim(self, id: int) -> Name:
        """The name of a group, as it stands in the registry. Raises as ``Names.claim`` does."""
        return await self.names.claim(str(id), self._value)

    def ask(self, link: Link, id: int) -> None:
        """A gateway wants a group that is not here yet."""
        if id not in self._waiting:
            closed = self._zone._closed_to(id)
            if closed is not None:
                link.tell(closed.answer(id))
                return
            self._begin(id, self._on_demand(id))
        self._waiting[id].append(link)

    def by_hand(self, group: Group) -> None:
        """The program has made a group: claim it, and open it then."""
        group._claimed = asyncio.get_running_loop().create_future()
        # Nobody need ask for it.
        group._claimed.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._begin(group.id, self._claim_made(group))

    async def settled(self) -> None:
        """Wait for those that are under way."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def end(self) -> None:
        """Open nothing more."""
        for task in self._tasks:
            task.cancel()
        await self.settled()

    def _begin(self, id: int, making: Coroutine[Any, Any, Group]) -> None:
        self._waiting[id] = []
        task = asyncio.ensure_future(self._open(id, making))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _open(self, id: int, making: Coroutine[Any, Any, Group]) -> None:
        closed = Closed(Refusal.FULL, NOWHERE, "the zone closes")
        group = None
        try:
            group = await making
        except Closed as error:
            closed = error
        except (RegistryError, OSError) as error:
            closed = Closed(Refusal.TIMEOUT, NOWHERE, f"the registry cannot be asked: {error}")
        except DomiError as error:
            closed = Closed(Refusal.FAILED, NOWHERE, str(error))
        except Exception as error:
            log.exception("group %d cannot be opened", id)
            closed = Closed(Refusal.FAILED, NOWHERE, told(error))
        finally:
            for link in self._waiting.pop(id):
                if not link.alive:
                    continue
                if group is None:
                    link.tell(closed.answer(id))
                else:
                    group._note_gateway(link)
                    link.tell(wire.group(ToGateway.OPENED, id))
        if group is not None:
            group._open()
            self._zone._changed.set()

    async def _on_demand(self, id: int) -> Group:
        zone = self._zone
        await self._endings.over(id)
        try:
            name = await self.claim(id)
        except NameTaken as taken:
            holder = taken.holder.id
            own = holder in (-1, zone.node.id)
            raise Closed(0, NOWHERE if own else holder, str(taken)) from None
        try:
            if await self.moves.find(str(id)) is not None:
                raise Closed(0, NOWHERE, f"group {id} is moving: ask again")
            stored = None
            if zone.config.snapshots is not None:
                stored = await self._stored(id)
            closed = zone._closed_to(id, opening=True)
            if closed is not None:
                raise closed
            try:
                group = zone._make(id)
                if stored is not None:
                    group.load(stored.state)
                    group._loaded = True
            except Exception as error:
                log.exception("zone %s cannot make group %d", zone.service, id)
                zone._forget(id, "could not be made")
                raise Closed(Refusal.FAILED, NOWHERE, told(error)) from None
        except BaseException:
            zone._spawn(give_back(name))
            raise
        group._name = name
        # Of a snapshot that the factory has restored.
        group._join_all()
        return group

    async def _stored(self, id: int) -> snapshots.Snapshot | None:
        store = self._zone.config.snapshots
        assert store is not None
        try:
            data = await store.load(self._zone.service, id)
            return None if data is None else snapshots.unpack(data)
        except Exception as error:
            # Without it the group would begin anew, and be saved over what there is.
            log.exception("the snapshot of group %d cannot be loaded", id)
            raise Closed(
                Refusal.FAILED, NOWHERE, f"its snapshot cannot be loaded: {error}"
            ) from None

    async def _claim_made(self, group: Group) -> Group:
        claimed = group._claimed
        assert claimed is not None
        try:
            name = await self._claim_patiently(group.id)
            try:
                if not group._loaded and self._zone.config.snapshots is not None:
                    stored = await self._stored(group.id)
                    if stored is not None:
                        group.load(stored.state)
            except BaseException:
                self._zone._spawn(give_back(name))
                raise
        except BaseException as error:
            self._zone._forget(group.id, f"could not be claimed: {error}")
            if not claimed.done():
                if isinstance(error, asyncio.CancelledError):
                    claimed.cancel()
                else:
                    claimed.set_exception(error)
            if isinstance(error, NameTaken):
                log.error("group %d is made by hand and is another's: %s", group.id, error)
                raise Closed(0, error.holder.id, str(error)) from None
            raise
        group._name = name
        group._silent = ""
        group._join_all()
        if not claimed.done():
            claimed.set_result(None)
        return group

    async def _claim_patiently(self, id: int) -> Name:
        """Wait for one who is dead by all appearances, and for the end of a move."""
        loop, node = asyncio.get_running_loop(), self._zone.node
        end = loop.time() + DEAD_HOLDER + node.config.lease_ttl
        while True:
            try:
                name = await self.claim(id)
            except NameTaken as taken:
                if taken.holder.id in node.peers or loop.time() > end:
                    raise
            else:
                try:
                    moves = await self.moves.find(str(id)) is not None
                except BaseException:
                    self._zone._spawn(give_back(name))
                    raise
                if not moves:
                    return name
                await give_back(name)
            await asyncio.sleep(RETRY_PAUSE)
