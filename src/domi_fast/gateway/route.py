"""A group as a gateway knows it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import NamedTuple

from .links import Link
from .sessions import Session


class Held(NamedTuple):
    """A message that waits for its group to be found."""

    session: Session
    event: int
    data: bytes


class Refused(Exception):
    """A group cannot be had: a :class:`~.events.Refusal`, and why."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


class Route:
    """A group as this gateway knows it.

    :ivar link: to the zone that has it, or is asked for it; None for none.
    :ivar is_open: whether messages are sent on, rather than held.
    :ivar members: this gateway's clients that are in it, by user.
    :ivar held: what waits.
    :ivar answer: what the zone that was asked has said.
    """

    __slots__ = (
        "answer",
        "group",
        "held",
        "is_open",
        "link",
        "members",
        "service",
        "task",
    )

    def __init__(self, service: str, group: int) -> None:
        self.service = service
        self.group = group
        self.link: Link | None = None
        self.is_open = False
        self.members: dict[int, Session] = {}
        self.held: deque[Held] = deque()
        self.answer: asyncio.Future[tuple[int, int, str] | None] | None = None
        self.task: asyncio.Task[None] | None = None


def is_open(route: Route) -> bool:
    """Whether it is at this moment."""
    return route.is_open
