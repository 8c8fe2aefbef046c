"""Rate limiter: how many bytes a second a node sends."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import check_number


@dataclass(frozen=True)
class RateLimit:
    """A token bucket: ``rate_limit=`` of a node for all its peers, ``peer_rate_limit=`` for each.

    Frames of users' channels count, headers included; answers, heartbeats and what else the library
    says do not. Beyond the limit the verbs raise Overloaded, and ``await node.drained(peer)`` waits
    until something may pass again. What a node sends to itself is not limited.

    :ivar rate: bytes a second, 1 to 1e18.
    :ivar size: bytes that may go at once after a pause, 1 to 1e18. A larger frame passes when the
        bucket is not empty, and is paid for afterwards.
    :raises ValueError: one of them is out of its range.
    """

    rate: float
    size: float

    def __post_init__(self) -> None:
        check_number("rate", self.rate, 1, 1e18)
        check_number("size", self.size, 1, 1e18)
