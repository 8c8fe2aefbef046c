"""Group: the users that share something, and the state that they share; Message: what they say."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, overload

from ..errors import DomiError, NoSubscriber, PeerLost
from ..gateway import wire
from ..gateway.events import USER_EVENT, LibraryEvent, Refusal
from ..gateway.frames import told
from ..gateway.ids import machine_of
from ..gateway.links import Link, Links
from ..gateway.wire import ToGateway, UserMessage
from ..names import Name
from ..node import Node
from . import snapshots
from .claims import Closed
from .mailbox import Backlog, Mailbox
from .members import OF_MEMBERS, Users, as_bytes, check_event
from .settings import ZoneConfig

if TYPE_CHECKING:
    from typing_extensions import Self


log = logging.getLogger(__name__)

_MOST_ID: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Message:
    """What a user has said to a group, or what has become of a member.

    :ivar user: the user's id; it need not be a member.
    :ivar event: 50-65535, or LEAVE, AWAY or BACK of
        :class:`~domi_fast.gateway.events.LibraryEvent`.
    :ivar identity: what the gateway's ``authenticate`` has said who this is; empty for library
        events.
    """

    group: Group = field(repr=False)
    user: int
    event: int
    data: bytes
    identity: bytes = b""

    def reply(self, event: int, data: bytes) -> None:
        """Send to the user alone. Raises as :meth:`Group.send` does."""
        self.group.send(self.user, event, data)


Handler = Callable[[Message], object]
H = TypeVar("H", bound=Handler)


class Home(Protocol):
    """What groups, and the parts of a zone, know of a :class:`~domi_fast.stateful.Zone`."""

    node: Node
    id: int
    config: ZoneConfig
    _links: Links
    """To the gateways."""
    _zones: Links
    """To other zones."""
    _groups: dict[int, Group]
    _changed: asyncio.Event

    @property
    def service(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def groups(self) -> Mapping[int, Group]: ...
    def group(self, id: int) -> Group: ...
    def facts(self) -> dict[str, Any]: ...
    async def hand_over(self, group_id: int, to: int | None = None) -> None: ...
    def _enrol(self, group: Group) -> bool: ...
    def _note_members(self, group: Group, more: int) -> None: ...
    def _note_changed(self, group: Group) -> None: ...
    def _check_held(self, group: Group) -> None: ...
    def _make(self, id: int) -> Group: ...
    def _forget(self, id: int, reason: str) -> None: ...
    def _lose(self, group: Group) -> None: ...
    def _tell_lost(self, group: Group, reason: str) -> None: ...
    def _closed_to(self, id: int, *, opening: bool = False) -> Closed | None: ...
    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]: ...
    def _described(self) -> bytes: ...


class Group:
    """A group of a zone. One handler of it runs at a time, in the order in which messages came.

    Made by the zone's factory for who asks for it, or by hand: ``Group(666, zone)``, which claims
    its id in the cluster when the zone has started (:meth:`ready`) and stays when it is empty. A
    subclass registers its handlers in ``__init__``, and may have :meth:`save`, :meth:`load` and
    :meth:`on_close`. Belongs to the loop of its zone.

    :param id: 0 to 2**64 - 1; one group of a service has it, in the whole cluster.
    :raises ValueError: no such id is allowed.
    :raises DomiError: the zone has such a group already, or takes no more.
    """

    def __init__(self, id: int, zone: Home) -> None:
        if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id <= _MOST_ID:
            raise ValueError(f"group {id!r}: an int from 0 to 2**64 - 1 is wanted")
        if not hasattr(zone, "_enrol"):
            raise TypeError(f"zone {zone!r}: a Zone is wanted")
        for hook in (self.save, self.load, self.on_close):
            if inspect.iscoroutinefunction(hook):
                raise TypeError(
                    f"{type(self).__name__}.{hook.__name__} is an async def, which nobody would "
                    "await: a plain method is wanted; it may start a task"
                )
        self._id = id
        self._zone = zone
        self._handlers: dict[int, Handler] = {}
        self._users: set[int] = set()
        self._gateways: dict[int, set[int]] = {}
        self._links: dict[int, Link] = {}
        config = zone.config
        self._mailbox = Mailbox(self._run, Backlog(config.mailbox_limit, config.mailbox_bytes))
        # What does not let the program change the members, or send anything: the reason, for people
        self._fixed = ""
        self._silent = "is not the zone's yet: await its ready()"
        # Where messages go that are not for the mailbox.
        self._detour: Callable[[UserMessage], None] | None = None
        self._name: Name | None = None
        self._claimed: asyncio.Future[None] | None = None
        self._loaded = False
        self._touched = 0.0
        self._by_hand = zone._enrol(self)

    # ------------------------------------------------------------------ what it is

    @property
    def id(self) -> int:
        return self._id

    @property
    def zone(self) -> Home:
        return self._zone

    @property
    def users(self) -> AbstractSet[int]:
        """The ids of the members; a live, read-only view."""
        return Users(self._users)

    @property
    def gateways(self) -> frozenset[int]:
        """The machine ids of the gateways that members are at."""
        return frozenset(self._gateways)

    def __len__(self) -> int:
        return len(self._users)

    def __bool__(self) -> bool:
        return True

    def __contains__(self, user: object) -> bool:
        return user in self._users

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._id} users={len(self._users)}>"

    async def ready(self) -> None:
        """Wait until the group is the zone's own, and users can reach it.

        :raises NameTaken: another zone has the group; its ``holder`` says where.
        :raises DomiError: the zone has not started, or the group is gone.
        """
        if self._claimed is None:
            if self._silent:
                raise DomiError(f"group {self._id} {self._silent}, once the zone has started")
            return
        await asyncio.shield(self._claimed)

    # ------------------------------------------------------------------ handlers

    @overload
    def handle(self, event: int) -> Callable[[H], H]: ...
    @overload
    def handle(self, event: int, fn: H) -> H: ...
    def handle(self, event: int, fn: H | None = None) -> H | Callable[[H], H]:
        """Have ``fn(message)`` called, ``def`` or ``async def``, for each message of this event.

        Without ``fn`` it is a decorator. A ``def`` must not wait for anything: it holds up the
        whole loop. While an ``async def`` waits, the group's further messages do; other groups go
        on.

        :param event: 50-65535; or LEAVE, AWAY or BACK of LibraryEvent.
        :raises ValueError: no such event is handled by groups.
        :raises DomiError: there is a handler already.
        """
        check_event(event, OF_MEMBERS)
        if event in self._handlers:
            raise DomiError(
                f"event {int(event)} of group {self._id} has a handler already: "
                f"{self._handlers[event]!r}"
            )
        if fn is None:
            return lambda decorated: self.handle(event, decorated)
        if not callable(fn):
            raise TypeError(f"handler {fn!r} is not callable: a function of one message is wanted")
        self._handlers[int(event)] = fn
        return fn

    # ------------------------------------------------------------------ members, and what they hear

    def add_user(self, user: int) -> None:
        """Make the user a member; one that is a member already stays so.

        :raises PeerLost: the user's gateway is not connected.
        :raises DomiError: the gateway cannot be told, or the group moves or is gone.
        """
        self._check_open(fixed=True)
        link = self._link_of(user)
        link.send(wire.member(ToGateway.JOIN, self._id, user))
        self._note_gateway(link)
        self._note_user(user)

    def remove_user(self, user: int) -> None:
        """Make the user no member any more; nothing happens when it is none.

        :raises DomiError: the group moves or is gone.
        """
        self._check_open(fixed=True)
        if user in self._users:
            link = self._links.get(machine_of(user))
            self._forget_user(user)
            if link is not None and link.alive:
                link.tell(wire.member(ToGateway.PART, self._id, user))

    def send(self, user: int, event: int, data: bytes) -> None:
        """Send to one user, who need not be a member.

        :param event: 50-65535.
        :raises PeerLost: the user's gateway is not connected.
        :raises Overloaded: its queue is full.
        :raises DomiError: the group moves or is gone.
        """
        check_event(event)
        data = as_bytes(data)
        self._check_open()
        self._link_of(user).send(wire.send(user, event, data))

    def broadcast(self, event: int, data: bytes, exclude: int | Iterable[int] | None = ()) -> None:
        """Send to all members: one message to each of their gateways.

        When a gateway cannot be sent to, the others are all the same; then the first error is
        raised. Those of a gateway that is gone, or closes, are left out: they leave.

        :param event: 50-65535.
        :param exclude: users who do not get it: one, or an iterable of at most 65,535.
        :raises ValueError: too many are excluded.
        :raises Overloaded: the queue to a gateway is full.
        :raises DomiError: the group moves or is gone.
        """
        check_event(event)
        data = as_bytes(data)
        self._check_open()
        excluded = {exclude} if isinstance(exclude, int) else set(exclude or ())
        if len(excluded) > wire.MOST_EXCLUDED:
            raise ValueError(
                f"{len(excluded)} users to exclude: {wire.MOST_EXCLUDED} at most are allowed; "
                "send to the others one by one"
            )
        plain = b""
        first: DomiError | None = None
        for machine, users in self._gateways.items():
            link = self._links.get(machine)
            if link is None or link.lost:
                continue
            left_out = excluded & users if excluded else excluded
            if left_out:
                if len(left_out) == len(users):
                    continue
                message = wire.broadcast(self._id, event, data, tuple(sorted(left_out)))
            else:
                plain = plain or wire.broadcast(self._id, event, data)
                message = plain
            try:
                link.send(message)
            except (NoSubscriber, PeerLost):
                continue  # It closes, or was lost just now.
            except DomiError as error:
                first = first or error
        if first is not None:
            raise first

    # ------------------------------------------------------------------ what it keeps

    def save(self) -> bytes:
        """The state, for a snapshot; of a subclass. It runs between handlers, and must not wait."""
        return b""

    def load(self, state: bytes) -> None:
        """Take over what :meth:`save` has returned; of a subclass."""

    def on_close(self) -> None:
        """The group has left this zone: it has moved, ended, or was lost. Of a subclass: cancel
        timers and tasks here.
        """

    async def snapshot(self) -> bytes:
        """The group at one moment between two handlers: its id, members and state."""
        if asyncio.current_task() is self._mailbox.task:
            return self._packed()
        await self._mailbox.hold()
        try:
            return self._packed()
        finally:
            self._mailbox.release()

    @classmethod
    def restore(cls, snapshot: bytes, zone: Home) -> Self:
        """The group of a snapshot, made by hand in this zone. Its members are told to their
        gateways once it is ready; those of gateways that are not connected leave.

        :raises DomiError: these bytes are no snapshot.
        """
        found = snapshots.unpack(snapshot)
        group = cls(found.group, zone)
        try:
            group._adopt(found)
        except BaseException:
            zone._forget(group.id, "could not be restored")
            raise
        return group

    def _packed(self) -> bytes:
        members = tuple(sorted(self._users))
        return snapshots.pack(snapshots.Snapshot(self._id, members, self.save()))

    def _adopt(self, snapshot: snapshots.Snapshot) -> None:
        self.load(snapshot.state)
        self._loaded = True
        for user in snapshot.members:
            self._note_user(user)

    # ------------------------------------------------------------------ what its zone calls

    def _open(self) -> None:
        """It is the zone's own: run what waits."""
        self._silent = self._fixed = ""
        self._detour = None
        self._touched = asyncio.get_running_loop().time()
        self._mailbox.release()

    def _take(self, link: Link, message: UserMessage) -> None:
        """A gateway has sent this."""
        if self._links.get(link.machine) is not link:
            self._note_gateway(link)
        self._touched = asyncio.get_running_loop().time()
        if self._detour is not None:
            self._detour(message)
            return
        if message.event >= USER_EVENT and self._mailbox.full:
            self._refuse(message, Refusal.OVERLOADED, self._mailbox.full)
            return
        self._mailbox.put(message)

    def _lose(self, machine: int) -> None:
        """The gateway is lost: its users leave, behind what they have sent."""
        self._links.pop(machine, None)
        for user in sorted(self._gateways.get(machine, ())):
            leave = UserMessage(self._id, user, LibraryEvent.LEAVE, b"", b"")
            if self._detour is not None:
                self._detour(leave)
            else:
                self._mailbox.put(leave)

    def _join_all(self) -> None:
        """Tell the members' gateways anew that they are; those of gateways that are gone leave."""
        for machine, users in list(self._gateways.items()):
            link = self._zone._links.of(machine)
            if link is None:
                self._lose(machine)
                continue
            self._note_gateway(link)
            for user in sorted(users):
                link.tell(wire.member(ToGateway.JOIN, self._id, user))

    def _end(self, reason: str) -> None:
        """It is not the zone's any more."""
        self._silent = reason
        self._mailbox.stop()
        for message in self._mailbox.take_all():
            self._refuse_gone(message)
        for link in self._links.values():
            link.groups.discard(self)
        self._links.clear()
        try:
            self.on_close()
        except Exception:
            log.exception("%r: on_close has raised", self)

    def _note_gateway(self, link: Link) -> None:
        self._links[link.machine] = link
        link.groups.add(self)

    def _unlink(self, machine: int) -> None:
        link = self._links.pop(machine, None)
        if link is not None:
            link.groups.discard(self)

    def _refuse(self, message: UserMessage, code: Refusal, reason: str) -> None:
        if message.event < USER_EVENT:
            return
        link = self._zone._links.of(machine_of(message.user))
        if link is not None:
            # Whoever floods a group would fill what waits for its gateway with refusals.
            link.offer(wire.refused(self._id, message.user, message.event, code, reason))

    def _refuse_gone(self, message: UserMessage) -> None:
        """It is for this group, which is not the zone's any more."""
        self._refuse(message, Refusal.NO_GROUP, f"group {self._id} {self._silent}")

    # ------------------------------------------------------------------ running

    def _run(self, message: UserMessage) -> Coroutine[Any, Any, None] | None:
        """Handle one message; the coroutine is what there is to await."""
        event = message.event
        if event < USER_EVENT:
            if message.user not in self._users:
                return None
            if event == LibraryEvent.LEAVE:
                self._forget_user(message.user)
        handler = self._handlers.get(event)
        if handler is None:
            self._refuse(message, Refusal.NO_HANDLER, f"group {self._id} does not handle {event}")
            return None
        self._zone._note_changed(self)
        try:
            result = handler(Message(self, message.user, event, message.data, message.identity))
        except (Exception, asyncio.CancelledError) as error:
            self._failed(message, error)
            return None
        return self._finish(result, message) if inspect.isawaitable(result) else None

    async def _finish(self, work: Awaitable[object], message: UserMessage) -> None:
        try:
            await work
        except asyncio.CancelledError as error:
            # Of something that it has awaited: nobody wants the handler itself to end.
            if self._mailbox.cancelled:
                raise
            self._failed(message, error)
        except Exception as error:
            self._failed(message, error)
        finally:
            self._zone._note_changed(self)

    def _failed(self, message: UserMessage, error: BaseException) -> None:
        log.error(
            "%r: the handler of event %d failed on a message of user %d",
            self,
            message.event,
            message.user,
            exc_info=error,
        )
        self._zone.node.count("group_handler_errors")
        self._refuse(message, Refusal.FAILED, told(error))

    # ------------------------------------------------------------------ members

    def _check_open(self, *, fixed: bool = False) -> None:
        reason = self._silent or (self._fixed if fixed else "")
        if reason:
            raise DomiError(f"group {self._id} {reason}")
        self._zone._check_held(self)

    def _link_of(self, user: int) -> Link:
        if not isinstance(user, int) or not 0 <= user <= _MOST_ID:
            raise ValueError(f"user {user!r}: the id of a user is an int from 0 to 2**64 - 1")
        machine = machine_of(user)
        link = self._zone._links.of(machine)
        if link is None:
            raise PeerLost(
                f"user {user} is at gateway {machine}, which is not connected", peer=machine
            )
        return link

    def _note_user(self, user: int) -> None:
        if user not in self._users:
            self._users.add(user)
            self._gateways.setdefault(machine_of(user), set()).add(user)
            self._zone._note_members(self, 1)

    def _forget_user(self, user: int) -> None:
        machine = machine_of(user)
        self._users.discard(user)
        users = self._gateways[machine]
        users.discard(user)
        if not users:
            del self._gateways[machine]
        self._touched = asyncio.get_running_loop().time()
        self._zone._note_members(self, -1)
