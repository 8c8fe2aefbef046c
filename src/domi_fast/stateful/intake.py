"""Intake: what gateways say to a zone, and what becomes of it."""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from typing import Final

from .. import Context
from ..errors import FrameError
from ..gateway import wire
from ..gateway.events import USER_EVENT, LibraryEvent, Refusal
from ..gateway.links import Link
from ..gateway.wire import ToGateway, ToZone, UserMessage
from .endings import Endings
from .group import Home
from .hand_over import HandOver
from .openings import Openings

log = logging.getLogger(__name__)

_EVENTS: Final = {
    ToZone.LEAVE: LibraryEvent.LEAVE,
    ToZone.AWAY: LibraryEvent.AWAY,
    ToZone.BACK: LibraryEvent.BACK,
}


class Intake:
    """Of one zone. What other zones say is passed on to its :class:`HandOver`."""

    def __init__(
        self, zone: Home, openings: Openings, endings: Endings, hand_over: HandOver
    ) -> None:
        self._zone = zone
        self._openings = openings
        self._endings = endings
        self._hand_over = hand_over
        self._takes: dict[int, Callable[[Link, bytes], None]] = {
            ToZone.HELLO: self._hello,
            ToZone.OPEN: self._open,
            ToZone.MESSAGE: self._message,
            ToZone.LEAVE: self._member,
            ToZone.AWAY: self._member,
            ToZone.BACK: self._member,
            ToZone.SWITCHED: self._switched,
        }

    def heard(self, context: Context) -> None:
        zone = self._zone
        data = context.data
        try:
            if not data:
                raise FrameError("an empty message")
            take = self._takes.get(data[0])
            link = (zone._zones if take is None else zone._links).of(context.sender)
            if link is None:
                return  # its session has ended meanwhile
            if take is not None:
                take(link, data)
            else:
                self._hand_over.heard(link, context, data)
        except (FrameError, ValueError, struct.error) as error:
            zone.node.count("zone_messages_bad")
            log.warning("node %d says to the zone what it may not: %s", context.sender, error)

    def _hello(self, link: Link, data: bytes) -> None:
        link.tell(self._zone._described())

    def _open(self, link: Link, data: bytes) -> None:
        zone = self._zone
        _, id = wire.unpack(wire.OPEN, data)
        if self._hand_over.opened(link, id):
            return
        group = zone._groups.get(id)
        if group is not None and group._name is not None and group._name.lost.is_set():
            zone._lose(group)
            group = None
        if group is None or id in self._openings:
            self._openings.ask(link, id)
            return
        self._endings.want(group)
        group._note_gateway(link)
        link.tell(wire.group(ToGateway.OPENED, id))

    def _message(self, link: Link, data: bytes) -> None:
        message = wire.parse_message(data)
        if message.event >= USER_EVENT:
            self._deliver(link, message)
            return
        # A user who says LEAVE itself, or what only the library says.
        id, user, event, _, _ = message
        reason = f"events below {USER_EVENT} are the library's"
        link.offer(wire.refused(id, user, event, Refusal.NO_HANDLER, reason))

    def _member(self, link: Link, data: bytes) -> None:
        what, id, user = wire.unpack(wire.MEMBER, data)
        self._deliver(link, UserMessage(id, user, _EVENTS[what], b"", b""))

    def _deliver(self, link: Link, message: UserMessage) -> None:
        zone = self._zone
        group = zone._groups.get(message.group)
        if group is None:
            self._stray(link, message)
            return
        if group._name is not None and group._name.lost.is_set():
            zone._lose(group)
            group._refuse_gone(message)
            return
        self._endings.want(group)
        group._take(link, message)

    def _stray(self, link: Link, message: UserMessage) -> None:
        """A message for a group that is not here."""
        if self._hand_over.passed_on(message):
            return
        if message.event in _EVENTS.values():
            return
        id, user, event, _, _ = message
        reason = f"group {id} is not in this zone"
        link.tell(wire.group(ToGateway.LOST, id, reason))
        link.offer(wire.refused(id, user, event, Refusal.NO_GROUP, reason))

    def _switched(self, link: Link, data: bytes) -> None:
        _, id = wire.unpack(wire.GROUP, data)
        self._hand_over.switched(link.machine, id)
        self._endings.switched(link.machine, id)
