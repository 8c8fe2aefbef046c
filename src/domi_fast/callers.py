"""Who calls and has yet to complete the handshake, and how many of them one address may have."""

from __future__ import annotations

import ipaddress
import logging
import resource
from collections import Counter

from ._core import Session

log = logging.getLogger("domi_fast")

MOST = 1024


def default_most() -> int:
    """1,024, or a quarter of the descriptors that this process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else max(1, min(MOST, soft // 4))


class Callers:
    """The incomplete handshakes by address. Belongs to the loop's thread.

    A UNIX socket is one address, and so are the 2**64 of an IPv6 network.

    :param most: of one address at a time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._sessions: dict[Session, str] = {}
        self._count: Counter[str] = Counter()
        self._refused: set[str] = set()

    def admit(self, address: str) -> bool:
        """Whether one more connection from there may begin its handshake.

        The first that may not is logged; the next is when there has been room meanwhile.
        """
        caller = _host(address)
        if self._count[caller] < self._most:
            return True
        if caller not in self._refused:
            self._refused.add(caller)
            log.warning(
                "%s has %d incomplete handshakes, and more of its connections are closed at once "
                "(handshakes_per_address)",
                caller,
                self._most,
            )
        return False

    def began(self, session: Session) -> None:
        """It was admitted."""
        caller = self._sessions[session] = _host(session.address)
        self._count[caller] += 1

    def ended(self, session: Session) -> None:
        """Its handshake is complete, or it is closed; of others this may be said too."""
        caller = self._sessions.pop(session, None)
        if caller is None:
            return
        self._count[caller] -= 1
        if self._count[caller] <= self._most // 2:
            self._refused.discard(caller)
        if not self._count[caller]:
            del self._count[caller]


def _host(address: str) -> str:
    if address.startswith("unix:"):
        return address
    host = address.rpartition(":")[0]
    if ":" not in host:
        return host
    network = int(ipaddress.IPv6Address(host.partition("%")[0])) >> 64
    return str(ipaddress.IPv6Network((network << 64, 64)))
