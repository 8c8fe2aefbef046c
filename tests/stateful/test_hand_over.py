"""Groups that move: nothing is lost, doubled or out of order for users that stay."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from domi_fast import DomiError, LibraryChannel, Node, PeerLost
from domi_fast.gateway import wire
from domi_fast.gateway.events import Refusal
from domi_fast.gateway.wire import NOWHERE, ToGateway, ToZone
from domi_fast.gateway.zones import kind_of
from domi_fast.stateful import Group, Message, Zone, zone_wire
from tests.stateful.gateway import Gateway, connected, gateway, zone
from tests.stateful.rooms import COUNT, JOIN, SAID, SAY, WAIT, Room
from tests.stateful.test_groups import joined
from tests.support import until

HAND_OVERS = 100


class Counting(Room):
    """Says to all, with a number of its own in front, what it is told; and who is out of turn."""

    def __init__(self, id: int, zone: Zone) -> None:
        super().__init__(id, zone)
        self.number = 0
        self.next: dict[int, int] = {}
        self.faults: list[str] = []
        self.handle(COUNT, self.on_count)

    async def on_count(self, message: Message) -> None:
        expected, number = self.next.get(message.user, 0), int(message.data)
        if number != expected:
            self.faults.append(f"user {message.user}: {number} where {expected} was due")
        self.next[message.user] = number + 1
        if self.number % 3 == 0:
            await asyncio.sleep(0)
        self.broadcast(SAID, b"%d" % self.number)
        self.number += 1

    def save(self) -> bytes:
        return json.dumps([self.number, list(self.next.items()), self.faults]).encode()

    def load(self, state: bytes) -> None:
        self.number, following, self.faults = json.loads(state)
        self.next = dict(following)


async def test_a_hundred_hand_overs_under_load(registry_url: str) -> None:
    async with (
        zone(registry_url, Counting) as a,
        zone(registry_url, Counting) as b,
        gateway(registry_url) as one,
        gateway(registry_url) as two,
    ):
        await connected(one, two, zones=2)
        at = {each: await joined(each, 7, 4) for each in (one, two)}
        sent: dict[int, int] = {user: 0 for users in at.values() for user in users}
        stop = False

        async def talk(by: Gateway, user: int) -> None:
            while not stop:
                by.say(user, 7, COUNT, b"%d" % sent[user])
                sent[user] += 1
                await asyncio.sleep(0.002)

        talking = [
            asyncio.ensure_future(talk(each, user)) for each, users in at.items() for user in users
        ]
        here, there = (a, b) if 7 in a.groups else (b, a)
        for _ in range(HAND_OVERS):
            await here.hand_over(7, there.node.id)
            assert 7 not in here.groups and 7 in there.groups
            here, there = there, here
            # A group that moves on at once handles nothing, and what is said to it only grows.
            await until(lambda room=here.group(7): room._mailbox.idle)
        stop = True
        await asyncio.gather(*talking)
        room = here.group(7)
        assert isinstance(room, Counting)
        await until(lambda: room.next == sent, 10)
        assert room.faults == [] and room.next == sent
        for each, users in at.items():
            for user in users:
                await until(lambda each=each, user=user: len(each.got(user, SAID)) == room.number)
                assert each.got(user, SAID) == [b"%d" % number for number in range(room.number)]
            assert not each.faults and not each.lost and not any(each.refused.values())
            assert each.moves == HAND_OVERS
        assert room.number > HAND_OVERS
