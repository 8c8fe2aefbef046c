"""Zone: the part of a node that has groups, and what it says to gateways."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
from collections.abc import Callable, Coroutine, Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Final

from ..channels import LibraryChannel
from ..config import MIB
from ..errors import DomiError
from ..gateway import wire
from ..gateway.events import Refusal
from ..gateway.ids import Ids
from ..gateway.links import Link, Links
from ..gateway.wire import NOWHERE, ToGateway
from ..memory import used_share
from ..node import Node
from ..peer import Peer
from .claims import Closed
from .closing import close_groups
from .endings import Endings
from .group import Group
from .hand_over import HandOver
from .intake import Intake
from .openings import Openings
from .saver import Saver
from .settings import Roll, ZoneConfig
from .snapshots import SnapshotStore

log = logging.getLogger(__name__)

# Seconds between two looks at memory, and at what a gateway has heard of this zone.
_INTERVAL: Final = 1.0
# Seconds for which who asks for groups is answered by the memory in use as it was.
_GLANCE: Final = 0.1


class Zone:
    """Has groups of one service, whose name and version are the node's.

    ``Zone(node, factory=None, *, memory_limit=0.9, ...)``: the arguments are the fields of
    :class:`~domi_fast.stateful.settings.ZoneConfig`, which says what is allowed.

    A component like its node: ``run(node, zone)``; with ``run(zone)``, and where the node has not
    started, the zone starts its node and closes it. One zone a node. Belongs to the node's loop.

    :raises ValueError, TypeError: a setting is out of its range or of the wrong kind.
    """

    def __init__(
        self,
        node: Node,
        factory: Callable[[int, Zone], Group] | None = None,
        *,
        memory_limit: float = 0.9,
        memory: Callable[[], float] | None = None,
        group_limit: int = 100_000,
        empty_timeout: float = 60.0,
        mailbox_limit: int = 10_000,
        mailbox_bytes: int = 16 * MIB,
        snapshots: SnapshotStore | None = None,
        snapshot_interval: float | None = None,
        roll: Roll = "leave",
    ) -> None:
        if not isinstance(node, Node):
            raise TypeError(f"node {node!r}: a Node is wanted")
        self.config = ZoneConfig(
            factory=factory,
            memory_limit=memory_limit,
            memory=memory,
            group_limit=group_limit,
            empty_timeout=empty_timeout,
            mailbox_limit=mailbox_limit,
            mailbox_bytes=mailbox_bytes,
            snapshots=snapshots,
            snapshot_interval=snapshot_interval,
            roll=roll,
        )
        self.node = node
        self.id = 0
        """In the cluster; 0 before the start."""
        self._state = "new"
        self._memory = memory or used_share
        self._share = 0.0
        self._look_again = 0.0
        self._groups: dict[int, Group] = {}
        self._members = 0
        self._making: int | None = None
        self._owns_node = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing: asyncio.Future[None] | None = None
        self._closers: set[asyncio.Task[Any]] = set()
        self._closed = asyncio.Event()
        self._changed = asyncio.Event()
        self._leaving: asyncio.Task[None] | None = None
        self._links = Links(node, LibraryChannel.GATEWAY, self._gateway_lost)
        self._zones = Links(node, LibraryChannel.ZONE, self._zone_lost)
        self._saver = Saver(self)
        self._endings = Endings(self, self._saver)
        self._openings = Openings(self, self._endings)
        self._hand_over = HandOver(self, self._openings, self._endings, self._saver)
        self._intake = Intake(self, self._openings, self._endings, self._hand_over)

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Take groups from now on; the node is started first where it has not been.

        Returns when the groups that were made by hand are claimed, or found to be another's: those
        are logged, and their ``ready()`` says so.

        :raises DomiError: the zone or the node cannot be started any more, or has a zone.
        """
        if self._state != "new":
            raise DomiError(f"this zone is {self._state}: make another Zone to start again")
        if self.node.state not in {"new", "serving", "paused"}:
            raise DomiError(
                f"its node is {self.node.state}: a zone starts on one that is new or serves"
            )
        self._state = "serving"
        try:
            if self.node.state == "new":
                self._owns_node = True
                await self.node.start()
            self._found()
            # Neither may be dropped because others were more: who has missed one is out of step.
            for channel in (LibraryChannel.ZONE, LibraryChannel.GATEWAY):
                self.node.when_full("raise", channel=channel)
            self._look_at_memory()
            self._openings.start()
            self._spawn(self._watch())
            self._spawn(self._tick())
            if self.config.snapshot_interval is not None:
                self._spawn(self._saver.run(self.config.snapshot_interval))
            for group in list(self._groups.values()):
                self._openings.by_hand(group)
            await self._openings.settled()
        except BaseException:
            await self.close()
            raise

    def _found(self) -> None:
        """Become the one zone of the node."""
        node = self.node
        try:
            node.subscribe(LibraryChannel.ZONE, self._intake.heard)
        except DomiError as error:
            raise DomiError(
                f"node {node.id} has a zone: a node has one at a time, make another for another "
                f"zone ({error})"
            ) from error
        try:
            node.on_newer(self._newer_came)
        except BaseException:
            node.unsubscribe(LibraryChannel.ZONE)
            raise
        self.id = Ids(node.id).next()
        node.attach(self)

    async def close(self) -> None:
        """End: the handlers that run end, what has changed is saved, gateways are told LOST.

        Waits up to the node's ``drain_timeout`` for the handlers. The node is closed too if the
        zone has started it. Every call waits until the zone is closed.
        """
        current = asyncio.current_task()
        if current is not None:
            self._closers.add(current)
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._end())
        await asyncio.shield(self._closing)
        if self._owns_node:
            await self.node.close()

    async def drain(self) -> None:
        """Take no new groups, and wait until no group has members. What a node that drains calls.

        With ``roll="hand_over"`` the groups move to other zones of the service, where there are.
        """
        self._retire()
        await self._hand_over.empty(lambda: not self._members and self._hand_over.quiet)

    async def wait_closed(self) -> None:
        """Wait until the zone is closed, by whomever; it need not have started."""
        await self._closed.wait()

    async def __aenter__(self) -> Zone:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # ------------------------------------------------------------------ what it is

    @property
    def service(self) -> str:
        """Whose groups these are: the name of the node."""
        return self.node.config.name

    @property
    def state(self) -> str:
        """``new``, ``serving``, ``retiring`` (no new groups any more) or ``closed``."""
        return self._state

    @property
    def groups(self) -> Mapping[int, Group]:
        """The groups by id; a live, read-only view. One that has moved away is none of them."""
        return MappingProxyType(self._groups)

    def group(self, id: int) -> Group:
        """The group of this id.

        :raises DomiError: it is not in this zone.
        """
        group = self._groups.get(id)
        if group is None:
            raise DomiError(f"group {id} is not in this zone, which has {len(self._groups)}")
        return group

    @property
    def users(self) -> int:
        """The members of all groups; who is in two counts twice."""
        return self._members

    @property
    def full(self) -> bool:
        """Whether there is no room for another group, in memory or in number."""
        return self._share > self.config.memory_limit or (
            len(self._groups) >= self.config.group_limit
        )

    @property
    def open(self) -> bool:
        """Whether it makes groups for who asks for them."""
        return self._state == "serving" and self.config.factory is not None and not self.full

    def facts(self) -> dict[str, Any]:
        """What gateways and other zones are told: the fields of STATE (docs/protocol.md)."""
        config = self.node.config
        return {
            "zone": self.id,
            "service": self.service,
            "version": config.version,
            "open": self.open,
            "full": self.full,
            "memory": round(self._share, 4),
            "groups": len(self._groups),
            "users": self._members,
            "host": config.host,
            "port": self.node.port,
        }

    def __repr__(self) -> str:
        return f"<Zone {self.service!r} {self._state} groups={len(self._groups)}>"

    async def hand_over(self, group_id: int, to: int | None = None) -> None:
        """Move a group to another zone of the service, without its users noticing.

        Returns when it runs there. To cancel a call does not stop it. Not from a handler of that
        group, for whose end it waits: start a task there.

        :param to: the machine id of that zone's node; None: of those zones that take groups, of the
            newest version, the one with the most free memory.
        :raises DomiError: the group is not here, or moves already; there is no such zone, or it
            does not take the group. It stays then.
        """
        await self._hand_over.begin(group_id, to)

    # ------------------------------------------------------------------ what groups call

    def _enrol(self, group: Group) -> bool:
        """A group was made; whether by hand."""
        by_hand = self._making is None
        if self._making not in (None, group.id):
            raise DomiError(
                f"the factory was asked for group {self._making} and makes group {group.id}: a "
                "Group with the id that it is given is wanted"
            )
        if self._state not in {"new", "serving", "retiring"}:
            raise DomiError(f"the zone is {self._state}: it takes no group")
        if group.id in self._groups or (by_hand and group.id in self._openings):
            raise DomiError(f"group {group.id} is in this zone already: use zone.group({group.id})")
        self._groups[group.id] = group
        self._endings.note(group)
        if by_hand and self.id:
            self._openings.by_hand(group)
        return by_hand

    def _note_members(self, group: Group, more: int) -> None:
        if self._groups.get(group.id) is group:
            self._members += more
            self._endings.note(group)
            if not len(group) and self._state == "retiring":
                self._changed.set()

    def _note_changed(self, group: Group) -> None:
        # A handler may outlast that.
        if self._groups.get(group.id) is group:
            self._saver.note(group)

    def _check_held(self, group: Group) -> None:
        """Raise DomiError, and let go of the group, if its name has become another's."""
        if group._name is not None and group._name.lost.is_set():
            self._lose(group)
            raise DomiError(f"group {group.id} {group._silent}")

    # ------------------------------------------------------------------ what its parts call

    def _make(self, id: int) -> Group:
        """A group by the factory; it is among the groups, and takes nothing yet."""
        assert self.config.factory is not None
        self._making = id
        try:
            group = self.config.factory(id, self)
            if not isinstance(group, Group) or self._groups.get(id) is not group:
                raise DomiError(
                    f"the factory returned {group!r}: a Group with the id {id} and the zone that "
                    "it was given is wanted"
                )
        except BaseException:
            self._forget(id, "could not be made")
            raise
        finally:
            self._making = None
        return group

    def _forget(self, id: int, reason: str) -> None:
        """The group is none of this zone's any more."""
        group = self._groups.pop(id, None)
        if group is not None:
            self._members -= len(group)
            self._endings.forget(group)
            self._saver.forget(group)
            group._end(reason)
            self._hand_over.forget(group)
            self._changed.set()

    def _lose(self, group: Group) -> None:
        log.error("%r: another node has its name, it ends here", group)
        self._tell_lost(group, "another zone has it")
        self._forget(group.id, "is lost: another node has its name")

    def _tell_lost(self, group: Group, reason: str) -> None:
        for link in list(group._links.values()):
            link.tell(wire.group(ToGateway.LOST, group.id, reason))

    def _closed_to(self, id: int, *, opening: bool = False) -> Closed | None:
        """Why no group of this id is made now; None: it may be."""
        if self._state != "serving":
            # Another is about to take them: who hears FULL before that would give up.
            return Closed(0, NOWHERE, f"the zone is {self._state}: ask another")
        if self.config.factory is None:
            return Closed(Refusal.NO_GROUP, NOWHERE, "there is none, and none is made on demand")
        if not opening and asyncio.get_running_loop().time() >= self._look_again:
            self._look_at_memory()
        if self.full:
            return Closed(
                Refusal.FULL,
                NOWHERE,
                f"{len(self._groups)} groups, {self._share:.0%} of memory are in use",
            )
        return None

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("%r: a task failed", self, exc_info=task.exception())

    def _gateway_lost(self, link: Link) -> None:
        for group in list(link.groups):
            group._lose(link.machine)
        self._endings.lost(link)
        self._hand_over.gateway_lost(link)

    def _zone_lost(self, link: Link) -> None:
        self._hand_over.zone_lost(link)

    def _look_at_links(self) -> None:
        self._links.check()
        self._zones.check()

    # ------------------------------------------------------------------ what it does by itself

    async def _watch(self) -> None:
        async for _ in self.node.events():
            self._look_at_links()

    async def _tick(self) -> None:
        """Look around at every interval, and tell the gateways every second and at each change."""
        loop = asyncio.get_running_loop()
        interval = min(_INTERVAL, max(self.config.empty_timeout / 2, 0.01))
        next_look, next_word, said = 0.0, 0.0, b""
        while True:
            self._changed.clear()
            now = loop.time()
            if now >= next_look:
                self._look_at_links()
                self._look_at_names()
                next_look = now + interval
                self._endings.look()
                self._hand_over.look()
            elif self._state == "retiring":
                self._endings.look()
            if now >= next_word or self._gist() != said:
                self._look_at_memory()
                self._publish()
                said, next_word = self._gist(), now + _INTERVAL
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), interval)
            # Changes come in crowds.
            await asyncio.sleep(0.005)

    def _look_at_names(self) -> None:
        for group in list(self._groups.values()):
            if group._name is not None and group._name.lost.is_set():
                self._lose(group)

    def _gist(self) -> bytes:
        return bytes((self.open, self.full))

    def _look_at_memory(self) -> None:
        if self._memory is used_share:  # which asks the system
            self._look_again = asyncio.get_running_loop().time() + _GLANCE
        try:
            share = float(self._memory())
            if not math.isfinite(share):
                raise ValueError(f"{share} is no share")
            self._share = share
        except Exception as error:
            log.warning("%r: the memory in use cannot be told: %s", self, error)

    def _described(self) -> bytes:
        return bytes((ToGateway.STATE,)) + json.dumps(self.facts()).encode()

    def _publish(self) -> None:
        try:
            self.node.publish(LibraryChannel.GATEWAY, self._described())
        except DomiError as error:
            log.debug("%r: the gateways cannot be told: %s", self, error)

    # ------------------------------------------------------------------ its end

    def _newer_came(self, peer: Peer) -> None:
        if self._state == "serving":
            log.info("%r: version %s is there as node %d", self, peer.version, peer.id)
            self._retire()
            self._leaving = asyncio.ensure_future(self._leave())
            self._leaving.add_done_callback(self._ended)

    def _retire(self) -> None:
        if self._state == "serving":
            self._state = "retiring"
            self._changed.set()

    async def _leave(self) -> None:
        await self._hand_over.empty(lambda: not self._groups and self._hand_over.quiet)
        self._leaving = None  # the node closes the zone, which is not to end this
        try:
            await self.node.drain()
        except DomiError as error:
            log.debug("%r: its node ends already: %s", self, error)

    async def _end(self) -> None:
        started = self.id != 0
        self._state = "closed"
        try:
            if started:
                self._publish()
                await close_groups(
                    self, self._openings, self._hand_over, self._saver, self._closers
                )
        finally:
            tasks = [*self._tasks, *([self._leaving] if self._leaving else [])]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            for id in list(self._groups):
                self._forget(id, "is gone: the zone was closed")
            self._links.end()
            self._zones.end()
            if started:
                self.node.unsubscribe(LibraryChannel.ZONE)
                self.node.on_newer(None)
                self.node.detach(self)
            self._closed.set()
