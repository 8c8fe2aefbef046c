"""A fuzz target: the frame reader, given any bytes in any pieces.

An input is a byte of switches (limit, magic, number of cuts), that many cuts, and the stream. A cut
is the size of a piece, or says that so many zeros come between the input's, which the frames that
are received in place need; the cuts are gone through again and again. Every input is received as a
session receives it (reader.pyx), and what comes out accounts for every byte that went in. A part of
them goes through ``feed`` as well, and has to be what ``tests.reference`` makes of it.
"""

from __future__ import annotations

import sys
import zlib

import atheris
from fuzz_reader import run, settings, split

from domi_fast._core import FrameReader
from domi_fast.errors import FrameError
from tests.reference import Decoder, Refused

# The oracle costs a hundred times as much as what it judges.
JUDGED = 64


def target(data: bytes) -> None:
    if not data:
        return
    if zlib.crc32(data) % JUDGED:
        run(data)
    else:
        judge(data)


def judge(data: bytes) -> None:
    """Both ways to read it agree with the reference, piece by piece."""
    limit, magic = settings(data)
    reader, reference = FrameReader(limit, magic=magic), Decoder(limit, magic=magic)
    fault = None
    for piece in split(data):
        try:
            expected = reference.feed(piece)
        except Refused as refused:
            fault = str(refused)
            assert reason(reader, piece) == fault
            assert reader.pending == 0
            assert reason(reader, b"x") == fault  # a fault is final
            break
        assert reader.feed(piece) == expected
        assert reader.pending == reference.pending
    received: list[tuple[int, bytes, bytes]] = []
    assert run(data, received) == fault
    assert received == reference.frames


def reason(reader: FrameReader, piece: bytes) -> str | None:
    """Why it refuses this, if it does."""
    try:
        reader.feed(piece)
    except FrameError as error:
        return str(error)
    return None


if __name__ == "__main__":
    # The command by which libFuzzer runs this again, in a shell, when it merges.
    again = f"{sys.executable} -m tests.fuzz.frames"
    atheris.Setup([again, *sys.argv[1:]], target)
    atheris.Fuzz()
