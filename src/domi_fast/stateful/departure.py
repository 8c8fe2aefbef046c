"""Departure: a group on its way out of this zone (docs/stateful.md, "A group moves")."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from ..channels import LibraryChannel
from ..errors import DomiError, NameTaken, PeerLost, RegistryError
from ..gateway import wire
from ..gateway.links import Link
from ..gateway.wire import UserMessage
from ..names import Name
from . import zone_wire
from .claims import RETRY_PAUSE, give_back
from .group import Group, Home
from .openings import Openings
from .saver import Saver
from .zone_wire import Between, Transfer

log = logging.getLogger(__name__)

# Seconds for the other zone to make the group, and to claim it; its own limit is less.
ANSWER: Final = 15.0
CLAIM_BACK: Final = 20.0


class Departure:
    """One group, one way. Until MOVED is said it can be undone; from then on the group is not this
    zone's any more, and what comes for it is passed on.

    :param link: to the zone that takes it.
    :param gone: called when it cannot be undone any more.
    :param over: called at its end, if it came so far.
    """

    def __init__(
        self,
        zone: Home,
        openings: Openings,
        saver: Saver,
        group: Group,
        link: Link,
        *,
        gone: Callable[[Departure], None],
        over: Callable[[Departure], None],
    ) -> None:
        self._zone = zone
        self._openings = openings
        self._saver = saver
        self._note_gone = gone
        self._note_over = over
        self._group = group
        self._link = link
        self.id = group.id
        self.machine = link.machine
        self._waiting: set[int] = set()
        self._lost: list[int] = []
        self._told = asyncio.Event()
        """Set when nobody has to be waited for any more."""

    async def run(self) -> None:
        """All of it.

        :raises DomiError: the group stays here; or, from where the other was lost, has gone with it
        """
        group = self._group
        group._fixed = "is moving to another zone: its members cannot be changed meanwhile"
        try:
            await group._mailbox.hold()
            try:
                await self._saver.settled(group)
                await self._offer()
            except BaseException:
                group._mailbox.release()
                raise
        finally:
            group._fixed = ""
        await self._leave()

    # ------------------------------------------------------------------ what can be undone

    async def _offer(self) -> None:
        zone, group = self._zone, self._group
        version = zone.node.config.version
        content = Transfer(self.id, zone.service, version, group._packed())
        marker: Name | None = None
        released = False
        try:
            await self._ask(zone_wire.transfer(content))
            marker = await self._openings.moves.claim(str(self.id))
            zone._check_held(group)
            if group._silent or group._name is None:
                raise DomiError(f"group {self.id} {group._silent or 'is not claimed'}")
            await group._name.release()
            released = True
            await self._ask(zone_wire.simple(Between.TAKE, self.id))
        except BaseException as error:
            self._link.tell(zone_wire.simple(Between.ABORT, self.id))
            # Who cancels this closes the zone, and the group with it.
            if released and not isinstance(error, asyncio.CancelledError):
                await self._claim_back()
            raise
        finally:
            if marker is not None:
                zone._spawn(give_back(marker))

    async def _claim_back(self) -> None:
        """Who has it now gives it back, or is dead; a third zone has not kept it."""
        zone = self._zone
        end = asyncio.get_running_loop().time() + CLAIM_BACK
        while True:
            try:
                self._group._name = await self._openings.claim(self.id)
                return
            except (NameTaken, RegistryError, OSError) as error:
                if asyncio.get_running_loop().time() > end:
                    log.error("group %d could not be claimed back: %s", self.id, error)
                    zone._lose(self._group)
                    return
            await asyncio.sleep(RETRY_PAUSE)

    async def _ask(self, message: bytes) -> None:
        answer = await self._zone.node.request(
            LibraryChannel.ZONE, message, ANSWER, to=self.machine
        )
        if answer:
            reason = answer.decode("utf-8", "replace")
            raise DomiError(
                f"node {self.machine} does not take group {self.id}: {reason}", peer=self.machine
            )

    # ------------------------------------------------------------------ what cannot

    async def _leave(self) -> None:
        zone, group, link = self._zone, self._group, self._link
        # Who leaves because of a gateway that is gone does so in what is passed on.
        zone._links.check()
        gateways = dict(group._links)
        self._waiting = set(gateways)
        link.tell(zone_wire.with_machines(Between.MOVING, self.id, sorted(gateways)))
        self._note_gone(self)
        try:
            messages = group._mailbox.take_all()
            zone._forget(self.id, f"has moved to node {self.machine}")
            for message in messages:
                self.forward(message)
            for gateway in gateways.values():
                if not gateway.tell(wire.moved(self.id, self.machine)):
                    self._left(gateway.machine)
            if self._waiting and not link.lost:
                await self._told.wait()
            await link.flushed()
            if link.lost:
                raise PeerLost(
                    f"node {self.machine} was lost with group {self.id}, which it had taken",
                    peer=self.machine,
                )
            await self._ask(self._run_there())
        except asyncio.CancelledError:
            # The zone closes. Nobody knows what those know that have not switched.
            self._lost.extend(self._waiting)
            link.tell(self._run_there())
            raise
        finally:
            self._note_over(self)

    def _run_there(self) -> bytes:
        return zone_wire.with_machines(Between.RUN, self.id, self._lost)

    def forward(self, message: UserMessage) -> None:
        """Pass on what has come for the group."""
        self._link.tell(zone_wire.forward(message))

    def switched(self, machine: int) -> None:
        """This gateway sends to the other zone from now on."""
        self._waiting.discard(machine)
        if not self._waiting:
            self._told.set()

    def gateway_lost(self, machine: int) -> None:
        """Perhaps one of the group's."""
        if machine in self._waiting:
            self._left(machine)

    def zone_lost(self, link: Link) -> None:
        """Perhaps the one that takes it."""
        if link is self._link:
            self._told.set()

    def _left(self, machine: int) -> None:
        """This gateway is gone, and has not switched."""
        self._lost.append(machine)
        self.switched(machine)
