"""The benchmark of fan-out: its receivers check every byte and count every frame, and who sends has
many turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import pytest

from bench.fan_out_suite import STREAM, by_turns
from bench.settings import Settings
from bench.two_process.receivers import Counted

FRAME = b"0123456789"


class Pairs:
    """What sends, and the receivers of it."""

    def __init__(self, count: int) -> None:
        pairs = [socket.socketpair() for _ in range(count)]
        self.senders = [sender for sender, _ in pairs]
        self.receivers = [receiver for _, receiver in pairs]
        self.counted = Counted(self.receivers)
        for sock in (*self.senders, *self.receivers):
            sock.setblocking(False)

    def send(self, number: int, data: bytes) -> None:
        self.senders[number].send(data)
        self.counted.readable(number)

    def word(self) -> bytes:
        """What has been said on the first socket, if anything."""
        with contextlib.suppress(BlockingIOError):
            return self.senders[0].recv(64)
        return b""


@pytest.fixture
def pairs() -> Iterator[Pairs]:
    found = Pairs(3)
    found.counted.expect(FRAME, 2, b"right", b"wrong")
    yield found
    for sock in (*found.senders, *found.receivers):
        sock.close()


def test_the_word_comes_when_each_has_all_and_the_next_round_begins(pairs: Pairs) -> None:
    for _ in range(3):
        pairs.send(0, FRAME + FRAME[:4])
        pairs.send(1, 2 * FRAME)
        pairs.send(0, FRAME[4:])
        pairs.send(2, FRAME)
        assert pairs.word() == b""
        pairs.send(2, FRAME)
        assert pairs.word() == b"right"


@pytest.mark.parametrize(
    "sent",
    [
        [2 * FRAME, 2 * FRAME, FRAME + b"012345678X"],
        [2 * FRAME, 3 * FRAME, FRAME],
        [2 * FRAME, FRAME, 4 * FRAME],
    ],
    ids=["another byte", "too many and too few", "more than all"],
)
def test_what_is_not_right_is_said(pairs: Pairs, sent: list[bytes]) -> None:
    for number, data in enumerate(sent):
        pairs.send(number, data)
    assert pairs.word() == b"wrong"


def test_what_comes_unexpected_makes_all_that_follows_wrong() -> None:
    pairs = Pairs(1)
    try:
        pairs.send(0, b"unexpected")
        pairs.word()
        pairs.counted.expect(FRAME, 1, b"right", b"wrong")
        pairs.send(0, FRAME)
        assert pairs.word() == b"wrong"
    finally:
        for sock in (*pairs.senders, *pairs.receivers):
            sock.close()


def test_a_connection_that_ends_is_said_at_once(pairs: Pairs) -> None:
    async def end() -> None:
        pairs.senders[1].close()
        pairs.counted.readable(1)

    asyncio.run(end())
    assert pairs.word() == b"wrong"


def test_the_node_and_the_loop_have_many_turns_in_a_round() -> None:
    had: list[tuple[str, int]] = []

    def measure(who: str, frames: int) -> dict[str, list[int]]:
        had.append((who, frames))
        return {"sending_ns": [len(had)], "taken_ns": [-len(had)]}

    times = by_turns(0, Settings(1, smoke=False, cpus=(0, 1)), measure)
    single = [who for who, frames in had if frames == 1]
    assert single == ["anchor", "ours", "ours", "anchor"] * 5
    assert [who for who, frames in had if frames == STREAM] == single[:6]
    # The sender of many has just sent one.
    assert all(had[at - 1] == (who, 1) for at, (who, n) in enumerate(had) if n == STREAM)
    assert {key: len(of["sending_ns"]) for key, of in times.items()} == {
        ("ours", 1): 10,
        ("ours", STREAM): 3,
        ("anchor", 1): 10,
        ("anchor", STREAM): 3,
    }
    for (who, frames), of in times.items():
        assert of["taken_ns"] == [-at for at in of["sending_ns"]]
        assert {had[at - 1] for at in of["sending_ns"]} == {(who, frames)}
