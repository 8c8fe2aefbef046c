"""Endings: groups without members go, and no message to them with them."""

from __future__ import annotations

import asyncio
import logging

from ..gateway import wire
from ..gateway.links import Link
from ..gateway.wire import NOWHERE
from .claims import give_back
from .group import Group, Home
from .saver import Saver

log = logging.getLogger(__name__)


class Ending:
    """A group that is moved to nowhere: it ends once all its gateways have switched, unless it is
    wanted before.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.waiting = set(group._links)
        self.wanted = False
        self.switched = asyncio.Event()

    def heard(self, machine: int) -> None:
        """This gateway sends no more, or is lost."""
        self.waiting.discard(machine)
        if not self.waiting:
            self.switched.set()


class Endings:
    """Those of one zone."""

    def __init__(self, zone: Home, saver: Saver) -> None:
        self._zone = zone
        self._saver = saver
        self._empty: set[Group] = set()
        self._ending: dict[int, Ending] = {}
        self._over: dict[int, asyncio.Event] = {}

    def note(self, group: Group) -> None:
        """It has members, or none."""
        if len(group):
            self._empty.discard(group)
            self.want(group)
        else:
            self._empty.add(group)

    def forget(self, group: Group) -> None:
        self._empty.discard(group)

    def want(self, group: Group) -> None:
        """Somebody has a use for it: it stays."""
        ending = self._ending.get(group.id)
        if ending is not None:
            ending.wanted = True

    def ends(self, id: int) -> bool:
        """Whether the group of this id is about to end."""
        return id in self._ending

    def switched(self, machine: int, id: int) -> None:
        ending = self._ending.get(id)
        if ending is not None:
            if machine not in ending.group._gateways:
                ending.group._unlink(machine)
            ending.heard(machine)

    def lost(self, link: Link) -> None:
        for ending in self._ending.values():
            ending.heard(link.machine)

    async def over(self, id: int) -> None:
        """Wait until a group that has ended here is free for others."""
        over = self._over.get(id)
        if over is not None:
            await over.wait()

    def look(self) -> None:
        """Begin with those whose time has come."""
        now = asyncio.get_running_loop().time()
        retiring = self._zone.state == "retiring"
        patience = 0.0 if retiring else self._zone.config.empty_timeout
        for group in list(self._empty):
            if (
                (retiring or not group._by_hand)
                and group._touched + patience <= now
                and group._mailbox.idle
                and group.id not in self._ending
                and not group._silent
                and not group._fixed
            ):
                ending = self._ending[group.id] = Ending(group)
                self._zone._spawn(self._end(ending))

    async def _end(self, ending: Ending) -> None:
        group, zone = ending.group, self._zone
        try:
            if not await self._saver.save(group):
                group._touched = asyncio.get_running_loop().time()
                return
            # What came meanwhile has said so.
            if ending.wanted or group._silent:
                return
            ending.waiting = set(group._links)
            if ending.waiting:
                for link in list(group._links.values()):
                    if not link.tell(wire.moved(group.id, NOWHERE)):
                        ending.heard(link.machine)
                await ending.switched.wait()
            if ending.wanted or group._silent or not group._mailbox.idle or len(group):
                return
        finally:
            del self._ending[group.id]
        over = self._over[group.id] = asyncio.Event()
        try:
            zone._forget(group.id, "has ended: it had no members")
            if group._name is not None:
                await give_back(group._name)
        finally:
            del self._over[group.id]
            over.set()
