"""A new version of a service comes: the old zones take nothing new, and go in their time."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

from domi_fast import LibraryChannel, Node
from domi_fast.gateway import Gateway, wire
from domi_fast.gateway.wire import ToZone
from domi_fast.stateful import Zone
from tests.gateway.clients import HEARTBEAT, Closed, connected
from tests.rooms.groups import JOIN, Ledger
from tests.rooms.member import Member
from tests.rooms.parts import SERVICE, Memory, acquainted, gateway, ledger, zone
from tests.support import until

# Seconds that a node without a zone would have to leave in.
DEADLINE = 0.3
OLD: dict[str, Any] = {"version": "1.0", "roll_deadline": DEADLINE}
NEW: dict[str, Any] = {"version": "2.0"}


def zone_of(group: int, zones: list[Zone]) -> Zone:
    found = [each for each in zones if group in each.groups]
    assert len(found) == 1, f"group {group} is in {found}"
    return found[0]


async def a_group_in_each(
    enter: Any, gates: list[Gateway], url: str, groups: range, **settings: Any
) -> tuple[list[Zone], list[Member]]:
    """Two zones of the old version, with half of the groups each, and a member of each at each
    gateway.
    """
    zones: list[Zone] = []
    members: list[Member] = []
    for first in (0, 1):
        # The one before is full meanwhile: so it is known which has which.
        memory = Memory(0.5)
        zones.append(await enter(zone(url, node=OLD, memory=memory, **settings)))
        await acquainted(gates, zones)
        members += [
            await enter(Member(gate, carrier, group))
            for group in groups[first::2]
            for gate, carrier in zip(gates, ("tcp", "websocket"), strict=True)
        ]
        memory.share = 0.95
        await until(lambda: all(gate.zones.is_full(SERVICE) for gate in gates))
        assert set(zones[first].groups) == set(groups[first::2])
    for each in zones:
        memory_of = each.config.memory
        assert isinstance(memory_of, Memory)
        memory_of.share = 0.5
    for gate in gates:
        await until(lambda gate=gate: all(s.open for s in gate.zones.of(SERVICE)))
    return zones, members


async def test_old_zones_keep_their_groups_and_leave_with_the_last_user(registry_url: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        gates = [await enter(gateway(registry_url)) for _ in range(2)]
        groups = range(1, 9)
        old, members = await a_group_in_each(enter, gates, registry_url, groups)
        homes = {group: zone_of(group, old) for group in groups}
        for member in members:
            member.talk(0.02)
        new = await enter(zone(registry_url, node=NEW))
        await until(lambda: all(each.state == "retiring" for each in old))
        await acquainted(gates, [new])
        came = asyncio.get_running_loop().time()

        # No new group on the old ones, not even for a gateway that asks them directly.
        for gate in gates:
            for each in old:
                asked = wire.group(ToZone.OPEN, 1000 + gate.node.id)
                gate.node.notify(LibraryChannel.ZONE, asked, to=each.node.id)
        for number in range(10):
            async with connected(gates[number % 2], "tcp") as client:
                await client.hello()
                await client.write(100 + number, JOIN)
                await client.expect(JOIN)
                assert zone_of(100 + number, [*old, new]) is new

        # Those with users stay, long after a node without a zone would have been cut.
        while asyncio.get_running_loop().time() < came + 5 * DEADLINE:
            before = [len(member.serials) for member in members]
            await until(
                lambda before=before: all(
                    len(m.serials) > b for m, b in zip(members, before, strict=True)
                )
            )
            assert {group: zone_of(group, [*old, new]) for group in groups} == homes
            assert {each.node.state for each in old} == {"serving"}
        for member in members:
            await member.hush()
        rooms = {group: ledger(homes[group], group) for group in groups}
        await until(lambda: all(m.serials[-1] == rooms[m.group].said - 1 for m in members))
        assert [member.faults for member in members] == [[] for _ in members]
        assert not any(room.faults for room in rooms.values())

        # Each leaves by itself, with its last user.
        for each in old:
            mine = [member for member in members if homes[member.group] is each]
            for member in mine[:-1]:
                await member.leave()
            await until(lambda each=each: each.users == 1)
            await asyncio.sleep(2 * DEADLINE)
            assert each.node.state == "serving"
            await mine[-1].leave()
            await asyncio.wait_for(each.node.wait_closed(), 5)
            await asyncio.wait_for(each.wait_closed(), 1)
        assert new.state == "serving"
        assert new.node.state == "serving"


async def test_who_asks_between_two_versions_waits_for_the_new_one(registry_url: str) -> None:
    async with zone(registry_url, node=OLD) as old, gateway(registry_url) as gate:
        await acquainted([gate], [old])
        open_ = json.dumps(old.facts()).encode()
        async with Member(gate, "tcp", 1), connected(gate, "tcp") as client:
            await client.hello()
            # The new node is there, and its zone is not yet.
            async with Node(SERVICE, registry=registry_url, version="2.0") as node:
                await until(lambda: old.state == "retiring")
                await until(lambda: not any(each.open for each in gate.zones.of(SERVICE)))
                # The gateway has not heard it, or its message has crossed the news.
                gate.zones.heard(old.node.id, open_)
                await client.write(2, JOIN)
                for _ in range(20):
                    await client.send(HEARTBEAT, b"ping")
                    assert await client.expect(HEARTBEAT) == b"pong"
                async with Zone(node, Ledger) as new:
                    assert await client.expect(JOIN) == b"0"
                    assert 2 in new.groups
                    assert list(old.groups) == [1]


async def test_nobody_is_refused_a_new_group_while_the_versions_change(registry_url: str) -> None:
    refused: list[tuple[int, int, int, str]] = []
    opened = 0
    over = False

    async def open_groups(gate: Gateway, first: int) -> None:
        nonlocal opened
        number = first
        while not over:
            async with connected(gate, "tcp") as client:
                await client.hello()
                await client.write(number, JOIN)
                event, data = await client.take()
                if event == JOIN:
                    opened += 1
                else:
                    refused.append((number, event, *data[10:12], data[12:].decode()))
                number += 10
                # With a farewell, or it would be a member for the time of grace.
                await client.send(6)
                with contextlib.suppress(Closed):
                    await client.take()

    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        old = [await enter(zone(registry_url, node=OLD)) for _ in range(2)]
        gates = [await enter(gateway(registry_url)) for _ in range(2)]
        await acquainted(gates, old)
        opening = [
            asyncio.ensure_future(open_groups(gate, first))
            for first, gate in enumerate([*gates, *gates], 1)
        ]
        await until(lambda: opened > 20)
        for version in ("2.0", "3.0"):
            node = {"version": version, "roll_deadline": DEADLINE}
            new = await enter(zone(registry_url, node=node))
            for each in old:
                await asyncio.wait_for(each.node.wait_closed(), 10)
            before = opened
            await until(lambda before=before: opened > before + 20)
            old = [new]
        over = True
        await asyncio.gather(*opening)
        assert refused == []


async def test_groups_move_to_the_new_version_and_the_old_nodes_leave(registry_url: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        gates = [await enter(gateway(registry_url)) for _ in range(2)]
        groups = range(1, 9)
        old, members = await a_group_in_each(enter, gates, registry_url, groups, roll="hand_over")
        for member in members:
            member.talk(0.02)
        await until(lambda: all(member.serials for member in members))
        new = await enter(zone(registry_url, node=NEW))
        for each in old:
            await asyncio.wait_for(each.node.wait_closed(), 15)
        assert all(group in new.groups for group in groups)
        before = [len(member.serials) for member in members]
        await until(lambda: all(len(m.serials) > b for m, b in zip(members, before, strict=True)))
        for member in members:
            await member.hush()
        rooms = {group: ledger(new, group) for group in groups}
        await until(lambda: all(m.serials[-1] == rooms[m.group].said - 1 for m in members))
        for member in members:
            room = rooms[member.group]
            assert member.faults == []
            assert room.faults == []
            assert room.turns[member.user] == member.said
            assert max(m.longest_gap for m in members) < 1.0
