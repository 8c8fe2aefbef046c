"""What the clients of the measured gateway say and get, in bytes on the wire."""

from __future__ import annotations

import struct

from domi_fast import encode_frame
from domi_fast.gateway import LibraryEvent

GROUP = 1
JOIN, JOINED, NEWS = 50, 51, 52
FRAME_HEAD = 8  # bytes of a frame in front of its data
STAMP = struct.Struct("<Q")  # nanoseconds of the monotonic clock; 0 for a message that counts not
MOST_SHORT = 125  # bytes of a WebSocket's message whose length is in the first two

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)

__all__ = [
    "FRAME_HEAD",
    "GROUP",
    "JOIN",
    "JOINED",
    "JOINING",
    "NEWS",
    "STAMP",
    "UPGRADE",
    "WELCOMED",
    "size_of",
    "user_of",
]


def to_gateway(frame: bytes) -> bytes:
    """A short frame as a client's WebSocket message; a mask of zeros leaves it as it is."""
    return bytes((0x82, 0x80 | len(frame))) + bytes(4) + frame


def size_of(data: int) -> int:
    """Bytes on the wire of a message to a client with so much data."""
    message = FRAME_HEAD + data
    return message + (2 if message <= MOST_SHORT else 4)


def user_of(welcome: bytes) -> int:
    """Who has got this WELCOME, which is a short message."""
    start = 2 + FRAME_HEAD
    return int.from_bytes(welcome[start : start + 8], "little")


JOINING = to_gateway(encode_frame(LibraryEvent.HELLO, b"")) + to_gateway(
    encode_frame(LibraryEvent.GROUP, b"", struct.pack("<QQH", 0, GROUP, JOIN))
)
"""HELLO, and the wish to be a member of the group."""
WELCOMED = size_of(28) + size_of(0)
"""Bytes of WELCOME, and of the group's answer."""
