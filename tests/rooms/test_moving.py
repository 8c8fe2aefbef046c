"""Groups that move while their members talk: nobody notices but by a pause."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random

import pytest

from tests.conftest import SOAK
from tests.rooms.groups import Ledger
from tests.rooms.member import Member
from tests.rooms.parts import acquainted, gateway, zone
from tests.support import until

HAND_OVERS = 1000 if SOAK else 100
GROUP_ID = 7
PAUSE = 1.0


async def settled(room: Ledger, members: list[Member]) -> None:
    """Until the group has had all that was said to it, and the members all that it has said."""
    await until(lambda: all(room.turns.get(m.user, 0) == m.said for m in members), 30)
    await until(lambda: all(m.serials and m.serials[-1] == room.said - 1 for m in members), 30)


@pytest.mark.parametrize("losing", [False, True], ids=["steady", "losing connections"])
async def test_a_hundred_hand_overs_under_load(
    registry_url: str, losing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        zones = [await enter(zone(registry_url)) for _ in range(3)]
        gates = [await enter(gateway(registry_url)) for _ in range(2)]
        await acquainted(gates, zones)
        members = [
            await enter(Member(gate, carrier, GROUP_ID))
            for gate in gates
            for carrier in ("tcp", "websocket") * 2
        ]
        for member in members:
            member.talk(0.02)
        chance = random.Random(1)
        here = next(each for each in zones if GROUP_ID in each.groups)
        others = itertools.cycle(zones)
        for number in range(HAND_OVERS):
            there = next(each for each in others if each is not here)
            if losing and number % 2 == 0:
                for member in chance.sample(members, 2):
                    member.cut()
            await asyncio.wait_for(here.hand_over(GROUP_ID, there.node.id), 10)
            assert [GROUP_ID in each.groups for each in zones] == [z is there for z in zones]
            here = there
            await asyncio.sleep(chance.random() * 0.02)
        for member in members:
            await member.hush()
        room = here.group(GROUP_ID)
        assert isinstance(room, Ledger)
        await settled(room, members)
        assert room.faults == []
        assert len(room) == len(members)
        for member in members:
            assert member.faults == []
            first = member.serials[0]
            assert member.serials == list(range(first, room.said))
        assert sum(member.said for member in members) == room.said > HAND_OVERS
        resumed = sum(member.resumptions for member in members)
        assert resumed >= HAND_OVERS / 2 if losing else resumed == 0
        gap = max(member.longest_gap for member in members)
        with capsys.disabled():
            print(f" {room.said} messages, {resumed} resumed, longest pause {gap * 1000:.0f} ms")
        assert gap < PAUSE
