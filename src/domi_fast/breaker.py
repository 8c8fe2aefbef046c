"""Circuit breaker: when a peer that does not answer is left alone."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import check_number


@dataclass(frozen=True)
class Breaker:
    """When a node leaves a peer alone: ``Node(breaker=Breaker(...))``.

    A failure is a request that got no answer before its deadline. As many as ``failures`` within
    ``window`` open the peer's circuit: messages go to other subscribers, and where there are none
    the verbs raise CircuitOpen. After ``pause`` the node pings the peer (half-open), again after
    each further ``pause``, and its pong closes the circuit. Answers to requests that are on their
    way still count.

    :ivar failures: how many open it, 1 to 10,000; the original's 20.
    :ivar window: seconds, of a window that rolls; 0.01 to 3600.
    :ivar pause: seconds, 0.01 to 3600.
    :raises ValueError: one of them is out of its range.
    """

    failures: int = 20
    window: float = 10.0
    pause: float = 2.0

    def __post_init__(self) -> None:
        given: object = self.failures
        if not isinstance(given, int) or isinstance(given, bool) or not 1 <= given <= 10_000:
            raise ValueError(f"failures {given!r}: an int of 1 to 10,000 is wanted")
        check_number("window", self.window, 0.01, 3600)
        check_number("pause", self.pause, 0.01, 3600)
