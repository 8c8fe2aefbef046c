"""Arrival: a group on its way into this zone (docs/stateful.md, "A group moves")."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from .. import Context
from ..errors import DomiError, NameTaken, RegistryError
from ..gateway import wire
from ..gateway.events import USER_EVENT, Refusal
from ..gateway.links import Link
from ..gateway.wire import NOWHERE, ToGateway, UserMessage
from ..names import Name
from .claims import RETRY_PAUSE, Closed, give_back
from .endings import Endings
from .group import Group, Home
from .mailbox import Backlog
from .openings import Openings

_CLAIM: Final = 8.0


class Arrival:
    """A group that runs nothing yet. In its mailbox is what the zone that it comes from passes on;
    what gateways send here waits beside it, because it comes behind that.

    :param origin: the link to that zone.
    :ivar group: what arrives.
    """

    def __init__(
        self, zone: Home, openings: Openings, endings: Endings, group: Group, origin: Link
    ) -> None:
        self._zone = zone
        self._openings = openings
        self._endings = endings
        self.group = group
        self.origin = origin
        self._name: Name | None = None
        self._aborted = False
        self._moving = False
        self._direct = Backlog(zone.config.mailbox_limit, zone.config.mailbox_bytes)
        self._asked: list[Link] = []
        group._silent = "is on its way from another zone: its handlers run soon"
        group._detour = self._hold
        for machine in group.gateways:
            link = zone._links.of(machine)
            if link is not None:
                group._note_gateway(link)

    async def take(self, context: Context) -> None:
        """Claim the group's name, which the other zone has released."""
        refusal = b"it was given up"
        end = asyncio.get_running_loop().time() + _CLAIM
        while refusal and not self._aborted and asyncio.get_running_loop().time() < end:
            refusal = await self._claim()
            if refusal:
                await asyncio.sleep(RETRY_PAUSE)
        with contextlib.suppress(DomiError):
            context.reply(refusal)

    async def _claim(self) -> bytes:
        """Try it once; what has prevented it, or nothing."""
        try:
            name = await self._openings.claim(self.group.id)
        except (NameTaken, RegistryError, OSError) as error:
            return str(error).encode()
        if self._aborted:  # meanwhile
            self._zone._spawn(give_back(name))
            return b"it was given up"
        self._name = self.group._name = name
        return b""

    def asked(self, link: Link) -> None:
        """A gateway wants to send to the group; it may, once that cannot be undone any more."""
        if self._moving:
            self._opened(link)
        else:
            self._asked.append(link)

    def moving(self, machines: tuple[int, ...]) -> None:
        """The other zone has told these gateways to send here."""
        self._moving = True
        for machine in machines:
            link = self._zone._links.of(machine)
            if link is not None:
                self.group._note_gateway(link)
        for link in self._asked:
            self._opened(link)
        self._asked.clear()

    def passed_on(self, message: UserMessage) -> None:
        """What the other zone had when the group moved, and what it still gets."""
        self.group._mailbox.extend([message])

    def run(self, lost: tuple[int, ...] = ()) -> None:
        """All is here.

        :param lost: gateways that the other zone has lost before they sent here: nobody knows what
            they know.
        """
        zone, group = self._zone, self.group
        self.moving(())
        for machine in lost:
            link = zone._links.of(machine)
            if link is not None and machine in group._gateways:
                link.tell(wire.group(ToGateway.LOST, group.id, "its gateway was lost by its zone"))
            group._unlink(machine)
            group._lose(machine)
        for machine in group.gateways:
            if zone._links.of(machine) is None:
                group._lose(machine)
        group._mailbox.extend(self._direct)
        zone._note_changed(group)
        group._open()
        self._endings.note(group)
        zone._changed.set()

    def abort(self) -> None:
        """The other zone keeps it."""
        zone, group = self._zone, self.group
        self._aborted = True
        if self._name is not None:
            zone._spawn(give_back(self._name))
        zone._forget(group.id, "stays where it was")
        for link in self._asked:
            closed = Closed(0, self.origin.machine, "it is in another zone")
            link.tell(closed.answer(group.id))
        for message in self._direct:
            group._refuse(message, Refusal.OVERLOADED, "the group was about to move, and stays")

    def lost(self) -> None:
        """The group is not the zone's any more: another has its name."""
        self._aborted = True
        for link in self._asked:
            link.tell(Closed(0, NOWHERE, "another zone has it: ask again").answer(self.group.id))
        for message in self._direct:
            self.group._refuse_gone(message)

    def give_up(self) -> None:
        """This zone closes: it is not taken, or lost as the zone's others are."""
        if not self._moving:
            self.abort()

    def origin_lost(self) -> bool:
        """Run with what there is, if the group is this zone's by now. Whether it is."""
        if self._name is None:
            self.abort()
            return False
        self.group._join_all()
        self.run()
        return True

    def _opened(self, link: Link) -> None:
        if link.alive:
            self.group._note_gateway(link)
            link.tell(wire.group(ToGateway.OPENED, self.group.id))

    def _hold(self, message: UserMessage) -> None:
        if message.event >= USER_EVENT and self._direct.full:
            self.group._refuse(message, Refusal.OVERLOADED, self._direct.full)
        else:
            self._direct.append(message)
