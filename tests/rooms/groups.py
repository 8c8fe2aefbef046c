"""A group that numbers what it says, so that members see what is lost, doubled or out of order."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

from domi_fast.gateway import LibraryEvent
from domi_fast.stateful import Group, Message, Zone

JOIN, SAY, SAID, GONE, AWAY, BACK, OTHERS = 50, 51, 52, 53, 54, 55, 56
SPOKEN = struct.Struct("<QQI")
"""Of SAID: the number of what the group says, who has said it to the group, and its number."""


class Ledger(Group):
    """JOIN makes the sender a member. SAY bears a number that grows by one with each, and is said
    to all as SAID; OTHERS goes to all but who said it. That a member has left, is away or back
    is said to the others, as GONE, AWAY and BACK.

    :ivar turns: the number that each user says next.
    :ivar faults: what came out of turn.
    """

    def __init__(self, id: int, zone: Zone) -> None:
        super().__init__(id, zone)
        self.said = 0
        self.turns: dict[int, int] = {}
        self.faults: list[str] = []
        self.handle(JOIN, self.on_join)
        self.handle(SAY, self.on_say)
        self.handle(OTHERS, self.on_others)
        for event, word in (
            (LibraryEvent.LEAVE, GONE),
            (LibraryEvent.AWAY, AWAY),
            (LibraryEvent.BACK, BACK),
        ):
            self.handle(event, self.tells(word))

    def on_join(self, message: Message) -> None:
        self.add_user(message.user)
        message.reply(JOIN, b"%d" % self.said)

    def on_say(self, message: Message) -> None:
        (number,) = struct.unpack("<I", message.data)
        due = self.turns.get(message.user, 0)
        if number != due:
            self.faults.append(f"user {message.user}: {number} where {due} was due")
        self.turns[message.user] = number + 1
        self.broadcast(SAID, SPOKEN.pack(self.said, message.user, number))
        self.said += 1

    def on_others(self, message: Message) -> None:
        self.broadcast(OTHERS, message.data, exclude=message.user)

    def tells(self, event: int) -> Any:
        def tell(message: Message) -> None:
            self.broadcast(event, message.user.to_bytes(8, "little"), exclude=message.user)

        return tell

    def save(self) -> bytes:
        return json.dumps([self.said, list(self.turns.items()), self.faults]).encode()

    def load(self, state: bytes) -> None:
        self.said, turns, self.faults = json.loads(state)
        self.turns = dict(turns)


class Hall(Group):
    """JOIN makes the sender a member, and nothing else is said by itself."""

    def __init__(self, id: int, zone: Zone) -> None:
        super().__init__(id, zone)
        self.handle(JOIN, self.on_join)

    def on_join(self, message: Message) -> None:
        self.add_user(message.user)
        message.reply(JOIN, b"")


class Seats(Hall):
    """Has a seat for each member. Who leaves is waved to first, which takes a moment."""

    def __init__(self, id: int, zone: Zone) -> None:
        super().__init__(id, zone)
        self.seats: set[int] = set()
        self.handle(LibraryEvent.LEAVE, self.on_leave)

    def on_join(self, message: Message) -> None:
        super().on_join(message)
        self.seats.add(message.user)

    async def on_leave(self, message: Message) -> None:
        await asyncio.sleep(0)
        self.broadcast(GONE, message.user.to_bytes(8, "little"))
        self.seats.discard(message.user)
