"""Message: what a handler of a group is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .group import Group


@dataclass(frozen=True, slots=True)
class Message:
    """What a user has said to a group, or what has become of a member.

    :ivar user: the user's id; it need not be a member.
    :ivar event: 50-65535, or LEAVE, AWAY or BACK of
        :class:`~domi_fast.gateway.events.LibraryEvent`.
    :ivar identity: what the gateway's ``authenticate`` has said who this is; empty for library
        events.
    """

    group: Group = field(repr=False)
    user: int
    event: int
    data: bytes
    identity: bytes = b""

    def reply(self, event: int, data: bytes) -> None:
        """Send to the user alone. Raises as :meth:`Group.send` does."""
        self.group.send(self.user, event, data)
