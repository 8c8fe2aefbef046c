"""RingBuffer against a deque and a count of bytes."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from domi_fast import RingBuffer, RingFull

CAPACITY = 4096

sizes = st.one_of(
    st.integers(0, 40),
    st.integers(0, 2200),
    st.sampled_from([2039, 2040, 2041, 65535, 65536, 65537, 100_000]),
)


def room(size: int) -> int:
    """Bytes of the ring that a frame takes: a header of 8, and padding to a multiple of 8."""
    held = 8 if size > CAPACITY // 2 - 8 else size
    return 8 + (held + 7) // 8 * 8


class RingMachine(RuleBasedStateMachine):
    ring: RingBuffer

    @initialize()
    def begin(self) -> None:
        self.ring = RingBuffer(CAPACITY)
        self.model: deque[bytes] = deque()
        self.head = self.tail = 0
        self.places: deque[tuple[int, int]] = deque()
        self.count = 0
        self.lent: list[memoryview] = []

    @rule(size=sizes, kind=st.sampled_from([bytes, bytearray, memoryview]))
    def put(self, size: int, kind: type[bytes | bytearray | memoryview]) -> None:
        self.count += 1
        frame = self.count.to_bytes(4, "little") * (size // 4) + b"\xff" * (size % 4)
        rest = CAPACITY - self.head % CAPACITY
        need = room(size) if room(size) <= rest else rest + room(size)
        if self.head + need - self.tail > CAPACITY:
            with pytest.raises(RingFull):
                self.ring.put(kind(frame))
        else:
            self.ring.put(kind(frame))
            self.head += need
            self.places.append((self.head - room(size), self.head))
            self.model.append(frame)

    def taken(self) -> bytes:
        _, self.tail = self.places.popleft()
        return self.model.popleft()

    @precondition(lambda self: not self.lent)
    @rule()
    def get(self) -> None:
        assert self.ring.get() == (self.taken() if self.model else None)

    @precondition(lambda self: not self.lent)
    @rule(limit=st.one_of(st.none(), st.integers(0, 6)))
    def drain(self, limit: int | None) -> None:
        count = len(self.model) if limit is None else min(limit, len(self.model))
        assert self.ring.drain(limit) == [self.taken() for _ in range(count)]

    @precondition(lambda self: not self.lent)
    @rule(keep=st.booleans())
    def borrow(self, keep: bool) -> None:
        if not self.model:
            with self.ring.borrow() as view:
                assert view is None
            return
        if keep:
            with pytest.raises(BufferError), self.ring.borrow() as view:  # noqa: PT012
                assert view is not None
                self.lent.append(view[:])
            self.tail, _ = self.places[0]  # the pad before it, if any, has been given back
        else:
            with self.ring.borrow() as view:
                assert view == self.model[0]
            self.taken()

    @precondition(lambda self: self.lent)
    @rule()
    def give_back(self) -> None:
        view = self.lent.pop()
        assert view == self.model[0]
        view.release()
        self.taken()

    @precondition(lambda self: self.lent)
    @rule()
    def take_while_lent(self) -> None:
        for take in (self.ring.get, self.ring.drain, self.ring.borrow().__enter__):
            with pytest.raises(BufferError):
                take()

    @invariant()
    def counts(self) -> None:
        if hasattr(self, "ring"):
            assert len(self.ring) == len(self.model)
            assert self.ring.used == self.head - self.tail


TestRing = RingMachine.TestCase
