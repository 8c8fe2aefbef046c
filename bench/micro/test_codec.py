"""Frames into bytes and back, against the same with ``struct`` in plain Python."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from domi_fast import FrameReader, encode_frame

DATA = b"sixteen bytes!!!"
HEADER = struct.Struct("<IHH")


def test_encode_frame(measure: Any, items: int) -> None:
    def work() -> None:
        for _ in range(items):
            encode_frame(50, DATA)

    pack = HEADER.pack

    def anchor() -> None:
        for _ in range(items):
            _ = pack(8 + len(DATA), 0, 50) + DATA

    measure(work, anchor, items)
    assert encode_frame(50, DATA) == HEADER.pack(24, 0, 50) + DATA


@pytest.fixture
def stream(items: int) -> bytes:
    """Frames of 16 bytes, half of them header, as they come out of one ``recv``."""
    return encode_frame(50, DATA[:8]) * min(items, 4096)


def test_feed(measure: Any, items: int, stream: bytes) -> None:
    reader = FrameReader()
    count = len(stream) // 16

    def work() -> int:
        return len(reader.feed(stream))

    unpack = HEADER.unpack_from

    def anchor() -> list[tuple[int, bytes]]:
        frames = []
        position = 0
        while position < len(stream):
            length, extend_size, channel = unpack(stream, position)
            end = position + length
            frames.append((channel, stream[position + 8 : end - extend_size]))
            position = end
        return frames

    measure(work, anchor, count)
    read = [(frame.channel, frame.data) for frame in reader.feed(stream)]
    assert read == anchor() == [(50, DATA[:8])] * count
