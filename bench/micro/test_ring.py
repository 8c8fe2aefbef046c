"""Bytes from one thread to another, against the queue that Python has for it."""

from __future__ import annotations

import queue
from typing import Any

import pytest

from domi_fast import RingBuffer

DATA = bytes(range(64))


def test_ring_put_get(measure: Any, items: int) -> None:
    ring = RingBuffer()
    wrong = 0

    def work() -> None:
        nonlocal wrong
        for _ in range(items):
            ring.put(DATA)
            wrong += ring.get() != DATA

    measure(work, items)
    assert wrong == 0
    assert len(ring) == 0


def test_ring_put_get_anchor(measure: Any, items: int) -> None:
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    wrong = 0

    def work() -> None:
        nonlocal wrong
        for _ in range(items):
            waiting.put(DATA)
            wrong += waiting.get_nowait() != DATA

    measure(work, items)
    assert wrong == 0
    assert waiting.empty()


@pytest.fixture
def many(items: int) -> int:
    """No more than a ring of the default size has room for."""
    return min(items, 10_000)


def test_ring_drain(measure: Any, many: int) -> None:
    """As many as are there at once; how they came there is not timed."""
    ring = RingBuffer()
    drained: list[bytes] = []

    def fill() -> None:
        for _ in range(many):
            ring.put(DATA)

    def work() -> None:
        nonlocal drained
        drained = ring.drain()

    measure(work, many, fill)
    assert drained == [DATA] * many


def test_ring_drain_anchor(measure: Any, many: int) -> None:
    """One by one, since the queue has no other way."""
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    drained: list[bytes] = []

    def fill() -> None:
        for _ in range(many):
            waiting.put(DATA)

    def work() -> None:
        nonlocal drained
        drained = [waiting.get_nowait() for _ in range(many)]

    measure(work, many, fill)
    assert drained == [DATA] * many
