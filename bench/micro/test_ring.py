"""Bytes from one thread to another, against the queue that Python has for it."""

from __future__ import annotations

import queue
from typing import Any

import pytest

from domi_fast import RingBuffer

DATA = bytes(range(64))


def test_ring_put_get(measure: Any, items: int) -> None:
    ring = RingBuffer()
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    wrong = 0

    def work() -> None:
        nonlocal wrong
        for _ in range(items):
            ring.put(DATA)
            wrong += ring.get() != DATA

    def anchor() -> None:
        nonlocal wrong
        for _ in range(items):
            waiting.put(DATA)
            wrong += waiting.get_nowait() != DATA

    measure(work, anchor, items)
    assert wrong == 0
    assert len(ring) == 0
    assert waiting.empty()


@pytest.fixture
def many(items: int) -> int:
    """No more than a ring of the default size has room for."""
    return min(items, 10_000)


def test_ring_drain(measure: Any, many: int) -> None:
    """As many as are there at once; how they came there is not timed. The anchor's one by one,
    since the queue has no other way.
    """
    ring = RingBuffer()
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    drained: dict[str, list[bytes]] = {}

    def fill() -> None:
        for _ in range(many):
            ring.put(DATA)
            waiting.put(DATA)

    def work() -> None:
        drained["ring"] = ring.drain()

    def anchor() -> None:
        drained["queue"] = [waiting.get_nowait() for _ in range(many)]

    measure(work, anchor, many, fill)
    assert drained == {"ring": [DATA] * many, "queue": [DATA] * many}
