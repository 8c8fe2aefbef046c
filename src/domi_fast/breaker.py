"""Circuit breaker: when a peer that does not answer is left alone."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Breaker:
    """When a node leaves a peer alone: ``Node(breaker=Breaker(...))``.

    A failure is a request that got no answer before its deadline. As many as ``failures`` within
    ``window`` open the peer's circuit: messages go to other subscribers, and where there are none
    the verbs raise CircuitOpen. After ``pause`` the node pings the peer (half-open), again after
    each further ``pause``, and its pong closes the circuit. Answers to requests that are on their
    way still count.

    :ivar failures: how many open it, 1 to 10,000; the original's 20.
    :ivar window: seconds, of a window that rolls.
    :ivar pause: seconds.
    :raises ValueError: one of them is out of its range.
    """

    failures: int = 20
    window: float = 10.0
    pause: float = 2.0

    def __post_init__(self) -> None:
        if not isinstance(self.failures, int) or not 1 <= self.failures <= 10_000:
            raise ValueError(f"failures {self.failures}: an int of 1 to 10,000 is wanted")
        for name in ("window", "pause"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0.01 <= value <= 3600):
                raise ValueError(f"{name} {value}: seconds from 0.01 to 3600 are allowed")
