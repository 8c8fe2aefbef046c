"""A small gateway that speaks docs/protocol.md, "Gateways and zones", and keeps all that it hears.

Where a zone says what its state does not allow, it notes a fault: so it is an oracle, too.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from domi_fast import Context, DomiError, LibraryChannel, Names, Node
from domi_fast.gateway import wire
from domi_fast.gateway.events import Refusal
from domi_fast.gateway.ids import Ids
from domi_fast.gateway.wire import NOWHERE, ToGateway, ToZone
from domi_fast.gateway.zones import kind_of
from domi_fast.stateful import Zone
from tests.support import until


class Heard(NamedTuple):
    """What a user has got."""

    event: int
    data: bytes


class Refused(NamedTuple):
    group: int
    event: int
    code: Refusal
    reason: str


class Way:
    """Where a group is, as far as this gateway knows."""

    def __init__(self) -> None:
        self.zone: int | None = None
        self.opening = False
        self.asked: int | None = None
        self.waiting: deque[bytes] = deque()


class Gateway:
    """On a node of its own, or on a zone's.

    :ivar frames: every message of a zone but STATE: (machine id, its bytes).
    :ivar faults: what a zone may not say.
    """

    def __init__(self, node: Node, service: str = "room") -> None:
        self.node = node
        self.service = service
        self.ids = Ids(node.id)
        self.frames: list[tuple[int, bytes]] = []
        self.states: dict[int, dict[str, Any]] = {}
        self.heard: dict[int, list[Heard]] = defaultdict(list)
        self.refused: dict[int, list[Refused]] = defaultdict(list)
        self.lost: list[int] = []
        self.closed: list[tuple[int, int]] = []
        self.members: dict[int, set[int]] = defaultdict(set)
        self.ways: dict[int, Way] = defaultdict(Way)
        self.moves = 0
        self.faults: list[str] = []
        self.hold_switched = False
        self.held: list[Callable[[], None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        node.subscribe(LibraryChannel.GATEWAY, self._on)

    def user(self) -> int:
        """The id of a new user."""
        return self.ids.next()

    def say(
        self, user: int, group: int, event: int, data: bytes = b"", identity: bytes = b""
    ) -> None:
        self._send(group, wire.message(group, user, event, identity, data))

    def member(self, what: ToZone, user: int, group: int) -> None:
        """LEAVE, AWAY or BACK of a member."""
        if what == ToZone.LEAVE:
            self.members[group].discard(user)
        self._send(group, wire.member(what, group, user))

    def tell(self, machine: int, message: bytes) -> None:
        self.node.notify(LibraryChannel.ZONE, message, to=machine)

    async def opened(self, group: int, machine: int | None = None) -> int:
        """Open the group; the machine id of its zone."""
        self.open(group, machine)
        way = self.ways[group]
        await until(lambda: not way.opening)
        assert way.zone is not None, self.closed
        return way.zone

    def open(self, group: int, machine: int | None = None) -> None:
        way = self.ways[group]
        if not way.opening and way.zone is None:
            way.opening = True
            self._spawn(self._open(group, way, machine))

    def let_switch(self) -> None:
        """Say SWITCHED where it was held back."""
        self.hold_switched = False
        for say in self.held:
            say()
        self.held.clear()

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self.node.state != "closed" and LibraryChannel.GATEWAY in self.node.channels:
            self.node.unsubscribe(LibraryChannel.GATEWAY)

    # ------------------------------------------------------------------ to zones

    def _send(self, group: int, message: bytes) -> None:
        way = self.ways[group]
        if way.zone is not None:
            self.tell(way.zone, message)
        else:
            way.waiting.append(message)
            self.open(group)

    async def _open(self, group: int, way: Way, machine: int | None) -> None:
        """Ask the zone that has the group by the registry, or the named, or any that is open."""
        while machine is None or machine == NOWHERE:
            holder = await self.node.cluster.names(kind_of(self.service)).find(str(group))
            if holder is not None:
                machine = holder.id
            else:
                fitting = [id for id, state in self.states.items() if state["open"]]
                machine = min(fitting, default=None)
            if machine is None or (machine != self.node.id and machine not in self.node.peers):
                machine = None
                await asyncio.sleep(0.01)
        try:
            way.asked = machine
            self.tell(machine, wire.group(ToZone.OPEN, group))
        except DomiError:
            self.states.pop(machine, None)
            self._spawn(self._again(group, way))

    async def _again(self, group: int, way: Way, machine: int | None = None) -> None:
        await asyncio.sleep(0.01)
        await self._open(group, way, machine)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------------ from zones

    def _on(self, context: Context) -> None:
        sender, data = context.sender, context.data
        what = ToGateway(data[0])
        if what == ToGateway.STATE:
            self.states[sender] = json.loads(data[1:])
            return
        self.frames.append((sender, data))
        getattr(self, f"_on_{what.name.lower()}")(sender, data)

    def _on_opened(self, sender: int, data: bytes) -> None:
        _, group = wire.unpack(wire.GROUP, data)
        way = self.ways[group]
        if way.asked != sender or not way.opening:
            self.faults.append(f"OPENED of {group} by {sender}, which was not asked")
            return
        way.opening, way.zone = False, sender
        while way.waiting:
            self.tell(sender, way.waiting.popleft())

    def _on_closed(self, sender: int, data: bytes) -> None:
        _, group, code, elsewhere = wire.unpack(wire.CLOSED, data)
        self.closed.append((code, elsewhere))
        way = self.ways[group]
        if code == 0:
            self._spawn(self._again(group, way, elsewhere))
        else:
            way.opening = False
            way.waiting.clear()

    def _on_join(self, sender: int, data: bytes) -> None:
        _, group, user = wire.unpack(wire.MEMBER, data)
        self.members[group].add(user)
        if self.ways[group].zone is None and not self.ways[group].opening:
            self.ways[group].zone = sender

    def _on_part(self, sender: int, data: bytes) -> None:
        _, group, user = wire.unpack(wire.MEMBER, data)
        self.members[group].discard(user)

    def _on_send(self, sender: int, data: bytes) -> None:
        _, user, event = wire.unpack(wire.SEND, data)
        self.heard[user].append(Heard(event, wire.rest(wire.SEND, data)))

    def _on_broadcast(self, sender: int, data: bytes) -> None:
        group, event, excluded, rest = wire.parse_broadcast(data)
        if self.ways[group].zone != sender:
            self.faults.append(f"BROADCAST of {group} by {sender}: {self.ways[group].zone} has it")
        for user in self.members[group] - set(excluded):
            self.heard[user].append(Heard(event, rest))

    def _on_refused(self, sender: int, data: bytes) -> None:
        _, group, user, event, code = wire.unpack(wire.REFUSED, data)
        reason = wire.text(wire.REFUSED, data)
        self.refused[user].append(Refused(group, event, Refusal(code), reason))

    def _on_moved(self, sender: int, data: bytes) -> None:
        _, group, machine = wire.unpack(wire.MOVED, data)
        if self.ways[group].zone != sender:
            self.faults.append(f"MOVED of {group} by {sender}: {self.ways[group].zone} has it")

        def switch() -> None:
            way = self.ways[group]
            self.tell(sender, wire.group(ToZone.SWITCHED, group))
            way.zone = None if machine == NOWHERE else machine
            self.moves += 1

        if self.hold_switched:
            self.held.append(switch)
        else:
            switch()

    def _on_lost(self, sender: int, data: bytes) -> None:
        _, group = wire.unpack(wire.GROUP, data)
        self.lost.append(group)
        self.members.pop(group, None)
        self.ways[group].zone = None

    # ------------------------------------------------------------------ what tests ask

    def kinds(self, *which: ToGateway) -> list[bytes]:
        """The messages of these kinds that have come."""
        return [data for _, data in self.frames if data[0] in which]

    def got(self, user: int, event: int) -> list[bytes]:
        return [heard.data for heard in self.heard[user] if heard.event == event]


@asynccontextmanager
async def gateway(url: str, **settings: Any) -> AsyncIterator[Gateway]:
    """A gateway on a node of its own."""
    async with Node("gateway", registry=url, **settings) as node:
        made = Gateway(node)
        try:
            yield made
        finally:
            await made.end()


@asynccontextmanager
async def zone(
    url: str, factory: Any = None, *, node: Any = None, **settings: Any
) -> AsyncIterator[Zone]:
    """A zone of the service "room", on a node of its own; ``node`` are that one's settings."""
    node = {"name": "room", "registry": url, **(node or {})}
    async with Zone(Node(**node), factory, **settings) as made:
        yield made


async def until_free(names: Names, name: str) -> None:
    """Until nobody has the name."""
    end = time.monotonic() + 5
    while await names.find(name) is not None:
        assert time.monotonic() < end, f"{name} is still {await names.find(name)}'s"
        await asyncio.sleep(0.005)


async def connected(*gateways: Gateway, zones: int = 1) -> None:
    """Until each gateway has heard of so many zones."""
    for each in gateways:
        await each.node.wait_subscribed(LibraryChannel.ZONE, zones, 5)
        for machine in each.node.subscribers(LibraryChannel.ZONE):
            each.tell(machine, bytes((ToZone.HELLO,)))
        await until(lambda each=each: len(each.states) >= zones)
