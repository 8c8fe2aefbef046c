"""Sessions: what is known of a client, over all its connections.

A session begins with HELLO, outlives its connection by the time of grace, and keeps the last frames
that were sent, so that a client which comes back gets those that it has not had. Everything here
belongs to the gateway's loop.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from .events import CloseCode
from .ids import Ids

_TOKEN_SIZE: Final = 16


def into_nothing(data: bytes) -> None:
    """What is written where there is no connection, or one that is closed."""


class Carrier(Protocol):
    """What a session needs of its connection; see :class:`~.connection.Connection`."""

    address: str
    session: Session | None
    wrap: Callable[[bytes], bytes]
    write: Callable[[bytes], object]

    def close(self, code: CloseCode, reason: str) -> None: ...


class Session:
    """A client that was let in.

    :ivar user: its id of 64 bits, which no other user of the cluster has.
    :ivar identity: what ``authenticate`` has said who it is.
    :ivar connection: the one that it has at present; None while it is away.
    :ivar write: writes to that connection what ``wrap`` has made of a frame; nothing without one.
    :ivar wrap: what that connection, or the last one, makes of a frame.
    :ivar sent: counted frames that were sent in it, or kept for it.
    :ivar received: counted frames that have come in it.
    :ivar kept: the last of those that were sent; for one more than it may have, the first goes.
    :ivar large: how many of them are large: all that are not would be within the bytes that may be
        kept.
    :ivar kept_bytes: how many bytes they have together; only while one is large.
    """

    __slots__ = (
        "connection",
        "identity",
        "kept",
        "kept_bytes",
        "large",
        "received",
        "sent",
        "timer",
        "token",
        "user",
        "wrap",
        "write",
    )

    def __init__(self, user: int, identity: bytes, history: int) -> None:
        self.user = user
        self.token = secrets.token_bytes(_TOKEN_SIZE)
        self.identity = identity
        self.connection: Carrier | None = None
        self.write: Callable[[bytes], object] = into_nothing
        self.wrap: Callable[[bytes], bytes] | None = None
        self.sent = 0
        self.received = 0
        self.kept: deque[bytes] = deque(maxlen=history)
        self.kept_bytes = 0
        self.large = 0
        self.timer: asyncio.TimerHandle | None = None

    @property
    def id(self) -> bytes:
        """What the client shows to get this session again; nobody else may know it."""
        return self.user.to_bytes(8, "little") + self.token

    def __repr__(self) -> str:
        state = "away" if self.connection is None else f"at {self.connection.address}"
        return f"<Session {self.user} {state}>"


class Sessions:
    """The sessions of a gateway, by user.

    :param grace: seconds that one outlives its connection.
    :param history: frames that are kept of each, at most,
    :param history_bytes: and bytes.
    :param most_away: how many may be without a connection.
    :param ended: called with each that is over.
    """

    def __init__(
        self,
        grace: float,
        history: int,
        history_bytes: int,
        most_away: int,
        ended: Callable[[Session], None],
    ) -> None:
        self._ids = Ids(0)
        self._grace = grace
        self._history = history if grace > 0 else 0
        self._history_bytes = history_bytes
        # The bytes of frames that are no larger need not be counted. Where none is kept, none is.
        self._small = history_bytes // self._history if self._history else sys.maxsize
        self._most_away = most_away
        self._ended = ended
        self._sessions: dict[int, Session] = {}
        # By user, who has been away for longest first.
        self._away: dict[int, Session] = {}

    def number(self, ids: Ids) -> None:
        """Those that begin from now on have these ids."""
        self._ids = ids

    def end_all(self) -> None:
        """All are over."""
        for session in self:
            self.end(session)

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def get(self, user: int) -> Session | None:
        return self._sessions.get(user)

    def begin(self, identity: bytes) -> Session:
        session = Session(self._ids.next(), identity, self._history)
        self._sessions[session.user] = session
        return session

    def find(self, id: bytes, received: int) -> Session | str:
        """The session that a client shows the id of, or why it cannot be resumed.

        :param received: counted frames of it that the client says it has.
        """
        session = self._sessions.get(int.from_bytes(id[:8], "little"))
        if session is None or not hmac.compare_digest(session.token, id[8:]):
            return "there is no such session here: it is over, or that of another gateway"
        missed = session.sent - received
        if missed < 0:
            return f"{received} frames are more than were sent: {session.sent}"
        if missed > len(session.kept):
            return f"{missed} frames were missed, and {len(session.kept)} are kept"
        return session

    def missed(self, session: Session, received: int) -> list[bytes]:
        """The frames behind the first ``received``."""
        count = session.sent - received
        return list(session.kept)[len(session.kept) - count :] if count else []

    def send(self, session: Session, frame: bytes) -> None:
        """Have the client get the frame, now or when it is back."""
        self.send_all((session,), frame)

    def send_all(self, sessions: Iterator[Session] | tuple[Session, ...], frame: bytes) -> None:
        """Have all these clients get the frame, now or when they are back."""
        # Two loops: after each write, which goes to the kernel, what the next session has would
        # have to come from memory again, and so would the code that looks at it.
        is_large = len(frame) > self._small
        by_wrap: dict[Callable[[bytes], bytes] | None, list[Callable[[bytes], object]]] = {}
        writes = by_wrap[None] = []
        wrap = None
        for session in sessions:
            session.sent += 1
            if is_large or session.large:
                self._keep(session, frame)
            else:
                session.kept.append(frame)
            if session.wrap is not wrap:
                wrap = session.wrap
                writes = by_wrap.setdefault(wrap, [])
            writes.append(session.write)
        for wrap, writes in by_wrap.items():
            wrapped = b"" if wrap is None else wrap(frame)
            for write in writes:
                write(wrapped)

    def _keep(self, session: Session, frame: bytes) -> None:
        """Keep a frame where a large one is kept already, or is this one."""
        kept = session.kept
        if not session.large:
            session.kept_bytes = sum(map(len, kept))
        if len(kept) == self._history:
            self._drop_first(session)
        kept.append(frame)
        session.kept_bytes += len(frame)
        session.large += len(frame) > self._small
        while session.kept_bytes > self._history_bytes:
            self._drop_first(session)

    def _drop_first(self, session: Session) -> None:
        size = len(session.kept.popleft())
        session.kept_bytes -= size
        session.large -= size > self._small

    def attach(self, session: Session, connection: Carrier) -> None:
        """The client is there, by this connection."""
        self._forget_absence(session)
        session.connection = connection
        session.write, session.wrap = connection.write, connection.wrap
        connection.session = session

    def detach(self, session: Session) -> bool:
        """Its connection is gone; whether the session goes on without."""
        session.connection = None
        session.write = into_nothing
        if self._grace <= 0:
            self.end(session)
            return False
        if len(self._away) >= self._most_away:
            self.end(next(iter(self._away.values())))
        loop = asyncio.get_running_loop()
        session.timer = loop.call_later(self._grace, self.end, session)
        self._away[session.user] = session
        return True

    def _forget_absence(self, session: Session) -> None:
        self._away.pop(session.user, None)
        if session.timer is not None:
            session.timer.cancel()
            session.timer = None

    def end(self, session: Session) -> None:
        """It is over. A second call does nothing."""
        if self._sessions.pop(session.user, None) is None:
            return
        self._forget_absence(session)
        connection, session.connection = session.connection, None
        session.write = into_nothing
        if connection is not None:
            connection.session = None
        session.kept.clear()
        self._ended(session)
