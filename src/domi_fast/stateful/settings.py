"""The settings of a zone, validated once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..config import MIB, Checked
from .snapshots import SnapshotStore

Roll = Literal["leave", "hand_over"]


@dataclass(frozen=True)
class ZoneConfig(Checked):
    """The settings of a :class:`~domi_fast.stateful.Zone`, which fills it from its arguments.

    :ivar factory: called with (group id, zone), makes the group that is asked for; None: there are
        those alone that the program makes. No ``async def``.
    :ivar memory_limit: the share of memory, above 0 to 1, over which no new groups are taken.
    :ivar memory: a function that returns the share in use, 0-1. None: that of the machine or of
        this process's cgroup.
    :ivar group_limit: groups that a zone may have.
    :ivar empty_timeout: seconds after which a group of the factory without members is disposed of.
    :ivar mailbox_limit: messages that may wait for one group: more are refused as OVERLOADED.
    :ivar mailbox_bytes: bytes of messages, data and identity, from which on they are, too.
    :ivar snapshots: where the state of groups is saved; None: nowhere.
    :ivar snapshot_interval: seconds between two looks at which groups are to be saved; None: they
        are saved only when they are disposed of, and when the zone closes.
    :ivar roll: what is done when a newer version of the service has come: ``leave``: each group
        stays until its last member has gone; ``hand_over``: the groups move there.
    """

    factory: Callable[..., Any] | None = None
    memory_limit: float = 0.9
    memory: Callable[[], float] | None = None
    group_limit: int = 100_000
    empty_timeout: float = 60.0
    mailbox_limit: int = 10_000
    mailbox_bytes: int = 16 * MIB
    snapshots: SnapshotStore | None = None
    snapshot_interval: float | None = None
    roll: Roll = "leave"

    def __post_init__(self) -> None:
        self._check_function("factory", "a function of (group id, zone), or a class of groups")
        self._check_function("memory", "a function that returns the share of memory in use")
        self._check_range("memory_limit", 0.001, 1.0)
        self._check_type("group_limit", int)
        self._check_range("group_limit", 1, 1 << 24)
        self._check_range("empty_timeout", 0.0, 1e9)
        self._check_type("mailbox_limit", int)
        self._check_range("mailbox_limit", 1, 1 << 30)
        self._check_type("mailbox_bytes", int)
        self._check_range("mailbox_bytes", 1, 1 << 40)
        if self.snapshots is not None and not isinstance(self.snapshots, SnapshotStore):
            raise TypeError(
                f"snapshots of type {type(self.snapshots).__name__}: a SnapshotStore, with async "
                "methods save, load and delete, is wanted"
            )
        if self.snapshot_interval is not None:
            self._check_range("snapshot_interval", 0.001, 1e9)
            if self.snapshots is None:
                raise ValueError(
                    f"snapshot_interval {self.snapshot_interval}: it is of use with snapshots only"
                )
        if self.roll not in get_args(Roll):
            raise ValueError(f"roll {self.roll!r}: {' or '.join(get_args(Roll))} is wanted")

    def _check_function(self, field: str, wanted: str) -> None:
        function = getattr(self, field)
        if function is None:
            return
        if not callable(function):
            raise TypeError(f"{field} {function!r} is not callable: {wanted} is wanted")
        if inspect.iscoroutinefunction(function):
            raise TypeError(f"{field} {function!r} is an async def: {wanted} is wanted")
