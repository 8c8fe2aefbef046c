"""RingBuffer: what goes in comes out, whole and in order; what has no room is refused."""

from __future__ import annotations

import array
import gc
import itertools
import os
import random
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from domi_fast import Overloaded, RingBuffer, RingFull
from tests.support import ROOT, compile_c

DEBUG, SANITIZE, SOAK = (
    os.environ.get(f"DOMI_{name}") == "1" for name in ("DEBUG", "SANITIZE", "SOAK")
)
HARNESS = ROOT / "tests" / "native" / "ring_race.c"
HEADERS = ROOT / "src" / "domi_fast" / "_core_parts"


def fill(ring: RingBuffer, frames: Iterable[bytes]) -> None:
    for frame in frames:
        ring.put(frame)


def keep(ring: RingBuffer, export: Callable[[memoryview], memoryview]) -> list[memoryview]:
    """Borrow a frame, and keep an export of it beyond the block; what was kept."""
    kept = []
    with pytest.raises(BufferError, match="still in use"), ring.borrow() as view:  # noqa: PT012
        assert view is not None
        kept.append(export(view))
    return kept


def test_frames_come_out_as_they_went_in() -> None:
    ring = RingBuffer(4096)
    assert (ring.capacity, ring.used, len(ring), ring.get()) == (4096, 0, 0, None)
    ring.put(b"one")
    ring.put(b"")
    ring.put(b"three")
    assert len(ring) == 3
    assert [ring.get(), ring.get(), ring.get(), ring.get()] == [b"one", b"", b"three", None]
    assert (ring.used, len(ring)) == (0, 0)


def test_the_default_size() -> None:
    assert RingBuffer().capacity == 2 * 1024 * 1024
    assert RingBuffer(2**12).capacity == 4096
    assert RingBuffer(2**30).capacity == 2**30


@pytest.mark.parametrize("size", [0, -4096, 2048, 4095, 4097, 6000, 2**31, 2**64, 2**70])
def test_a_size_that_is_not_allowed(size: int) -> None:
    with pytest.raises(
        ValueError, match=rf"ring size {size}: a power of two from 4096 to 1073741824"
    ):
        RingBuffer(size)


@pytest.mark.parametrize("size", ["4096", 4096.0, None, True])
def test_a_size_that_is_no_int(size: object) -> None:
    with pytest.raises(TypeError, match="an int, in bytes"):
        RingBuffer(size)  # type: ignore[arg-type]


def test_whatever_has_a_buffer() -> None:
    ring = RingBuffer(4096)
    given = [
        bytearray(b"bytearray"),
        memoryview(b"memoryview"),
        memoryview(b"slice of it")[2:7],
        array.array("H", [1, 2, 3]),
    ]
    for data in given:
        ring.put(data)
    assert ring.drain() == [bytes(data) for data in given]
    with pytest.raises(TypeError, match="str"):
        ring.put("text")  # type: ignore[arg-type]
    with pytest.raises((BufferError, ValueError, TypeError)):
        ring.put(memoryview(b"every second")[::2])
    assert len(ring) == 0


def test_what_is_put_is_a_copy() -> None:
    ring = RingBuffer(2**18)
    for size in (5, 200_000):
        data = bytearray(b"x" * size)
        ring.put(data)
        data[:] = b"y" * size
        data.clear()  # nothing holds a buffer of it
        assert ring.get() == b"x" * size


def test_large_frames_pass_by_reference() -> None:
    """Over 64 KiB, or half of the ring; none is too big."""
    ring = RingBuffer(4096)
    large = bytes(5_000_000)
    before = sys.getrefcount(large)
    for _ in range(3):
        ring.put(large)
    assert sys.getrefcount(large) == before + 3
    assert ring.used == 3 * 16
    assert ring.get() is large
    with ring.borrow() as view:
        assert view is not None
        assert view.nbytes == 5_000_000
    assert sys.getrefcount(large) == before + 1
    del ring, view
    assert sys.getrefcount(large) == before

    ring = RingBuffer()
    ring.put(bytes(65536))
    assert ring.used == 65536 + 8
    ring.put(bytes(65537))
    assert ring.used == 65536 + 8 + 16
    assert [len(frame) for frame in ring.drain()] == [65536, 65537]


def test_a_full_ring_refuses_and_keeps_what_it_has() -> None:
    ring = RingBuffer(4096)
    with pytest.raises(RingFull) as raised:
        fill(ring, (struct.pack("<I", number) * 10 for number in itertools.count()))
    assert raised.value.limit == 4096
    assert isinstance(raised.value, Overloaded)
    assert "no room for a frame of 40 bytes: 4080 of the ring's 4096 bytes" in str(raised.value)
    held = len(ring)
    assert held == 4080 // 48
    fill(ring, [bytes(100_000)])  # a reference needs 16 bytes, which are the last
    for frame in (b"", bytes(100_000)):
        with pytest.raises(RingFull):
            ring.put(frame)
    expected = [struct.pack("<I", number) * 10 for number in range(held)]
    assert ring.drain() == [*expected, bytes(100_000)]


def test_the_largest_frame_fits_wherever_the_ring_stands() -> None:
    for offset in range(0, 4096, 8):
        ring = RingBuffer(4096)
        for _ in range(offset // 8):
            ring.put(b"")
            assert ring.get() == b""
        ring.put(bytes(range(256)) * 7 + bytes(248))
        assert ring.get() == bytes(range(256)) * 7 + bytes(248)
        ring.put(b"after")
        assert ring.drain() == [b"after"]


def test_drain() -> None:
    ring = RingBuffer(4096)
    for number in range(10):
        ring.put(bytes([number]))
    assert ring.drain(3) == [b"\0", b"\1", b"\2"]
    assert ring.drain(0) == []
    assert ring.drain(100) == [bytes([number]) for number in range(3, 10)]
    assert ring.drain() == []
    with pytest.raises(ValueError, match="limit -1: at least 0"):
        ring.drain(-1)


def test_a_borrowed_frame() -> None:
    ring = RingBuffer(4096)
    ring.put(b"first")
    ring.put(b"second")
    with ring.borrow() as view:
        assert view is not None
        assert view.readonly
        assert (bytes(view), view.nbytes, len(ring)) == (b"first", 5, 2)
        ring.put(b"third")  # producers go on
        for take in (ring.get, ring.drain, ring.borrow().__enter__):
            with pytest.raises(BufferError, match="lent out"):
                take()
    assert len(ring) == 2
    with pytest.raises(ValueError, match="released"):
        bytes(view)
    assert ring.drain() == [b"second", b"third"]
    with ring.borrow() as nothing:
        assert nothing is None
    ring.put(b"x")  # and that did not lend anything out
    assert ring.get() == b"x"


def test_a_borrowed_frame_is_gone_when_its_block_raises() -> None:
    ring = RingBuffer(4096)
    ring.put(b"x")
    with pytest.raises(KeyError), ring.borrow():
        raise KeyError
    assert len(ring) == 0


@pytest.mark.parametrize("size", [8, 100_000])
def test_a_view_that_outlives_its_block(size: int) -> None:
    """Memory that somebody can see is not used again, whatever else happens."""
    ring = RingBuffer(4096)
    ring.put(b"a" * size)
    ring.put(b"b")
    kept = keep(ring, lambda view: view[2:6])
    with pytest.raises(RingFull):
        fill(ring, itertools.repeat(b"c" * 100))
    assert bytes(kept[0]) == b"aaaa"
    with pytest.raises(BufferError, match="lent out"):
        ring.get()
    assert ring.used > 4000
    kept[0].release()
    assert ring.get() == b"b"
    assert set(ring.drain()) == {b"c" * 100}


def test_an_export_of_the_view_outlives_its_block() -> None:
    ring = RingBuffer(4096)
    ring.put(b"12345678")
    kept = keep(ring, lambda view: memoryview(view).cast("Q"))
    assert kept.pop()[0] == int.from_bytes(b"12345678", sys.byteorder)
    gc.collect()
    assert ring.get() is None


def test_a_block_that_was_never_left() -> None:
    ring = RingBuffer(4096)
    ring.put(b"first")
    ring.put(b"second")
    lent = ring.borrow()
    view = lent.__enter__()
    assert view is not None
    with pytest.raises(RuntimeError, match="one with block"):
        lent.__enter__()
    del lent
    with pytest.raises(BufferError):
        ring.get()
    del ring, view  # frees the frame, the borrowing and the ring, in this order

    ring = RingBuffer(4096)
    ring.put(b"first")
    ring.put(b"second")
    view = ring.borrow().__enter__()
    del view
    assert ring.get() == b"second"


def test_a_view_shows_nothing_outside_of_its_block() -> None:
    ring = RingBuffer(4096)
    ring.put(b"x")
    lent = ring.borrow()
    with pytest.raises(BufferError, match="within its with block"):
        memoryview(lent)
    with lent:
        pass
    with pytest.raises(BufferError, match="within its with block"):
        memoryview(lent)


def test_the_text() -> None:
    ring = RingBuffer(4096)
    ring.put(b"1234")
    assert repr(ring) == "<RingBuffer of 4096 bytes, 16 used by 1 frames>"


FRAMES = 10_000_000 if SOAK else 10_000 if DEBUG or SANITIZE else 200_000


def test_four_threads_put_and_one_takes() -> None:
    """Nothing is lost, torn or out of order within a producer; the sizes are random."""
    ring = RingBuffer(2**16)
    noise = random.Random(1).randbytes(2**13)
    each = FRAMES // 4
    largest = 300
    refused = [0] * 4
    switch = sys.getswitchinterval()

    def produce(producer: int) -> None:
        draw = random.Random(producer)
        for number in range(each):
            start, size = draw.randrange(2**12), draw.randrange(largest)
            frame = struct.pack("<BIHH", producer, number, start, size)
            frame += noise[start : start + size]
            while True:
                try:
                    ring.put(frame)
                    break
                except RingFull:
                    refused[producer] += 1

    threads = [threading.Thread(target=produce, args=(producer,)) for producer in range(4)]
    expected = [0] * 4
    taken = 0
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        while taken < each * 4:
            if taken % 3:
                frames = ring.drain(100)
            else:
                with ring.borrow() as view:
                    frames = [] if view is None else [bytes(view)]
            for frame in frames:
                producer, number, start, size = struct.unpack_from("<BIHH", frame)
                assert number == expected[producer]
                expected[producer] += 1
                assert frame[9:] == noise[start : start + size]
            taken += len(frames)
    finally:
        sys.setswitchinterval(switch)
        for thread in threads:
            thread.join(60)
    assert expected == [each] * 4
    assert (ring.get(), ring.used, len(ring)) == (None, 0, 0)


SANITIZERS = {
    "plain": (["-O2"], 10_000_000),
    "thread": (["-O2", "-g", "-fsanitize=thread"], 10_000_000 if SOAK else 1_000_000),
    "address-undefined": (
        ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
        10_000_000 if SOAK else 1_000_000,
    ),
}


RINGS = [(4, 65536, 64), (4, 4096, 2040), (1, 4096, 100)]


@pytest.mark.native
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize(("producers", "capacity", "largest"), RINGS)
def test_the_ring_in_c(
    tmp_path: Path, sanitizer: str, producers: int, capacity: int, largest: int
) -> None:
    """The same code under real parallelism, and with a consumer that sleeps."""
    flags, frames = SANITIZERS[sanitizer]
    program = compile_c(HARNESS, tmp_path / "ring_race", *flags, f"-I{HEADERS}", "-pthread")
    if largest > 1000:
        frames //= 20
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [str(program), str(producers), str(frames), str(capacity), str(largest)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[:2] == ["ok", str(frames)]
