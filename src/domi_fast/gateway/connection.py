"""What all connections of clients have in common, whatever carries them."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Protocol

from .events import CloseCode
from .sessions import Session, into_nothing


class Stage(Enum):
    """How far a connection is."""

    NEW = 1
    """It has said nothing yet."""
    JUDGED = 2
    """``authenticate`` is asked."""
    OPEN = 3
    """It has a session."""
    CLOSED = 4


class Listener(Protocol):
    """What hears of connections: the gateway."""

    def began(self, connection: Connection) -> bool:
        """It is there, and has said nothing yet. Whether it may stay at all."""

    def allows(self, connection: Connection) -> bool:
        """Whether one more of its messages may come; if not, it has been cut."""

    def heard(self, connection: Connection, event: int, data: bytes, extend: bytes) -> None:
        """A whole frame has come."""

    def cut(self, connection: Connection, code: CloseCode, reason: str) -> None:
        """It may not go on: close it, and end its session if that is over then."""

    def slow(self, connection: Connection, queued: int) -> None:
        """So many bytes wait to be written to it, which are too many."""

    def ended(self, connection: Connection, reason: str, *, is_over: bool) -> None:
        """It is gone. Called once.

        :param is_over: whether its session is, too.
        """

    def refusal(self) -> str | None:
        """Why no more clients are taken; None while they are."""


class Connection(ABC):
    """One connection of a client. Belongs to the gateway's loop.

    :ivar address: where it comes from, for people.
    :ivar stage: how far it is.
    :ivar session: whose it is, once it has one.
    :ivar wrap: makes of a frame what goes over this kind of connection.
    :ivar write: writes what was made of it; nothing, once it is closed.
    :ivar opened_at: when it was opened, in seconds of ``time.monotonic()``,
    :ivar heard_at: and when something came last;
    :ivar pinged: whether it was pinged since.
    :ivar waiting: frames that have come while it is judged,
    :ivar judging: by this task.
    """

    __slots__ = (
        "_counted_at",
        "_tokens",
        "address",
        "heard_at",
        "judging",
        "opened_at",
        "pinged",
        "session",
        "stage",
        "waiting",
        "write",
    )

    wrap: Callable[[bytes], bytes]
    write: Callable[[bytes], object]

    def __init__(self, burst: int) -> None:
        now = time.monotonic()
        self.address = ""
        self.stage = Stage.NEW
        self.session: Session | None = None
        self.write = into_nothing
        self.opened_at = self.heard_at = self._counted_at = now
        self.pinged = False
        self.waiting: list[tuple[int, bytes, bytes]] = []
        self.judging: asyncio.Task[None] | None = None
        self._tokens = float(burst)

    @property
    def path(self) -> str:
        """Of the WebSocket's URL, with its query; empty over raw TCP."""
        return ""

    @property
    def headers(self) -> Mapping[str, str]:
        """Of the WebSocket's request, with names in lower case; empty over raw TCP."""
        return {}

    @property
    def is_ready(self) -> bool:
        """Whether frames can go over it; before, a WebSocket's request has to come."""
        return True

    def mute(self) -> None:
        """From now on, what is written to it goes nowhere."""
        self.write = into_nothing
        if self.session is not None:
            self.session.write = into_nothing

    def send(self, frame: bytes) -> None:
        """Write a whole frame."""
        self.write(self.wrap(frame))

    @abstractmethod
    def pause(self) -> None:
        """Read nothing more for now."""

    @abstractmethod
    def resume(self) -> None:
        """Read on."""

    @abstractmethod
    def ping(self) -> None:
        """Ask for a sign of life."""

    @abstractmethod
    def close(self, code: CloseCode, reason: str) -> None:
        """Say why, and close; what hangs is cut. A second call does nothing."""

    @abstractmethod
    def abort(self, code: CloseCode, reason: str) -> None:
        """Close at once, without what waits to be written."""

    def allow(self, now: float, rate: float, burst: int) -> bool:
        """Count a message; whether it is within the limit."""
        tokens = self._tokens + (now - self._counted_at) * rate
        self._counted_at = now
        self._tokens = (burst if tokens > burst else tokens) - 1.0
        return self._tokens >= 0.0
