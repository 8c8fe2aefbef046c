"""Peer: a connected node, as others see it."""

from __future__ import annotations

from typing import Final

from ._core import STATE_DRAINING, STATE_PAUSED, STATE_SERVING, Session
from .handshake import Offer

STATES: Final = {STATE_SERVING: "serving", STATE_PAUSED: "paused", STATE_DRAINING: "draining"}


class Peer:
    """A connected node, as ``node.peers`` shows it. Read-only; belongs to the loop's thread.

    :ivar listener: the host and port that it listens on, as the registry has them; empty for a peer
        that speaks the plain protocol.
    """

    __slots__ = ("_offer", "_session", "id", "listener")

    def __init__(self, session: Session, listener: str) -> None:
        self._session = session
        self._offer: Offer | None = session.info
        self.id = session.peer
        self.listener = listener

    @property
    def name(self) -> str:
        """Its name; empty for a peer that speaks the plain protocol."""
        return self._offer.name if self._offer else ""

    @property
    def version(self) -> str:
        return self._offer.version if self._offer else ""

    @property
    def state(self) -> str:
        """``serving``; or ``paused`` or ``draining``, when it takes no new work."""
        return STATES[self._session.state_of_peer]

    @property
    def address(self) -> str:
        """The other end of the connection, whoever of the two has made it."""
        return self._session.address

    @property
    def channels(self) -> frozenset[int]:
        """The channels that it subscribes to, as far as it has said."""
        return self._session.subscribed

    @property
    def plain(self) -> bool:
        """Whether it speaks the plain protocol, without requests and subscriptions."""
        return not self._session.is_extended

    @property
    def queued(self) -> int:
        """Bytes that wait to be sent to it."""
        return sum(connection.queued for connection in self._session.connections)

    @property
    def phi(self) -> float:
        """How sure it is by now that the peer is dead: 3 when a silence as long as its present one
        ends by itself once in a thousand times, going by the rhythm of its heartbeats; from 0 to
        infinity, which it is once the peer is lost.
        """
        return max(connection.phi for connection in self._session.connections)

    @property
    def circuit(self) -> str:
        """``closed``; ``open`` or ``half-open`` while its circuit breaker has it left alone."""
        return self._session.circuit

    @property
    def weight(self) -> float:
        """How much it is to get, beside others, where a weighted policy chooses."""
        return self._session.candidate.weight

    @property
    def outstanding(self) -> int:
        """Requests that it was sent and that have not ended."""
        return self._session.candidate.outstanding

    @property
    def memory(self) -> float | None:
        """The share of its memory that it uses, 0-1; None until it has said."""
        share = self._session.candidate.memory
        return None if share < 0 else share

    def __repr__(self) -> str:
        return f"<Peer {self.id} {self.name!r} {self.address}>"
