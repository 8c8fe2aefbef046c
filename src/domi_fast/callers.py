"""Who has connected to a node, and how many of them there may be: in all, and of one address."""

from __future__ import annotations

import ipaddress
import logging
from collections import Counter, OrderedDict
from dataclasses import dataclass

from ._core import Session
from .descriptors import most_descriptors

log = logging.getLogger(__name__)

# Each costs some 2.5 KiB; with TLS, up to 200 KiB.
HANDSHAKES, TLS_HANDSHAKES = 1024, 256
CONNECTIONS, INCOMPLETE = "connections", "incomplete handshakes"


@dataclass(frozen=True)
class Reached:
    """A limit that is reached.

    :ivar setting: which says how many.
    :ivar what: there are so many of.
    :ivar caller: of which address; None: of all.
    :ivar instead: who is to be closed, to make room for who comes; None: there is no room.
    """

    setting: str
    what: str
    limit: int
    caller: str | None
    instead: Session | None = None

    def __str__(self) -> str:
        whose = "this node" if self.caller is None else self.caller
        return f"{whose} has {self.limit} {self.what}, as many as it may ({self.setting})"


def most_handshakes(tls: bool) -> int:
    """Incomplete ones of one address, where nobody says how many: at most a quarter of the
    descriptors that this process may have.
    """
    return max(1, min(TLS_HANDSHAKES if tls else HANDSHAKES, most_descriptors() // 4))


class Handshakes:
    """Those that are incomplete, by address: how many there are, and which is the next to go.

    Each call takes the same time, however many there are.
    """

    def __init__(self) -> None:
        self._count = 0
        # Of each address, the oldest first: of a dict, the first key is found the later the more
        # have gone before it.
        self._of: dict[str, OrderedDict[Session, None]] = {}
        # The addresses that have so many, in the order in which they came to have them.
        self._with: list[OrderedDict[str, None]] = [OrderedDict()]

    def __len__(self) -> int:
        return self._count

    def of(self, caller: str) -> int:
        """How many this address has."""
        return len(self._of.get(caller, ()))

    def add(self, session: Session, caller: str) -> None:
        """It begins."""
        own = self._of.setdefault(caller, OrderedDict())
        self._move(caller, len(own), len(own) + 1)
        own[session] = None
        self._count += 1

    def remove(self, session: Session, caller: str) -> bool:
        """It is complete, or over; False: it was that before."""
        own = self._of.get(caller)
        if own is None or session not in own:
            return False
        self._move(caller, len(own), len(own) - 1)
        del own[session]
        if not own:
            del self._of[caller]
        self._count -= 1
        return True

    def oldest_of_most(self) -> Session:
        """The oldest one of the address that has most, since when it has; there has to be one."""
        return next(iter(self._of[next(iter(self._with[-1]))]))

    def _move(self, caller: str, before: int, after: int) -> None:
        if after == len(self._with):
            self._with.append(OrderedDict())
        self._with[after][caller] = None
        self._with[before].pop(caller, None)
        self._with[0].clear()  # who has none is forgotten
        while len(self._with) > 1 and not self._with[-1]:
            self._with.pop()


class Callers:
    """The connections that others have made, by address. Belongs to the loop's thread.

    A UNIX socket is one address, and so are the 2**64 of an IPv6 network.

    :param handshakes: that are incomplete, of one address at a time.
    :param sessions: in all; None: three quarters of the descriptors that this process may have.
        Half of them may be incomplete at a time, so that strangers leave room for the others.
    :param of_an_address: of one address; None: half of ``sessions``.
    """

    def __init__(self, handshakes: int, sessions: int | None, of_an_address: int | None) -> None:
        self._most_handshakes = handshakes
        self._most = sessions or max(1, most_descriptors() * 3 // 4)
        self._most_of_one = of_an_address or max(1, self._most // 2)
        self._most_incomplete = (self._most + 1) // 2
        self._incomplete = Handshakes()
        self._connected: dict[Session, str] = {}
        self._sessions: Counter[str] = Counter()
        self._told: set[tuple[str, str | None]] = set()

    def reached(self, address: str) -> Reached | None:
        """The limit that forbids one more connection from there, unless another goes; None: there
        is none.

        Each is logged when it is reached, and again when there has been room meanwhile.
        """
        caller = _host(address)
        found = None
        incomplete = len(self._incomplete)
        if len(self._connected) - incomplete >= self._most:
            found = Reached("session_limit", CONNECTIONS, self._most, None)
        elif self._sessions[caller] >= self._most_of_one:
            found = Reached("sessions_per_address", CONNECTIONS, self._most_of_one, caller)
        elif self._incomplete.of(caller) >= self._most_handshakes:
            found = Reached("handshakes_per_address", INCOMPLETE, self._most_handshakes, caller)
        elif incomplete >= self._most_incomplete or len(self._connected) >= self._most:
            oldest = self._incomplete.oldest_of_most()
            found = Reached("session_limit", INCOMPLETE, incomplete, None, oldest)
        if found is not None and (found.what, found.caller) not in self._told:
            self._told.add((found.what, found.caller))
            what = "for each that comes, the oldest of the address with most of them is closed"
            log.warning(
                "%s: %s",
                found,
                "more are closed at once" if found.instead is None else what,
                extra={"domi_address": address},
            )
        return found

    def began(self, session: Session) -> None:
        """It is there, and its handshake begins."""
        caller = _host(session.address)
        self._connected[session] = caller
        self._incomplete.add(session, caller)
        self._sessions[caller] += 1

    def completed(self, session: Session) -> None:
        """Its handshake is complete, or over; it may be said of those that were dialled too."""
        caller = self._connected.get(session)
        if caller is not None and self._incomplete.remove(session, caller):
            self._has_room(INCOMPLETE, caller, self._incomplete.of(caller), self._most_handshakes)
            self._has_room(INCOMPLETE, None, len(self._incomplete), self._most_incomplete)

    def left(self, session: Session) -> None:
        """It is closed."""
        self.completed(session)
        caller = self._connected.pop(session, None)
        if caller is None:
            return
        self._sessions[caller] -= 1
        self._has_room(CONNECTIONS, caller, self._sessions[caller], self._most_of_one)
        self._has_room(CONNECTIONS, None, len(self._connected) - len(self._incomplete), self._most)
        if not self._sessions[caller]:
            del self._sessions[caller]

    def _has_room(self, what: str, caller: str | None, left: int, most: int) -> None:
        if self._told and left <= most // 2:
            self._told.discard((what, caller))


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
