"""What the demonstration's client and servers agree on: channels, and the messages' contents.

Started by examples/demo/main.py: python examples/demo/main.py
"""

from __future__ import annotations

import json
import random
import struct
from typing import Any

SERVERS = 3
END = b"end"  # the last message of a flood: the receiver reports what it got


class Channel:
    """Channels are numbers from 50 on; a table like this one keeps the nodes in agreement."""

    ECHO = 100  # answers with its machine id and the message backwards
    ECHO_LATER = 101  # the same from an `async def` handler
    ECHO_THREAD = 102  # the same from another thread
    INFO = 103  # answers with its name, process id and addresses
    NOTIFIED = 104  # counts and checks; reports at END
    PUBLISHED = 105  # likewise
    BULK = 106  # likewise, slowly
    STREAM = 107  # sends so many messages on FEED
    REFUSE = 108  # answers with an error
    RAISE = 109  # its handler raises
    TWICE = 110  # answers twice, and says what the second attempt raised
    SLOW = 111  # never answers in time
    DEADLINE = 112  # answers with the milliseconds that are left
    LEAVE = 113  # unsubscribes itself on the first message
    STAGE_1 = 121  # of the pipeline, each on one server
    STAGE_2 = 122
    STAGE_3 = 123

    REPLY = 200  # the client's own
    REPORT = 201
    FEED = 202
    RESULT = 203
    NEWS = 204  # the guests'
    GUEST_REPLY = 205
    GUEST_RESULT = 206
    NOBODY = 299


class Payloads:
    """Numbered messages of 32 bytes that both ends can make from the seed, and so check."""

    def __init__(self, seed: int) -> None:
        self._noise = random.Random(seed).randbytes(4096)

    def __getitem__(self, number: int) -> bytes:
        at = number % 4068
        return struct.pack("<I", number) + self._noise[at : at + 28]

    def answer(self, number: int) -> bytes:
        """What ECHO answers, after the machine id."""
        return self[number][::-1]


def number_of(data: bytes) -> int:
    return int.from_bytes(data[:4], "little")


def to_json(**facts: Any) -> bytes:
    return json.dumps(facts).encode()
