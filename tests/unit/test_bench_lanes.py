"""The benchmark of lanes: what its channels are, and that what they bring is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

from bench.load_suite import LANES
from bench.peers.loads import Tally
from bench.two_process import channels
from bench.two_process.server import tallying


def test_the_channels_are_spread_evenly_over_the_lanes() -> None:
    for number in LANES:
        on_each = [
            sum(channel % number == lane for channel in channels.BULK) for lane in range(number)
        ]
        assert len(set(on_each)) == 1, on_each


class Message:
    """In the place of a context."""

    def __init__(self, data: bytes, is_request: bool = False) -> None:
        self.data = data
        self.is_request = is_request
        self.answer = b""

    def reply(self, answer: bytes) -> None:
        self.answer = answer


def told(handle: Callable[[Any], None]) -> dict[str, Any]:
    question = Message(b"", is_request=True)
    handle(question)
    answer: dict[str, Any] = json.loads(question.answer)
    return answer


def test_each_channel_tells_who_asks_what_has_come_and_begins_anew() -> None:
    one, other = tallying(Tally()), tallying(Tally())
    for data in (b"one", b"more"):
        one(cast(Any, Message(data)))
    assert told(other)["count"] == 0
    found = told(one)
    assert (found["count"], found["size"]) == (2, 7)
    assert told(one)["count"] == 0
