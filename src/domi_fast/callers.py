"""Who has connected to a node, and how many of them there may be: in all, and of one address."""

from __future__ import annotations

import ipaddress
import logging
import resource
from collections import Counter
from dataclasses import dataclass

from ._core import Session

log = logging.getLogger(__name__)

# Each costs some 2.5 KiB; with TLS, up to 200 KiB.
HANDSHAKES, TLS_HANDSHAKES = 1024, 256
# Of a process that may have as many descriptors as it likes.
SESSIONS = 1 << 20


@dataclass(frozen=True)
class Reached:
    """A limit that is reached.

    :ivar setting: its name.
    :ivar caller: of which address; None: of all.
    """

    setting: str
    limit: int
    caller: str | None

    def __str__(self) -> str:
        whose = "this node" if self.caller is None else self.caller
        what = "incomplete handshakes" if "handshakes" in self.setting else "connections"
        return f"{whose} has {self.limit} {what}, as many as it may ({self.setting})"


def most_handshakes(tls: bool) -> int:
    """Incomplete ones of one address, where nobody says how many: at most a quarter of the
    descriptors that this process may have.
    """
    return max(1, min(TLS_HANDSHAKES if tls else HANDSHAKES, _descriptors() // 4))


def _descriptors() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return SESSIONS if soft == resource.RLIM_INFINITY else soft


class Callers:
    """The connections that others have made, by address. Belongs to the loop's thread.

    A UNIX socket is one address, and so are the 2**64 of an IPv6 network.

    :param handshakes: that are incomplete, of one address at a time.
    :param sessions: in all; None: three quarters of the descriptors that this process may have.
    :param of_an_address: of one address; None: half of ``sessions``.
    """

    def __init__(self, handshakes: int, sessions: int | None, of_an_address: int | None) -> None:
        self._most_handshakes = handshakes
        self._most = sessions or max(1, _descriptors() * 3 // 4)
        self._most_of_one = of_an_address or max(1, self._most // 2)
        self._incomplete: dict[Session, str] = {}
        self._connected: dict[Session, str] = {}
        self._handshakes: Counter[str] = Counter()
        self._sessions: Counter[str] = Counter()
        self._told: set[tuple[str, str | None]] = set()

    def reached(self, address: str) -> Reached | None:
        """The limit that forbids one more connection from there; None: there is none.

        Each is logged when it is reached, and again when there has been room meanwhile.
        """
        caller = _host(address)
        found = None
        if len(self._connected) >= self._most:
            found = Reached("session_limit", self._most, None)
        elif self._sessions[caller] >= self._most_of_one:
            found = Reached("sessions_per_address", self._most_of_one, caller)
        elif self._handshakes[caller] >= self._most_handshakes:
            found = Reached("handshakes_per_address", self._most_handshakes, caller)
        if found is not None and (found.setting, found.caller) not in self._told:
            self._told.add((found.setting, found.caller))
            log.warning("%s: more are closed at once", found, extra={"domi_address": address})
        return found

    def began(self, session: Session) -> None:
        """It is there, and its handshake begins."""
        caller = _host(session.address)
        self._connected[session] = self._incomplete[session] = caller
        self._handshakes[caller] += 1
        self._sessions[caller] += 1

    def completed(self, session: Session) -> None:
        """Its handshake is complete, or over; it may be said of those that were dialled too."""
        caller = self._incomplete.pop(session, None)
        if caller is not None:
            self._less(self._handshakes, caller, self._most_handshakes, "handshakes_per_address")

    def left(self, session: Session) -> None:
        """It is closed."""
        self.completed(session)
        caller = self._connected.pop(session, None)
        if caller is None:
            return
        self._less(self._sessions, caller, self._most_of_one, "sessions_per_address")
        if self._told and len(self._connected) <= self._most // 2:
            self._told.discard(("session_limit", None))

    def _less(self, counts: Counter[str], caller: str, most: int, setting: str) -> None:
        left = counts[caller] - 1
        if left:
            counts[caller] = left
        else:
            del counts[caller]
        if self._told and left <= most // 2:
            self._told.discard((setting, caller))


def _host(address: str) -> str:
    if address.startswith("unix:"):
        return address
    host = address.rpartition(":")[0]
    if ":" not in host:
        return host
    whole = ipaddress.IPv6Address(host.partition("%")[0])
    if whole.ipv4_mapped is not None:
        return str(whole.ipv4_mapped)
    network = int(whole) >> 64
    return str(ipaddress.IPv6Network((network << 64, 64)))
