"""Groups that move while their members talk: nobody notices but by a pause."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random

import pytest

from domi_fast.gateway import Gateway
from tests.conftest import SOAK
from tests.gateway.clients import BYE, connected
from tests.rooms.groups import GONE, JOIN, Ledger
from tests.rooms.member import Member
from tests.rooms.parts import acquainted, gateway, ledger, zone
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
        room = ledger(here, GROUP_ID)
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


async def test_members_come_and_go_while_the_group_moves(registry_url: str) -> None:
    """Whoever joins or leaves at such a moment is a member, or none, on both sides afterwards."""
    over = False
    passed = 0

    async def come_and_go(gate: Gateway, carrier: str, *, farewell: bool) -> None:
        nonlocal passed
        while not over:
            async with connected(gate, carrier) as client:
                await client.hello()
                await client.write(GROUP_ID, JOIN)
                while (await client.take()).event != JOIN:
                    pass
                if farewell:
                    await client.send(BYE)
                else:
                    client.cut()
                passed += 1

    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        zones = [await enter(zone(registry_url)) for _ in range(2)]
        gates = [await enter(gateway(registry_url, grace=0.05)) for _ in range(2)]
        await acquainted(gates, zones)
        members = [await enter(Member(gate, "tcp", GROUP_ID)) for gate in gates]
        for member in members:
            member.talk(0.02)
        coming = [
            asyncio.ensure_future(come_and_go(gate, carrier, farewell=farewell))
            for gate in gates
            for carrier, farewell in (("tcp", True), ("tcp", False), ("websocket", True))
        ]
        here, there = zones if GROUP_ID in zones[0].groups else reversed(zones)
        for _ in range(HAND_OVERS):
            await asyncio.wait_for(here.hand_over(GROUP_ID, there.node.id), 10)
            here, there = there, here
            before = passed
            await until(lambda before=before: passed > before)
        over = True
        await asyncio.gather(*coming)
        for member in members:
            await member.hush()
        room = ledger(here, GROUP_ID)
        await until(lambda: room.users == {member.user for member in members})
        await settled(room, members)
        for gate, member in zip(gates, members, strict=True):
            assert member.faults == []
            gone = member.heard(GONE)
            assert len(gone) == len(set(gone)) == passed
            routes = gate._routes._routes.values()
            assert [set(route.members) for route in routes] == [{member.user}]
        assert room.faults == []
        assert passed > HAND_OVERS
