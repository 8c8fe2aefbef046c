"""What happens to a node, for who wants to act on it: ``async for event in node.events()``."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from ._core import printable

EventKind = Literal["joined", "left", "refused", "overloaded"]


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    :ivar kind: ``joined``: a peer is there, and its channels are known; ``left``: its session is
        over; ``refused``: a connection was closed because its other end does not belong here, or
        said what it may not; ``overloaded``: the queue for a peer was full, once in a while, or
        this process has no descriptors for who wants to connect.
    :ivar peer: its machine id; None for a guest, and for who has not shown that it is that one.
    :ivar name: of a peer, with an escape for each character that is not printable; empty where it
        is not known.
    :ivar address: where the connection leads, for people.
    :ivar reason: for people; of a peer that has joined, empty.
    :ivar at: seconds, on the monotonic clock.
    :ivar missed: how many events before this one were dropped, because too many waited.
    """

    kind: EventKind
    peer: int | None
    name: str
    address: str
    reason: str
    at: float = field(default_factory=time.monotonic)
    missed: int = 0


class Events:
    """An iterator over what happens from now on; it ends with its node.

    Belongs to the loop's thread. One task takes from it; when ``maxsize`` events wait, the oldest
    is dropped, and the next that is taken says how many were.
    """

    def __init__(self, maxsize: int) -> None:
        if maxsize < 1:
            raise ValueError(f"maxsize {maxsize}: at least 1 event must have room")
        self._events: deque[Event] = deque()
        self._maxsize = maxsize
        self._missed = 0
        self._finished = False
        self._arrived = asyncio.Event()

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._finished:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        if self._missed:
            object.__setattr__(event, "missed", self._missed)
            self._missed = 0
        return event

    def put(self, event: Event) -> None:
        """It has happened."""
        if len(self._events) == self._maxsize:
            self._events.popleft()
            self._missed += 1
        self._events.append(event)
        self._arrived.set()

    def finish(self) -> None:
        """End the iteration, once what waits has been taken."""
        self._finished = True
        self._arrived.set()


class Witness:
    """Tells all who iterate; who has let go of its iterator is forgotten."""

    def __init__(self) -> None:
        self._watching: weakref.WeakSet[Events] = weakref.WeakSet()
        self._finished = False

    def events(self, maxsize: int = 1024) -> Events:
        """What happens from now on, as an iterator that ends when the node is closed.

        :param maxsize: how many wait at most; then the oldest is dropped, and the next says so.
        """
        events = Events(maxsize)
        if self._finished:
            events.finish()
        self._watching.add(events)
        return events

    def saw(self, kind: EventKind, peer: int | None, name: str, address: str, reason: str) -> None:
        """Something has happened. The name and the reason may be the peer's own words."""
        if not self._watching:
            return
        name, reason = printable(name), printable(reason)
        for events in list(self._watching):
            events.put(Event(kind, peer, name, address, reason))

    def finish(self) -> None:
        """Nothing more will."""
        self._finished = True
        for events in list(self._watching):
            events.finish()
