"""Groups that tests have made."""

from __future__ import annotations

import asyncio
import json

from domi_fast.stateful import Group, Message, Zone

JOIN, SAY, SAID, WAIT, FAIL, COUNT = 50, 51, 52, 53, 54, 55


class Room(Group):
    """JOIN makes the sender a member; SAY is said to all as SAID, and kept."""

    def __init__(self, id: int, zone: Zone) -> None:
        super().__init__(id, zone)
        self.said: list[tuple[int, bytes]] = []
        self.gate = asyncio.Event()
        self.closings = 0
        self.handle(JOIN, self.on_join)
        self.handle(SAY, self.on_say)
        self.handle(WAIT, self.on_wait)
        self.handle(FAIL, self.on_fail)

    def on_join(self, message: Message) -> None:
        self.add_user(message.user)
        message.reply(JOIN, b"welcome")

    def on_say(self, message: Message) -> None:
        self.said.append((message.user, message.data))
        self.broadcast(SAID, message.data)

    async def on_wait(self, message: Message) -> None:
        self.said.append((message.user, b"waits"))
        await self.gate.wait()
        self.said.append((message.user, b"waited"))

    def on_fail(self, message: Message) -> None:
        raise LookupError("no such thing")

    def on_close(self) -> None:
        self.closings += 1

    def save(self) -> bytes:
        return json.dumps([[user, data.decode()] for user, data in self.said]).encode()

    def load(self, state: bytes) -> None:
        self.said = [(user, data.encode()) for user, data in json.loads(state)]
