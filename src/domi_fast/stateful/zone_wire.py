"""What zones say to each other, on ``LibraryChannel.ZONE`` (docs/stateful.md, "A group moves").

Built as what gateways say (:mod:`domi_fast.gateway.wire`). TRANSFER, TAKE, RUN and ASK are
requests; the first three are answered with nothing, or with the reason of a refusal.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Final, NamedTuple

from ..errors import FrameError
from ..gateway import wire
from ..gateway.wire import UserMessage

_TRANSFER: Final = struct.Struct("<BQBB")
_MACHINES: Final = struct.Struct("<BQH")


class Between(IntEnum):
    """From a zone to a zone; from 32 up, beside what gateways say."""

    TRANSFER = 32
    TAKE = 33
    ABORT = 34
    MOVING = 35
    FORWARD = 36
    RUN = 37
    ASK = 38


class Transfer(NamedTuple):
    """A group that shall move: of which service and version its zone is, and the snapshot."""

    group: int
    service: str
    version: str
    snapshot: bytes


def transfer(content: Transfer) -> bytes:
    """TRANSFER: ``u64`` group, ``u8`` sizes of service and version, both as text, the snapshot."""
    service, version = content.service.encode(), content.version.encode()
    head = _TRANSFER.pack(Between.TRANSFER, content.group, len(service), len(version))
    return b"".join((head, service, version, content.snapshot))


def parse_transfer(raw: bytes) -> Transfer:
    _, group, of_service, of_version = wire.unpack(_TRANSFER, raw)
    middle = _TRANSFER.size + of_service
    end = middle + of_version
    if len(raw) < end:
        raise FrameError(f"texts of {of_service} and {of_version} bytes in {len(raw)}")
    service, version = raw[_TRANSFER.size : middle].decode(), raw[middle:end].decode()
    return Transfer(group, service, version, raw[end:])


def simple(what: Between, group: int) -> bytes:
    """TAKE or ABORT: ``u64`` group."""
    return wire.GROUP.pack(what, group)


def with_machines(what: Between, group: int, machines: Iterable[int]) -> bytes:
    """MOVING or RUN: ``u64`` group, ``u16`` count, a ``u16`` machine id of each gateway."""
    ids = tuple(machines)
    return _MACHINES.pack(what, group, len(ids)) + struct.pack(f"<{len(ids)}H", *ids)


def parse_machines(raw: bytes) -> tuple[int, tuple[int, ...]]:
    _, group, count = wire.unpack(_MACHINES, raw)
    if len(raw) < _MACHINES.size + 2 * count:
        raise FrameError(f"{count} machine ids in a message of {len(raw)} bytes")
    return group, struct.unpack_from(f"<{count}H", raw, _MACHINES.size)


def forward(message: UserMessage) -> bytes:
    """FORWARD: a MESSAGE whole, whose event may also be LEAVE, AWAY or BACK."""
    return bytes((Between.FORWARD,)) + wire.message(*message)


def parse_forward(raw: bytes) -> UserMessage:
    return wire.parse_message(raw[1:])
