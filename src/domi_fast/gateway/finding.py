"""Which zone has a group, or is to make it."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Final, Protocol

from .. import DomiError, LibraryChannel, Node
from . import wire
from .config import GatewayConfig
from .events import Refusal
from .links import Link, Links
from .route import Refused, Route, is_open
from .wire import ToZone
from .zones import Zones, kind_of

log = logging.getLogger(__name__)

_PAUSE: Final = 0.05
_LATEST_PAUSE: Final = 0.5


class Owner(Protocol):
    """Whose routes they are."""

    def put(self, route: Route, link: Link) -> None:
        """The route leads to this zone, which is asked."""

    def take_off(self, route: Route) -> None:
        """It leads nowhere."""

    def give_up(self, route: Route, refused: Refused) -> None:
        """Refuse what waits for it."""


class Finder:
    """Finds zones for the routes of one gateway. Belongs to its loop."""

    def __init__(
        self, node: Node, config: GatewayConfig, zones: Zones, links: Links, routes: Owner
    ) -> None:
        self._node = node
        self._config = config
        self._zones = zones
        self._links = links
        self._routes = routes

    async def find(self, route: Route) -> None:
        """Have the group opened by a zone, or refuse what waits for it."""
        try:
            await asyncio.wait_for(self._open(route), self._config.place_timeout)
        except asyncio.TimeoutError:
            self._routes.give_up(route, self._why_late(route))
        except Refused as refused:
            self._routes.give_up(route, refused)
        except Exception as error:
            log.exception("group %d of service %r: it cannot be found", route.group, route.service)
            self._routes.give_up(route, Refused(Refusal.FAILED, str(error)))
        finally:
            route.task = None

    def _why_late(self, route: Route) -> Refused:
        seconds = f"within {self._config.place_timeout:g} s"
        if not self._zones.of(route.service):
            return Refused(
                Refusal.NO_SERVICE, f"no zone of service {route.service!r} was there {seconds}"
            )
        return Refused(Refusal.TIMEOUT, f"no zone has opened group {route.group} {seconds}")

    async def _open(self, route: Route) -> None:
        full: set[int] = set()
        pause = _PAUSE
        while not is_open(route):
            machine = await self._holder(route)
            if is_open(route):  # a zone has made it meanwhile, and has taken a client in
                return
            if machine is None:
                machine = self._place(route, full)
            if machine is not None:
                answer = await self._ask(route, machine)
                if answer is None:
                    continue
                code, _, why = answer
                if code == Refusal.FULL:
                    full.add(machine)
                    if self._zones.place(route.service, full) is None:
                        raise Refused(code, why)
                    continue
                if code:
                    raise Refused(code, why)
            # Its holder has died, and keeps it until its lease ends; or is about to change.
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LATEST_PAUSE)

    async def _holder(self, route: Route) -> int | None:
        """The machine id of the node that the registry has for the group, which may be gone."""
        names = self._node.cluster.names(kind_of(route.service))
        try:
            holder = await names.find(str(route.group))
        except (DomiError, OSError) as error:
            log.warning("group %d cannot be looked for: %s", route.group, error)
            return -1
        return None if holder is None else holder.id

    def _place(self, route: Route, full: set[int]) -> int | None:
        """The machine id of the zone that is to make the group; None for none yet.

        :raises Refused: all zones are full.
        """
        state = self._zones.place(route.service, full)
        if state is not None:
            return state.machine
        # One that makes none on demand says so.
        others = [each for each in self._zones.newest(route.service) if not each.full]
        if others and not full:
            return others[0].machine
        if self._zones.is_full(route.service) or full:
            count = len(self._zones.of(route.service))
            raise Refused(
                Refusal.FULL,
                f"the zones of service {route.service!r} ({count}) have no room for another group: "
                "try again later",
            )
        return None

    async def _ask(self, route: Route, machine: int) -> tuple[int, int, str] | None:
        """Have a zone open the group; None when it has, otherwise what it says instead."""
        is_there = machine in self._node.subscribers(LibraryChannel.ZONE)
        link = self._links.of(machine) if is_there else None
        if link is None:
            return 0, wire.NOWHERE, "its node is not connected"
        self._routes.put(route, link)
        route.answer = asyncio.get_running_loop().create_future()
        try:
            link.tell(wire.group(ToZone.OPEN, route.group))
            return await route.answer
        finally:
            route.answer = None
            if not route.is_open:
                self._routes.take_off(route)
