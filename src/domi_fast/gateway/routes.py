"""The ways from a gateway's clients to their groups, and back.

A route is a group as this gateway knows it: which zone has it, and which of this gateway's clients
are its members. It is made when a client first writes to the group, or when the group takes a
client in. Its zone is found by the registry; if none has the group, the one with most room is told
to make it. Messages wait until the zone has said that the group is there. Everything here belongs
to the gateway's loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from .. import (
    Context,
    DomiError,
    LibraryChannel,
    Node,
    NoSubscriber,
    Overloaded,
    PeerLost,
    encode_frame,
)
from ..errors import FrameError
from . import frames, wire
from .config import GatewayConfig
from .events import Refusal
from .finding import Finder
from .frames import Address
from .links import Link, Links
from .route import Held, Refused, Route
from .sessions import Session, Sessions
from .wire import ToGateway, ToZone
from .zones import Zones

log = logging.getLogger(__name__)


class Routes:
    """All routes of a gateway."""

    def __init__(
        self,
        node: Node,
        config: GatewayConfig,
        sessions: Sessions,
        zones: Zones,
    ) -> None:
        self._node = node
        self._config = config
        self._sessions = sessions
        self._zones = zones
        self._count = node.count
        self._held_bytes = 0
        # What waits until any zone is known at all.
        self._early: deque[tuple[Session, Address, bytes]] = deque()
        self._routes: dict[tuple[str, int], Route] = {}
        # Those that a user is a member of, or has written to.
        self._of_user: dict[int, set[Route]] = {}
        # Those that a zone has, or was asked for.
        self._placed: dict[tuple[int, int], Route] = {}
        self._links = Links(node, LibraryChannel.ZONE, self._link_lost)
        self._finder = Finder(node, config, zones, self._links, self)
        # The zones that were greeted or heard of, each by the link that it had then.
        self._greeted: dict[int, Link] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._hears: dict[int, Callable[[Link, bytes], None]] = {
            ToGateway.STATE: self._on_state,
            ToGateway.OPENED: self._on_opened,
            ToGateway.CLOSED: self._on_closed,
            ToGateway.JOIN: self._on_join,
            ToGateway.PART: self._on_part,
            ToGateway.SEND: self._on_send,
            ToGateway.BROADCAST: self._on_broadcast,
            ToGateway.REFUSED: self._on_refused,
            ToGateway.MOVED: self._on_moved,
            ToGateway.LOST: self._on_lost,
        }

    # ------------------------------------------------------------------------------ of the clients

    def send(self, session: Session, address: Address, data: bytes) -> None:
        """A client writes to a group."""
        service = self._service(address.node)
        if service is None and not len(self._zones) and self._waits(session, address, data):
            return
        if service is None:
            which = f"node {address.node}" if address.node else "this gateway"
            why = f"{which} has no groups: name the node of a service"
            self._refuse(session, address.group, address.event, Refusal.NO_SERVICE, why)
            return
        route = self._routes.get((service, address.group))
        mine: set[Route] = set()
        # What has waited may be of a session that is over.
        if self._sessions.get(session.user) is session:
            mine = self._of_user.setdefault(session.user, mine)
        if route is None or route not in mine:
            if self._has_enough(mine):
                why = f"{self._config.groups_per_client} groups are as many as a client may be in"
                self._refuse(session, address.group, address.event, Refusal.LIMIT, why)
                return
            if route is None:
                route = self._routes[service, address.group] = Route(service, address.group)
            mine.add(route)
        held = Held(session, address.event, data)
        if not route.is_open or not self._pass_on(route, held):
            self._hold(route, held)

    def _waits(self, session: Session, address: Address, data: bytes) -> bool:
        """Keep a message until a zone is known; whether there is room for it."""
        if len(self._early) >= self._config.held_limit or not self._has_room(data):
            return False
        self._held_bytes += len(data)
        self._early.append((session, address, data))
        if len(self._early) == 1:
            loop = asyncio.get_running_loop()
            self._late = loop.call_later(self._config.place_timeout, self._take_early)
        return True

    def _take_early(self) -> None:
        """A zone is known, or none has come in time."""
        self._late.cancel()
        early, self._early = self._early, deque()
        for session, address, data in early:
            self._held_bytes -= len(data)
            if self._service(address.node) is None:
                why = f"no zone was there within {self._config.place_timeout:g} s"
                self._refuse(session, address.group, address.event, Refusal.NO_SERVICE, why)
            else:
                self.send(session, address, data)

    def _has_room(self, data: bytes) -> bool:
        return self._held_bytes + len(data) <= self._config.held_bytes

    def _has_enough(self, routes: set[Route]) -> bool:
        most = self._config.groups_per_client
        if len(routes) >= most:
            routes -= {r for r in routes if self._routes.get((r.service, r.group)) is not r}
        return len(routes) >= most

    def ended(self, session: Session) -> None:
        """The session of a client is over: it leaves all its groups."""
        for route in self._of_user.pop(session.user, ()):
            if route.members.pop(session.user, None) is not None:
                self._tell(route, wire.member(ToZone.LEAVE, route.group, session.user))

    def went_away(self, session: Session) -> None:
        """The connection of a client is gone."""
        self._tell_groups(session, ToZone.AWAY)

    def came_back(self, session: Session) -> None:
        """A client that was away is there again."""
        self._tell_groups(session, ToZone.BACK)

    def _tell_groups(self, session: Session, what: ToZone) -> None:
        for route in self._of_user.get(session.user, ()):
            if session.user in route.members:
                self._tell(route, wire.member(what, route.group, session.user))

    def _service(self, node: int) -> str | None:
        if node:
            return self._zones.service_of(node)
        if self._config.service is not None:
            return self._config.service
        return self._zones.only_service or self._zones.service_of(0)

    def _refuse(self, session: Session, group: int, event: int, code: int, why: str) -> None:
        self._count("client_messages_refused")
        self._sessions.send(session, frames.refused(group, event, code, why))

    # ------------------------------------------------------------------------------ to the zones

    def _pass_on(self, route: Route, held: Held) -> bool:
        """Send it to the zone, or refuse it; whether the zone is there."""
        session = held.session
        raw = wire.message(route.group, session.user, held.event, session.identity, held.data)
        try:
            if route.link is None:
                raise PeerLost("its zone is gone")
            route.link.send(raw)
        except (PeerLost, NoSubscriber):
            # The zone is gone, and nobody has said so yet.
            self._lose(route, "its zone is gone")
            return False
        except DomiError as error:
            code = Refusal.OVERLOADED if isinstance(error, Overloaded) else Refusal.FAILED
            self._refuse(session, route.group, held.event, code, str(error))
        return True

    def _hold(self, route: Route, held: Held) -> None:
        if len(route.held) >= self._config.held_limit or not self._has_room(held.data):
            why = f"{len(route.held)} messages wait for the group to be found"
            self._refuse(held.session, route.group, held.event, Refusal.OVERLOADED, why)
            return
        self._held_bytes += len(held.data)
        route.held.append(held)
        self._look_for(route)

    def _look_for(self, route: Route) -> None:
        if route.task is None:
            # Perhaps it was given up a moment ago.
            self._routes[route.service, route.group] = route
            route.task = self._spawn(self._finder.find(route))

    def _tell(self, route: Route, message: bytes) -> None:
        """What the zone of an open route has to hear."""
        if route.is_open and route.link is not None:
            route.link.tell(message)

    # ------------------------------------------------------------------------------ for the finder

    def give_up(self, route: Route, refused: Refused) -> None:
        """Refuse what waits; the next message tries again."""
        if not route.members:
            self._drop(route)
        held, route.held = route.held, deque()
        for session, event, data in held:
            self._held_bytes -= len(data)
            self._forget(session.user, route)
            self._refuse(session, route.group, event, refused.code, str(refused))

    def put(self, route: Route, link: Link) -> None:
        """The route leads to this zone, which is asked, or has it."""
        self.take_off(route)
        route.link = link
        link.groups.add(route)
        self._placed[link.machine, route.group] = route

    def take_off(self, route: Route) -> None:
        """It leads nowhere."""
        link, route.link = route.link, None
        route.is_open = False
        if link is not None:
            link.groups.discard(route)
            if self._placed.get((link.machine, route.group)) is route:
                del self._placed[link.machine, route.group]

    def _forget(self, user: int, route: Route) -> None:
        routes = self._of_user.get(user)
        if routes is not None:
            routes.discard(route)
            if not routes:
                del self._of_user[user]

    def _drop(self, route: Route) -> None:
        self.take_off(route)
        if self._routes.get((route.service, route.group)) is route:
            del self._routes[route.service, route.group]

    # ------------------------------------------------------------------------------ of the zones

    def hear(self, context: Context) -> None:
        """A zone says something."""
        raw = context.data
        hear = self._hears.get(raw[0]) if raw else None
        # A session that came anew is another, whatever was said in the one before.
        link = self._links.of(context.sender)
        if hear is None or link is None:
            self._count("zone_messages_bad")
            return
        try:
            hear(link, raw)
        except FrameError as error:
            log.warning("node %d: %s", context.sender, error)
            self._count("zone_messages_bad")

    def _on_state(self, link: Link, raw: bytes) -> None:
        self._zones.heard(link.machine, raw[1:])
        self._greeted[link.machine] = link
        if self._early:
            self._take_early()

    def _on_opened(self, link: Link, raw: bytes) -> None:
        _, group = wire.unpack(wire.GROUP, raw)
        route = self._placed.get((link.machine, group))
        if route is not None:
            self._begin(route)

    def _begin(self, route: Route) -> None:
        """The group is there: send on what waits, in order, and what comes from now on."""
        if route.answer is not None and not route.answer.done():
            route.answer.set_result(None)
        route.is_open = True
        while route.held and route.is_open:
            held = route.held[0]
            if not self._pass_on(route, held):
                self._look_for(route)
                return
            route.held.popleft()
            self._held_bytes -= len(held.data)

    def _on_closed(self, link: Link, raw: bytes) -> None:
        _, group, code, elsewhere = wire.unpack(wire.CLOSED, raw)
        route = self._placed.get((link.machine, group))
        if route is None:
            return
        answer = code, elsewhere, wire.text(wire.CLOSED, raw)
        if route.answer is not None and not route.answer.done():
            route.answer.set_result(answer)
        elif route.is_open:
            self._lose(route, answer[2] or "its zone has it no more")

    def _on_join(self, link: Link, raw: bytes) -> None:
        _, group, user = wire.unpack(wire.MEMBER, raw)
        session = self._sessions.get(user)
        if session is None:
            link.tell(wire.member(ToZone.LEAVE, group, user))
            return
        route = self._placed.get((link.machine, group))
        if route is None:
            service = self._service_at(link.machine)
            if service is None:
                return
            route = self._routes.get((service, group))
            if route is None:
                route = self._routes[service, group] = Route(service, group)
            self.put(route, link)
        route.members[user] = session
        self._of_user.setdefault(user, set()).add(route)
        if not route.is_open:
            self._begin(route)
        if session.connection is None:
            self._tell(route, wire.member(ToZone.AWAY, group, user))

    def _service_at(self, machine: int) -> str | None:
        if machine == self._node.id:
            return self._node.config.name
        peer = self._node.peers.get(machine)
        return None if peer is None else peer.name

    def _on_part(self, link: Link, raw: bytes) -> None:
        _, group, user = wire.unpack(wire.MEMBER, raw)
        route = self._placed.get((link.machine, group))
        if route is not None and route.members.pop(user, None) is not None:
            self._forget(user, route)

    def _on_send(self, link: Link, raw: bytes) -> None:
        _, user, event = wire.unpack(wire.SEND, raw)
        session = self._sessions.get(user)
        if session is None:
            self._count("frames_for_lost_users")
            return
        self._sessions.send(session, encode_frame(event, wire.rest(wire.SEND, raw)))

    def _on_broadcast(self, link: Link, raw: bytes) -> None:
        group, event, excluded, data = wire.parse_broadcast(raw)
        route = self._placed.get((link.machine, group))
        if route is None:
            self._count("broadcasts_for_lost_groups")
            return
        self._count("broadcasts")
        self._sessions.send_all(_without(route.members, excluded), encode_frame(event, data))

    def _on_refused(self, link: Link, raw: bytes) -> None:
        _, group, user, event, code = wire.unpack(wire.REFUSED, raw)
        session = self._sessions.get(user)
        if session is not None:
            self._refuse(session, group, event, code, wire.text(wire.REFUSED, raw))

    def _on_moved(self, link: Link, raw: bytes) -> None:
        _, group, to = wire.unpack(wire.MOVED, raw)
        route = self._placed.get((link.machine, group))
        link.tell(wire.group(ToZone.SWITCHED, group))
        if route is None:
            return
        if to == wire.NOWHERE or not route.is_open:
            self._let_go(route, "it has ended")
            return
        there = self._links.of(to)
        if there is None:
            self._let_go(route, "it has moved to a node that this gateway has no connection to")
        else:
            self.put(route, there)
            route.is_open = True

    def _on_lost(self, link: Link, raw: bytes) -> None:
        _, group = wire.unpack(wire.GROUP, raw)
        route = self._placed.get((link.machine, group))
        if route is not None:
            self._let_go(route, wire.text(wire.GROUP, raw))

    # ------------------------------------------------------------------------------ losses

    def peers_changed(self) -> None:
        """Nodes have come or gone: forget the zones that have, and greet those that are new."""
        self._links.check()
        for machine in self._zone_nodes():
            if machine not in self._greeted:
                link = self._links.of(machine)
                if link is not None:
                    self._greeted[machine] = link
                    link.tell(bytes((ToZone.HELLO,)))

    def _link_lost(self, link: Link) -> None:
        """The session with a zone's node is over."""
        if self._greeted.get(link.machine) is link:
            del self._greeted[link.machine]
            self._zones.lost(link.machine)
        for route in list(link.groups):
            self._lose(route, "its zone is gone")

    def _zone_nodes(self) -> list[int]:
        return self._node.subscribers(LibraryChannel.ZONE)

    def _lose(self, route: Route, why: str) -> None:
        """The zone has the group no more."""
        log.info("group %d of service %r: %s", route.group, route.service, why)
        self._let_go(route, why)

    def _let_go(self, route: Route, why: str) -> None:
        """The group is gone from its zone: its members hear of it; what waits goes on to wait."""
        if route.answer is not None and not route.answer.done():
            route.answer.set_result((0, wire.NOWHERE, why))
        self.take_off(route)
        members, route.members = route.members, {}
        if members:
            self._count("groups_lost")
            self._sessions.send_all(iter(members.values()), frames.lost(route.group, why))
        for user in members:
            self._forget(user, route)
        if not route.held and route.task is None:
            self._drop(route)

    # ------------------------------------------------------------------------------ the end

    async def close(self, timeout: float) -> None:
        """Stop looking for groups; what zones have to hear is said first.

        :param timeout: seconds for each of the two.
        """
        if self._early:
            self._late.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout)
        flushing = [asyncio.ensure_future(link.flushed()) for link in self._links]
        if flushing:
            _, pending = await asyncio.wait(flushing, timeout=timeout)
            for waiting in pending:
                waiting.cancel()
        self._links.end()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _without(members: dict[int, Session], excluded: tuple[int, ...]) -> Iterator[Session]:
    if not excluded:
        return iter(list(members.values()))
    left = set(excluded)
    return iter([session for user, session in members.items() if user not in left])
