"""Memory that cannot be had: what was asked for fails, and nothing is taken for what it is not."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import resource, struct
    from domi_fast import FrameError, FrameReader, encode_frame

    # The payload of a frame that memory will not suffice for is made of frames.
    forged = encode_frame(50, b"forged")
    payload = forged * ((4 << 20) // len(forged))
    reader = FrameReader(0xFFFFFFFF)
    assert reader.feed(struct.pack("<IHH", 3 << 30, 0, 60) + bytes(60_000)) == []
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20), -1))
    failed = False
    for _ in range(1000):
        try:
            assert reader.feed(payload) == []
        except MemoryError:
            failed = True
            break
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    assert failed
    assert reader.pending == 0, reader.pending
    for data in (forged, payload, b""):
        try:
            found = reader.feed(data)
        except FrameError as error:
            assert "no memory" in str(error)
        else:
            raise AssertionError(found[:1])
    print("whole")
"""


@pytest.mark.skipif(
    os.environ.get("DOMI_SANITIZE") == "1", reason="a sanitizer reserves the address space"
)
def test_a_frame_that_memory_does_not_suffice_for() -> None:
    program = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(program, check=False, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("whole\n", 0), done.stderr
