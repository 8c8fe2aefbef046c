"""What gateways and zones say to each other over the mesh (docs/protocol.md, "Gateways and zones").

A message is a byte that says what it is, then its fields, little-endian and without gaps, then the
rest: data, or text. To a zone it goes on ``LibraryChannel.ZONE``, to a gateway on
``LibraryChannel.GATEWAY``: one channel in each direction, and so in order. Whatever is cut short or
unknown raises :class:`~domi_fast.errors.FrameError`.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any, Final, NamedTuple

from ..errors import FrameError
from .frames import clipped

NOWHERE: Final = 0xFFFF
"""The machine id of no node."""


class ToZone(IntEnum):
    """From a gateway to a zone."""

    HELLO = 1
    OPEN = 2
    MESSAGE = 3
    LEAVE = 4
    AWAY = 5
    BACK = 6
    SWITCHED = 7


class ToGateway(IntEnum):
    """From a zone to a gateway."""

    STATE = 1
    OPENED = 2
    CLOSED = 3
    JOIN = 4
    PART = 5
    SEND = 6
    BROADCAST = 7
    REFUSED = 8
    MOVED = 9
    LOST = 10


OPEN: Final = struct.Struct("<BQ")
MESSAGE: Final = struct.Struct("<BQQHB")
MEMBER: Final = struct.Struct("<BQQ")
GROUP: Final = struct.Struct("<BQ")
CLOSED: Final = struct.Struct("<BQHH")
SEND: Final = struct.Struct("<BQH")
BROADCAST: Final = struct.Struct("<BQHH")
REFUSED: Final = struct.Struct("<BQQHH")
MOVED: Final = struct.Struct("<BQH")

MOST_IDENTITY: Final = 255
MOST_EXCLUDED: Final = 0xFFFF
_MOST_TEXT: Final = 1024


def unpack(form: struct.Struct, message: bytes) -> tuple[Any, ...]:
    """The fields at the beginning of the message.

    :raises FrameError: it is shorter than they are.
    """
    if len(message) < form.size:
        raise FrameError(f"a message of {len(message)} bytes: {form.size} or more are wanted")
    return form.unpack_from(message)


class UserMessage(NamedTuple):
    """What a user says to a group.

    :ivar identity: what ``authenticate`` has said who this is.
    """

    group: int
    user: int
    event: int
    identity: bytes
    data: bytes


def message(group: int, user: int, event: int, identity: bytes, data: bytes) -> bytes:
    """MESSAGE: ``u64`` group, ``u64`` user, ``u16`` event, ``u8`` size, the identity, the data."""
    head = MESSAGE.pack(ToZone.MESSAGE, group, user, event, len(identity))
    return b"".join((head, identity, data))


def parse_message(raw: bytes) -> UserMessage:
    _, group, user, event, size = unpack(MESSAGE, raw)
    start = MESSAGE.size + size
    if len(raw) < start:
        raise FrameError(f"an identity of {size} bytes in a message of {len(raw)}")
    return UserMessage(group, user, event, raw[MESSAGE.size : start], raw[start:])


def member(what: ToZone | ToGateway, group: int, user: int) -> bytes:
    """LEAVE, AWAY, BACK, JOIN or PART: ``u64`` group, ``u64`` user."""
    return MEMBER.pack(what, group, user)


def group(what: ToZone | ToGateway, id: int, text: str = "") -> bytes:
    """OPEN, SWITCHED, OPENED or LOST: ``u64`` group, and of LOST the reason."""
    return GROUP.pack(what, id) + _text(text)


def closed(id: int, code: int, elsewhere: int, reason: str) -> bytes:
    """CLOSED: ``u64`` group, ``u16`` refusal (0 if another zone has the group), ``u16`` the machine
    id of that zone's node, the reason.
    """
    return CLOSED.pack(ToGateway.CLOSED, id, code, elsewhere) + _text(reason)


def send(user: int, event: int, data: bytes) -> bytes:
    """SEND: ``u64`` user, ``u16`` event, the data."""
    return SEND.pack(ToGateway.SEND, user, event) + data


def broadcast(id: int, event: int, data: bytes, excluded: tuple[int, ...] = ()) -> bytes:
    """BROADCAST: ``u64`` group, ``u16`` event, ``u16`` count of users that do not get it, a ``u64``
    of each, the data.
    """
    head = BROADCAST.pack(ToGateway.BROADCAST, id, event, len(excluded))
    if not excluded:
        return head + data
    return b"".join((head, struct.pack(f"<{len(excluded)}Q", *excluded), data))


def parse_broadcast(raw: bytes) -> tuple[int, int, tuple[int, ...], bytes]:
    """Group, event, whom it excludes, data."""
    _, id, event, count = unpack(BROADCAST, raw)
    start = BROADCAST.size + 8 * count
    if len(raw) < start:
        raise FrameError(f"{count} users in a message of {len(raw)} bytes")
    excluded = struct.unpack_from(f"<{count}Q", raw, BROADCAST.size) if count else ()
    return id, event, excluded, raw[start:]


def refused(id: int, user: int, event: int, code: int, reason: str) -> bytes:
    """REFUSED: ``u64`` group, ``u64`` user, ``u16`` event, ``u16`` refusal, the reason."""
    return REFUSED.pack(ToGateway.REFUSED, id, user, event, code) + _text(reason)


def moved(id: int, machine: int) -> bytes:
    """MOVED: ``u64`` group, ``u16`` machine id of the node that has it from now on, or 65535: none
    has. The gateway answers with SWITCHED, after which it sends this zone nothing for the group.
    """
    return MOVED.pack(ToGateway.MOVED, id, machine)


def _text(reason: str) -> bytes:
    """What goes over the mesh of it: no text is refused, whatever a program has said."""
    return clipped(reason, _MOST_TEXT)


def rest(form: struct.Struct, raw: bytes) -> bytes:
    """What follows the fields."""
    return raw[form.size :]


def text(form: struct.Struct, raw: bytes) -> str:
    """The text that follows the fields."""
    return raw[form.size :].decode("utf-8", "replace")
