"""Balancing: which of a channel's subscribers gets a message.

``node.balance(50, "least_connections")`` sets the policy of a channel, ``Node(balance=...)`` that
of every channel without one, and ``policy=`` that of one message. The names are those of
:data:`POLICIES`; the classes behind them work on anything that is a :class:`Candidate`, and a
policy of one's own is an object of the form of :class:`Policy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ._core import (
    POLICIES,
    Candidate,
    KeyHash,
    LeastConnections,
    LeastMemory,
    PeakEwma,
    Random,
    RoundRobin,
    WeightedRandom,
    WeightedRoundRobin,
)

__all__ = [
    "POLICIES",
    "Candidate",
    "KeyHash",
    "LeastConnections",
    "LeastMemory",
    "PeakEwma",
    "Policy",
    "Random",
    "RoundRobin",
    "WeightedRandom",
    "WeightedRoundRobin",
]


class Policy(Protocol):
    """How one of several is chosen.

    Called by the thread that sends, for each message: the node's loop, or a serial thread for
    ``key=`` and ``policy=`` there. What it raises, the verb raises.
    """

    def choose(self, candidates: Sequence[Candidate], key: bytes | str | int | None) -> Candidate:
        """One of ``candidates``, of which there is one at least.

        :param key: what the sender gave as ``key=``, or None.
        """
