"""What is kept of what a client was sent: as many of the last frames as the limits allow."""

from __future__ import annotations

import random
from collections import deque

import pytest

from domi_fast.gateway.sessions import Sessions


def sessions(history: int, history_bytes: int, grace: float = 30.0) -> Sessions:
    return Sessions(grace, history, history_bytes, 10, lambda session: None)


def test_without_grace_nothing_is_kept() -> None:
    known = sessions(16, 1000, grace=0.0)
    session = known.begin(b"")
    for size in (8, 2000):
        known.send(session, bytes(size))
    assert (list(session.kept), session.sent) == ([], 2)


@pytest.mark.parametrize("history", [0, 1, 2, 5, 16])
@pytest.mark.parametrize("history_bytes", [0, 8, 40, 100, 1000])
def test_it_is_as_if_each_byte_was_counted(history: int, history_bytes: int) -> None:
    for seed in range(20):
        chance = random.Random(seed)
        known = sessions(history, history_bytes)
        session = known.begin(b"")
        kept: deque[bytes] = deque()
        for number in range(100):
            size = chance.choice((8, 9, 20, chance.randint(8, 300)))
            kept.append(bytes((number,)) * size)
            known.send(session, kept[-1])
            while len(kept) > history or sum(map(len, kept)) > history_bytes:
                kept.popleft()
            assert list(session.kept) == list(kept)
        assert session.sent == 100
