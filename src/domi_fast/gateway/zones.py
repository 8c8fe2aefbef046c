"""The zones of the cluster as a gateway knows them, and which of them is to have a new group."""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from packaging.version import Version

from ..config import parse_version
from ..errors import FrameError

_PLAIN: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_MOST_REMEMBERED: Final = 4096


def kind_of(service: str) -> str:
    """The kind of names under which the groups of a service are kept in the registry."""
    if _PLAIN.fullmatch(service):
        return f"groups.{service}"
    return f"groups.-{hashlib.sha256(service.encode()).hexdigest()}"


@dataclass(frozen=True)
class ZoneState:
    """What a zone says of itself.

    :ivar machine: the machine id of its node.
    :ivar zone: its own id, of 64 bits.
    :ivar open: whether it takes new groups.
    :ivar full: whether it does not because of its memory, or of their number.
    :ivar memory: the share of its memory that is in use, 0-1.
    :ivar host, port: where its node listens.
    """

    machine: int
    zone: int
    service: str
    version: Version
    open: bool
    full: bool
    memory: float
    groups: int
    users: int
    host: str
    port: int

    @classmethod
    def decode(cls, machine: int, raw: bytes) -> ZoneState:
        """:raises FrameError: it is not what a zone says."""
        try:
            fields = json.loads(raw)
            return cls(
                machine=machine,
                zone=int(fields["zone"]),
                service=str(fields["service"]),
                version=parse_version(str(fields["version"])),
                open=bool(fields["open"]),
                full=bool(fields["full"]),
                memory=float(fields["memory"]),
                groups=int(fields["groups"]),
                users=int(fields["users"]),
                host=str(fields["host"]),
                port=int(fields["port"]),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FrameError(f"no state of a zone: {error!r}", peer=machine) from None

    @property
    def room(self) -> tuple[float, int, int, int]:
        """By which zones are compared: the least has most room. Within a hundredth of memory, which
        zones of one machine share, that with fewest users and groups.
        """
        return round(self.memory, 2), self.users, self.groups, self.machine


class Zones:
    """The zones that are there. Belongs to the gateway's loop."""

    def __init__(self) -> None:
        self._zones: dict[int, ZoneState] = {}
        # Of zones that have gone, too: clients go on naming them.
        self._services: OrderedDict[int, str] = OrderedDict()

    def heard(self, machine: int, raw: bytes) -> ZoneState:
        """The node of this machine id has said what its zone is.

        :raises FrameError: it is not what a zone says.
        """
        state = ZoneState.decode(machine, raw)
        self._zones[machine] = state
        for id in (machine, state.zone):
            self._services[id] = state.service
            self._services.move_to_end(id)
        while len(self._services) > _MOST_REMEMBERED:
            self._services.popitem(last=False)
        return state

    def lost(self, machine: int) -> None:
        """That node is gone, and its zone with it."""
        self._zones.pop(machine, None)

    def has(self, machine: int) -> bool:
        return machine in self._zones

    def of(self, service: str) -> list[ZoneState]:
        """The zones of a service, with most room first."""
        found = [state for state in self._zones.values() if state.service == service]
        return sorted(found, key=lambda state: state.room)

    def service_of(self, id: int) -> str | None:
        """The service of a zone, or of the zone of a machine id, also when that has gone."""
        return self._services.get(id)

    @property
    def only_service(self) -> str | None:
        """The service of all zones that are there, if they are of one."""
        services = {state.service for state in self._zones.values()}
        return services.pop() if len(services) == 1 else None

    def __len__(self) -> int:
        return len(self._zones)

    def newest(self, service: str) -> list[ZoneState]:
        """Those of the service that are of its newest version, with most room first."""
        return _newest(self.of(service))

    def place(self, service: str, without: Collection[int] = ()) -> ZoneState | None:
        """The zone that is to have a new group: of the newest version, that with most room.

        :param without: machine ids that are not to have it.
        """
        return next((s for s in self.newest(service) if s.open and s.machine not in without), None)

    def is_full(self, service: str) -> bool:
        """Whether the zones of the newest version are there, and all have no room."""
        newest = self.newest(service)
        return bool(newest) and all(state.full for state in newest)


def _newest(states: Iterable[ZoneState]) -> list[ZoneState]:
    states = list(states)
    newest = max((state.version for state in states), default=None)
    return [state for state in states if state.version == newest]
