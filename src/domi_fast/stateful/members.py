"""The members of a group as others see them, and the events by which one hears of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import Final

from ..gateway.events import LAST_EVENT, USER_EVENT, LibraryEvent

OF_MEMBERS: Final = (LibraryEvent.LEAVE, LibraryEvent.AWAY, LibraryEvent.BACK)
"""The events of the library that groups can handle."""


class Users(AbstractSet[int]):
    """The members of a group; a live view."""

    def __init__(self, users: AbstractSet[int]) -> None:
        self._users = users

    @classmethod
    def _from_iterable(cls, users: Iterable[int]) -> AbstractSet[int]:  # type: ignore[override]
        return set(users)

    def __contains__(self, user: object) -> bool:
        return user in self._users

    def __iter__(self) -> Iterator[int]:
        # A handler may remove those that it goes through.
        return iter(list(self._users))

    def __len__(self) -> int:
        return len(self._users)

    def __repr__(self) -> str:
        return f"Users({set(self._users)!r})"


def as_bytes(data: object) -> bytes:
    """What a message has for data. Raises TypeError for what is not bytes-like."""
    if isinstance(data, bytes):
        return data
    if isinstance(data, (bytearray, memoryview)):
        return bytes(data)
    raise TypeError(f"data of type {type(data).__name__}: bytes are wanted")


def check_event(event: object, beside: tuple[LibraryEvent, ...] = ()) -> None:
    """Raise ValueError unless it is an event of programs, or one of ``beside``."""
    if not isinstance(event, int) or isinstance(event, bool) or not 0 <= event <= LAST_EVENT:
        raise ValueError(f"event {event!r}: an int from {USER_EVENT} to {LAST_EVENT} is wanted")
    if event < USER_EVENT and event not in beside:
        known = ", ".join(f"{each.name} ({int(each)})" for each in OF_MEMBERS)
        raise ValueError(
            f"event {int(event)} is the library's own: programs have {USER_EVENT} to {LAST_EVENT}, "
            f"and groups can handle {known}"
        )
