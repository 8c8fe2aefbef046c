"""The frames of clients: the mesh's own layout, whose channel is called an event here.

``u32`` length, ``u16`` extend size, ``u16`` event, data, extend; little-endian. Only GROUP has an
extend: the node, the group and the event that the data is for.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from .. import FrameError, encode_frame
from .events import LibraryEvent

HEADER: Final = struct.Struct("<IHH")
ADDRESS: Final = struct.Struct("<QQH")
SESSION_SIZE: Final = 24
"""Bytes of a session id: the user's id (u64), then 16 that nobody can guess."""
WELCOME: Final = struct.Struct("<24sI")
RESUME: Final = struct.Struct("<24sQ")
RESUMED: Final = struct.Struct("<QI")
_BYE: Final = struct.Struct("<H")
_REFUSED: Final = struct.Struct("<QHH")
_LOST: Final = struct.Struct("<Q")

PING: Final = b"ping"
PONG: Final = b"pong"
_MOST_TEXT: Final = 1024


class Address(NamedTuple):
    """Where a message of a client goes.

    :ivar node: the id of a zone, or the machine id of its node: either says which service is meant;
        0 is the gateway's own choice.
    """

    node: int
    group: int
    event: int


class ClientFrame(NamedTuple):
    event: int
    data: bytes
    extend: bytes


def parse(message: bytes) -> ClientFrame:
    """The one frame that a whole message is.

    :raises FrameError: it is none, or there are bytes behind it.
    """
    if len(message) < HEADER.size:
        raise FrameError(f"a message of {len(message)} bytes: a frame has {HEADER.size} or more")
    length, extend, event = HEADER.unpack_from(message)
    if length != len(message):
        raise FrameError(
            f"a message of {len(message)} bytes whose frame has {length}: each message is one frame"
        )
    end = length - extend
    if end < HEADER.size:
        raise FrameError(f"an extend of {extend} bytes in a frame of {length}")
    return ClientFrame(event, message[HEADER.size : end], message[end:])


def address_of(extend: bytes) -> Address:
    """Where a GROUP frame goes.

    :raises FrameError: the extend is no address.
    """
    if len(extend) != ADDRESS.size:
        raise FrameError(
            f"an extend of {len(extend)} bytes: that of event {int(LibraryEvent.GROUP)} has "
            f"{ADDRESS.size}, u64 node, u64 group and u16 event"
        )
    return Address(*ADDRESS.unpack(extend))


def welcome(session: bytes, grace: float) -> bytes:
    """The client has a session.

    :param session: its id, 24 bytes.
    :param grace: seconds that it may be away.
    """
    return encode_frame(LibraryEvent.WELCOME, WELCOME.pack(session, _milliseconds(grace)))


def resumed(received: int, grace: float) -> bytes:
    """The client has its session again, in which ``received`` counted frames have come from it."""
    return encode_frame(LibraryEvent.RESUMED, RESUMED.pack(received, _milliseconds(grace)))


def expired(reason: str) -> bytes:
    """The session that the client asks for is over, or has never been."""
    return encode_frame(LibraryEvent.EXPIRED, _text(reason))


def bye(code: int, reason: str) -> bytes:
    """The gateway closes this connection."""
    return encode_frame(LibraryEvent.BYE, _BYE.pack(code) + _text(reason))


def refused(group: int, event: int, code: int, reason: str) -> bytes:
    """A message to a group was not taken. The group is 0 where it was for the gateway itself."""
    return encode_frame(LibraryEvent.REFUSED, _REFUSED.pack(group, event, code) + _text(reason))


def lost(group: int, reason: str) -> bytes:
    """The group is gone, and with it the client's membership."""
    return encode_frame(LibraryEvent.LOST, _LOST.pack(group) + _text(reason))


def clipped(text: str, most: int) -> bytes:
    """The text as UTF-8, with whole characters in at most so many bytes."""
    raw = text.encode("utf-8", "replace")
    return raw if len(raw) <= most else raw[:most].decode("utf-8", "ignore").encode()


def told(error: BaseException) -> str:
    """What a client is told of an exception: its type and text, never a traceback."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _text(text: str) -> bytes:
    return clipped(text, _MOST_TEXT)


def _milliseconds(seconds: float) -> int:
    return min(int(seconds * 1000), 0xFFFFFFFF)
