"""HandOver: the groups of a zone that move, in and out (docs/stateful.md, "A group moves")."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from packaging.version import Version

from .. import Context
from ..channels import LibraryChannel
from ..config import parse_version
from ..errors import DomiError, FrameError, PeerLost
from ..gateway import wire
from ..gateway.events import USER_EVENT, Refusal
from ..gateway.frames import told
from ..gateway.ids import machine_of
from ..gateway.links import Link
from ..gateway.wire import UserMessage
from ..gateway.zones import ZoneState
from ..peer import Peer
from . import snapshots, zone_wire
from .arrival import Arrival
from .claims import Closed
from .departure import Departure
from .endings import Endings
from .group import Group, Home
from .openings import Openings
from .saver import Saver
from .zone_wire import Between

log = logging.getLogger(__name__)

# Groups of a zone that retires which move at a time.
_AT_ONCE: Final = 8
# Seconds between two attempts to move what could not be moved.
_PAUSE: Final = 0.2
# Seconds for which who comes late is told where a group went.
_REMEMBERED: Final = 60.0
_ASK: Final = 2.0
# Seconds for which what a zone has said of itself is taken for true.
_FRESH: Final = 1.0


class _Answer(NamedTuple):
    until: float
    facts: ZoneState | None


def _is_stale(asking: asyncio.Task[_Answer]) -> bool:
    if not asking.done():
        return False
    return asking.cancelled() or asking.result().until <= asyncio.get_running_loop().time()


class HandOver:
    """Those of one zone."""

    def __init__(self, zone: Home, openings: Openings, endings: Endings, saver: Saver) -> None:
        self._zone = zone
        self._openings = openings
        self._endings = endings
        self._saver = saver
        self._going: dict[int, asyncio.Task[None]] = {}
        # Those that cannot be undone any more.
        self._departures: dict[int, Departure] = {}
        self._arrivals: dict[int, Arrival] = {}
        self._moved: dict[int, tuple[int, float]] = {}
        # When which of them are forgotten, in this order.
        self._forgetting: deque[tuple[float, int]] = deque()
        self._known: dict[int, tuple[Peer | None, asyncio.Task[_Answer]]] = {}

    @property
    def quiet(self) -> bool:
        """Whether no group is on its way."""
        return not self._going and not self._arrivals

    # ------------------------------------------------------------------ out

    async def begin(self, id: int, to: int | None) -> None:
        """Move one. Raises as :meth:`Zone.hand_over` says."""
        zone = self._zone
        group = zone.group(id)
        if asyncio.current_task() is group._mailbox.task:
            raise DomiError(
                f"a handler of group {id} waits for its own end: have a task of its own hand the "
                "group over"
            )
        if to is None:
            to = await self._choose()
        if to == zone.node.id:
            raise DomiError(f"group {id} is at node {to} already: name another node, or none")
        link = zone._zones.of(to)
        if link is None:
            raise PeerLost(f"node {to} is not connected: group {id} stays", peer=to)
        if zone.state not in {"serving", "retiring"}:
            raise DomiError(f"the zone is {zone.state}: group {id} does not move")
        if zone._groups.get(id) is not group or group._silent or id in self._going:
            raise DomiError(f"group {id} {group._silent or 'moves already'}")
        if self._endings.ends(id):
            raise DomiError(f"group {id} has no members and ends: it does not move")
        departure = Departure(
            zone,
            self._openings,
            self._saver,
            group,
            link,
            gone=self._departing,
            over=self._departed,
        )
        going = self._going[id] = asyncio.ensure_future(departure.run())
        going.add_done_callback(lambda done: self._gone(id, to, done))
        try:
            await asyncio.shield(going)
        except asyncio.CancelledError:
            if not going.cancelled():
                raise
            raise DomiError(
                f"the zone was closed while group {id} moved: it is at node {to}, or gone"
            ) from None

    def _gone(self, id: int, to: int, going: asyncio.Task[None]) -> None:
        if self._going.get(id) is going:
            del self._going[id]
        self._zone._changed.set()
        if not going.cancelled() and going.exception() is not None:
            self._known.pop(to, None)
            log.info("group %d was not handed over: %s", id, going.exception())

    def _departing(self, departure: Departure) -> None:
        self._departures[departure.id] = departure

    def _departed(self, departure: Departure) -> None:
        """It is over, one way or the other."""
        if self._departures.get(departure.id) is departure:
            del self._departures[departure.id]
            self.look()
            until = asyncio.get_running_loop().time() + _REMEMBERED
            self._moved[departure.id] = (departure.machine, until)
            self._forgetting.append((until, departure.id))

    def look(self) -> None:
        """Forget where groups have gone whose time is over."""
        now = asyncio.get_running_loop().time()
        while self._forgetting and self._forgetting[0][0] <= now:
            until, id = self._forgetting.popleft()
            # It may have come and gone again since.
            if self._moved.get(id, (0, 0.0))[1] == until:
                del self._moved[id]

    async def _choose(self) -> int:
        """The machine id of the zone that is best to move to."""
        zone = self._zone
        own = parse_version(zone.node.config.version)
        machines = [
            each for each in zone.node.subscribers(LibraryChannel.ZONE) if each != zone.node.id
        ]
        asked = [self._facts_of(machine) for machine in machines]
        best: tuple[Version, float, int] | None = None
        for facts in await asyncio.gather(*asked):
            if facts is None or facts.service != zone.service or not facts.open:
                continue
            rank = (facts.version, -facts.memory, facts.machine)
            if rank[0] >= own and (best is None or rank > best):
                best = rank
        if best is None:
            raise DomiError(
                f"no other zone of {zone.service!r}, of {len(machines)} zones that were asked, "
                f"takes groups of version {own}"
            )
        return best[2]

    async def _facts_of(self, machine: int) -> ZoneState | None:
        """What the zone there says of itself, or has said not long ago; None: nothing of use."""
        peer = self._zone.node.peers.get(machine)
        session, asking = self._known.get(machine, (None, None))
        if asking is None or session is not peer or _is_stale(asking):
            asking = self._zone._spawn(self._ask(machine))
            self._known[machine] = (peer, asking)
        # Others wait for it too, and it ends with the zone.
        await asyncio.wait([asking])
        return None if asking.cancelled() else asking.result().facts

    async def _ask(self, machine: int) -> _Answer:
        facts = None
        # Whatever a stranger has said.
        with contextlib.suppress(DomiError, ArithmeticError):
            request = self._zone.node.request(
                LibraryChannel.ZONE, bytes((Between.ASK,)), _ASK, to=machine
            )
            facts = ZoneState.decode(machine, await request)
        return _Answer(asyncio.get_running_loop().time() + _FRESH, facts)

    async def empty(self, done: Callable[[], bool]) -> None:
        """Wait until the zone is; move its groups away meanwhile, where it does that."""
        zone = self._zone
        told: set[int] = set()
        while not done():
            if zone.config.roll == "hand_over":
                await self._move_all(told)
            if done():
                return
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(zone._changed.wait(), _PAUSE)
            await asyncio.sleep(0)

    async def _move_all(self, told: set[int]) -> None:
        """Try it once.

        :param told: the groups whose failure is logged.
        """
        zone = self._zone
        ids = iter([id for id, group in zone._groups.items() if len(group) and not group._silent])

        async def some() -> None:
            for id in ids:
                await self._try(id, told)

        await asyncio.gather(*[some() for _ in range(_AT_ONCE)])

    async def _try(self, id: int, told: set[int]) -> None:
        # What cannot be moved stays until its users leave; why is logged by then.
        try:
            await self.begin(id, None)
        except DomiError:
            return
        except Exception:  # of the group's save()
            if id not in told:
                told.add(id)
                log.exception("group %d cannot be moved", id)

    # ------------------------------------------------------------------ what other zones say

    def heard(self, link: Link, context: Context, data: bytes) -> None:
        """A message that is no gateway's.

        :raises FrameError: or nobody's.
        """
        what = data[0]
        if what == Between.FORWARD:
            self._forwarded(zone_wire.parse_forward(data))
        elif what == Between.ASK:
            context.reply(json.dumps(self._zone.facts()).encode())
        elif what == Between.TRANSFER:
            answer = self._transferred(link, zone_wire.parse_transfer(data))
            context.reply(answer.encode("utf-8", "replace"))
        elif what in (Between.MOVING, Between.RUN):
            id, machines = zone_wire.parse_machines(data)
            arrival = self._arrivals.get(id)
            known = arrival is not None and arrival.origin is link
            if known and arrival is not None:
                if what == Between.RUN:
                    del self._arrivals[id]
                    arrival.run(machines)
                else:
                    arrival.moving(machines)
            # A zone that closes does not ask.
            if what == Between.RUN and context.is_request:
                context.reply(b"" if known else b"it is not on its way here")
        elif what in (Between.TAKE, Between.ABORT):
            _, id = wire.unpack(wire.GROUP, data)
            arrival = self._arrivals.get(id)
            if arrival is None or arrival.origin is not link:
                if what == Between.TAKE:
                    context.reply(b"it is not on its way here")
            elif what == Between.TAKE:
                self._zone._spawn(arrival.take(context))
            else:
                del self._arrivals[id]
                arrival.abort()
        else:
            raise FrameError(f"a message of kind {what}, which zones do not know")

    def _transferred(self, link: Link, content: zone_wire.Transfer) -> str:
        """Make the group; the reason why not, or nothing."""
        zone, id = self._zone, content.group
        own = zone.node.config.version
        if content.service != zone.service:
            return f"this zone is one of {zone.service!r}"
        if parse_version(content.version) > parse_version(own):
            return f"version {own} is older"
        # It was there before: that is over, only its last word is still on the way.
        self._departures.pop(id, None)
        if id in zone._groups:
            return "there is such a group here"
        closed = zone._closed_to(id)
        if closed is not None:
            return str(closed)
        try:
            snapshot = snapshots.unpack(content.snapshot)
            group = zone._make(id)
            group._adopt(snapshot)
        except Exception as error:
            log.exception("group %d cannot be made for another zone", id)
            zone._forget(id, "could not be made")
            return told(error)
        self._moved.pop(id, None)
        self._arrivals[id] = Arrival(zone, self._openings, self._endings, group, link)
        return ""

    def _forwarded(self, message: UserMessage) -> None:
        arrival = self._arrivals.get(message.group)
        group = self._zone._groups.get(message.group)
        if arrival is not None:
            arrival.passed_on(message)
        elif group is not None:
            group._mailbox.put(message)
        elif not self.passed_on(message) and message.event >= USER_EVENT:
            link = self._zone._links.of(machine_of(message.user))
            if link is not None:
                id, user, event, _, _ = message
                reason = "the group has ended meanwhile"
                link.offer(wire.refused(id, user, event, Refusal.NO_GROUP, reason))

    # ------------------------------------------------------------------ what gateways say

    def opened(self, link: Link, id: int) -> bool:
        """A gateway asks for a group; whether it is one that moves, or has."""
        arrival, departure = self._arrivals.get(id), self._departures.get(id)
        if arrival is not None:
            arrival.asked(link)
        elif departure is not None:
            link.tell(Closed(0, departure.machine, "it moves there").answer(id))
        elif id not in self._zone._groups and id not in self._openings:
            machine = self._place(id)
            if machine is None:
                return False
            link.tell(Closed(0, machine, "it has moved there").answer(id))
        else:
            return False
        return True

    def passed_on(self, message: UserMessage) -> bool:
        """Send it after a group that has moved; whether it has."""
        departure = self._departures.get(message.group)
        if departure is not None:
            departure.forward(message)
            return True
        machine = self._place(message.group)
        link = None if machine is None else self._zone._zones.of(machine)
        return link is not None and link.tell(zone_wire.forward(message))

    def switched(self, machine: int, id: int) -> None:
        departure = self._departures.get(id)
        if departure is not None:
            departure.switched(machine)

    def gateway_lost(self, link: Link) -> None:
        for departure in list(self._departures.values()):
            departure.gateway_lost(link.machine)

    def zone_lost(self, link: Link) -> None:
        for departure in list(self._departures.values()):
            departure.zone_lost(link)
        for id, arrival in list(self._arrivals.items()):
            if arrival.origin is link:
                del self._arrivals[id]
                arrival.origin_lost()

    def forget(self, group: Group) -> None:
        """It is not the zone's any more."""
        arrival = self._arrivals.get(group.id)
        if arrival is not None and arrival.group is group:
            del self._arrivals[group.id]
            arrival.lost()

    def _place(self, id: int) -> int | None:
        """Where the group has moved to, if that is not long ago and the node is there."""
        machine, until = self._moved.get(id, (None, 0.0))
        if machine is None:
            return None
        if until < asyncio.get_running_loop().time() or machine not in self._zone.node.peers:
            del self._moved[id]
            return None
        return machine

    # ------------------------------------------------------------------ the end

    async def end(self, timeout: float) -> None:
        """Wait for those that go; what comes and can be undone is not taken."""
        for id, arrival in list(self._arrivals.items()):
            del self._arrivals[id]
            arrival.give_up()
        if self._going:
            going = list(self._going.values())
            _, pending = await asyncio.wait(going, timeout=timeout)
            for task in pending:
                task.cancel()
            if pending:
                await asyncio.wait(pending)
