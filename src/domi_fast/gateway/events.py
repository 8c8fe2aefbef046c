"""The events of client frames that the library keeps for itself, and what it says by them."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

USER_EVENT: Final = 50
"""The first event that belongs to programs; 1-49 are the library's."""
LAST_EVENT: Final = 65535


class LibraryEvent(IntEnum):
    """Events 1-49 (docs/protocol.md, "Clients of a gateway"). Those from 8 up are counted: a client
    that resumes says how many such frames it has, and is told how many the gateway has.
    """

    HELLO = 1
    WELCOME = 2
    RESUME = 3
    RESUMED = 4
    EXPIRED = 5
    BYE = 6
    HEARTBEAT = 7
    GROUP = 8
    REFUSED = 9
    LOST = 10
    LEAVE = 11
    """For the handlers of a group: the session of a member is over; it is no member any more."""
    AWAY = 12
    """For the handlers of a group: the connection of a member is gone; it may come back."""
    BACK = 13
    """For the handlers of a group: a member that was away has resumed its session."""


COUNTED_FROM: Final = int(LibraryEvent.GROUP)
"""Frames of this event and above are counted, and kept for a client that is away."""


class CloseCode(IntEnum):
    """Why a connection ends: the code of a WebSocket's close frame, and of BYE (RFC 6455, 7.4)."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED = 1003
    INVALID_TEXT = 1007
    POLICY = 1008
    TOO_BIG = 1009
    INTERNAL = 1011
    TRY_LATER = 1013
    UNAUTHENTICATED = 4001
    FLOOD = 4002
    SLOW = 4003
    REPLACED = 4004
    """Another connection has resumed the session."""
    SILENT = 4005


ENDS_SESSION: Final = frozenset(
    {
        CloseCode.NORMAL,
        CloseCode.PROTOCOL_ERROR,
        CloseCode.UNSUPPORTED,
        CloseCode.INVALID_TEXT,
        CloseCode.POLICY,
        CloseCode.TOO_BIG,
        CloseCode.FLOOD,
    }
)
"""After these a client does not come back: it has left, or it misbehaves."""


class Refusal(IntEnum):
    """Why a message to a group was not taken: the code in REFUSED."""

    NO_SERVICE = 1
    """No node of the cluster serves such groups."""
    NO_GROUP = 2
    """There is no such group, and none is made on demand."""
    FULL = 3
    """All zones are over their limit of memory, or of groups."""
    TIMEOUT = 4
    """No zone has answered in time."""
    OVERLOADED = 5
    """Too many messages wait, on the way or at the group."""
    NO_HANDLER = 6
    """Nobody handles this event."""
    FAILED = 7
    """The handler has raised."""
    LIMIT = 8
    """This client is in as many groups as one may be in."""
