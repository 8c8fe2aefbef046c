"""What the watches of all backends have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import Protocol

from ..errors import RegistryError
from .base import Event


class Watched(Protocol):
    """What a watch needs of its registry."""

    _closed: bool

    def _check(self) -> None:
        """Raise RegistryError unless this is the loop of an open registry."""


class OpenedWatch(ABC):
    """See :class:`~domi_fast.registry.base.Watch`. A backend adds how events come.

    :ivar events: those that nobody has taken yet.
    """

    def __init__(self, registry: Watched) -> None:
        self.events: deque[Event] = deque()
        self._watched = registry
        self._ended = False
        self._waiting = False

    @property
    def over(self) -> bool:
        """No more events are wanted."""
        return self._ended or self._watched._closed

    @abstractmethod
    async def _more(self) -> None:
        """Wait until there may be events, or until the registry says that something has changed.

        A cancelled one loses nothing.
        """

    def __aiter__(self) -> OpenedWatch:
        return self

    async def __anext__(self) -> Event:
        if self._waiting:
            raise RegistryError("two tasks wait in one watch; open a watch for each")
        self._waiting = True
        try:
            while not self.over:
                if self.events:
                    return self.events.popleft()
                self._watched._check()
                await self._more()
            raise StopAsyncIteration
        finally:
            self._waiting = False

    async def aclose(self) -> None:
        self.end()

    def end(self) -> None:
        """On the loop: no more events. A backend adds how ``_more`` comes to its end."""
        self._ended = True
        self.events.clear()
