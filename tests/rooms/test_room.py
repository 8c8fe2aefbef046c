"""Where new groups are made, and what is said when there is room nowhere."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

import aiohttp

from domi_fast import LibraryChannel
from domi_fast.gateway import Gateway, Refusal, wire
from domi_fast.gateway.wire import ToZone
from domi_fast.memory import used_share
from domi_fast.stateful import Zone
from tests.conftest import SOAK
from tests.gateway.clients import connected
from tests.rooms.groups import JOIN, OTHERS, Ledger
from tests.rooms.member import Member
from tests.rooms.parts import SERVICE, Memory, acquainted, gateway, zone
from tests.support import until

BOTH_AT_ONCE = 500 if SOAK else 50


async def place(gate: Gateway, service: str = SERVICE) -> tuple[int, dict[str, Any]]:
    url = f"http://127.0.0.1:{gate.http_port}/place/{service}"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, await answer.json()


async def test_all_zones_over_90_percent(registry_url: str) -> None:
    memories = [Memory(0.5), Memory(0.6)]
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        zones = [await enter(zone(registry_url, memory=each)) for each in memories]
        gates = [await enter(gateway(registry_url, http_port=0)) for _ in range(2)]
        await acquainted(gates, zones)
        members = [await enter(Member(gate, "tcp", 1)) for gate in gates]
        for member in members:
            member.talk(0.02)
        for memory in memories:
            memory.share = 0.95
        for number, gate in enumerate([*gates, *gates]):
            carrier = ("tcp", "websocket")[number % 2]
            async with connected(gate, carrier) as client:
                await client.hello()
                begun = time.monotonic()
                await client.write(100 + number, JOIN)
                group, event, code, reason = await client.refused()
                took = time.monotonic() - begun
                assert (group, event, code) == (100 + number, JOIN, Refusal.FULL)
                assert took < 1.0
                assert "95% of memory" in reason or "no room for another group" in reason
        for each in gates:
            await until(lambda gate=each: gate.zones.is_full(SERVICE))
            status, answer = await place(each)
            assert status == 503
            assert "memory" in answer["error"]
            assert "try again later" in answer["error"]
        assert sum(len(each.groups) for each in zones) == 1
        # The group that there is goes on.
        before = [len(member.serials) for member in members]
        await until(
            lambda: all(len(m.serials) > b + 5 for m, b in zip(members, before, strict=True))
        )
        newcomer = await enter(Member(gates[1], "websocket", 1))
        assert newcomer.faults == []
        # Room comes back.
        memories[1].share = 0.4
        begun = time.monotonic()
        for each in gates:
            await until(lambda gate=each: not gate.zones.is_full(SERVICE))
        assert time.monotonic() - begun < 3.0
        async with connected(gates[0], "tcp") as client:
            await client.hello()
            await client.write(200, JOIN)
            await client.expect(JOIN)
            assert 200 in zones[1].groups
        status, answer = await place(gates[0])
        assert (status, answer["machine"]) == (200, zones[1].node.id)
        for member in members:
            await member.hush()
            assert member.faults == []


async def test_what_the_machine_really_uses(registry_url: str) -> None:
    assert used_share() > 0.002, "this machine uses nothing of its memory"
    async with (
        zone(registry_url, memory_limit=0.001) as full,
        gateway(registry_url, http_port=0) as gate,
    ):
        await acquainted([gate], [full])
        async with connected(gate, "websocket") as client:
            await client.hello()
            begun = time.monotonic()
            await client.write(1, JOIN)
            group, event, code, reason = await client.refused()
            assert time.monotonic() - begun < 1.0
            assert (group, event, code) == (1, JOIN, Refusal.FULL)
            assert reason
        assert (await place(gate))[0] == 503
        async with zone(registry_url, memory_limit=1.0) as roomy:
            await acquainted([gate], [roomy])
            status, answer = await place(gate)
            assert (status, answer["machine"]) == (200, roomy.node.id)
            async with connected(gate, "tcp") as client:
                await client.hello()
                await client.write(1, JOIN)
                await client.expect(JOIN)
            assert 1 in roomy.groups
            assert 1 not in full.groups


async def test_the_zone_with_most_memory_has_the_next_group(registry_url: str) -> None:
    memories = [Memory(0.3), Memory(0.6), Memory(0.5)]
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        zones = [await enter(zone(registry_url, memory=each)) for each in memories]
        gates = [await enter(gateway(registry_url, http_port=0)) for _ in range(3)]
        await acquainted(gates, zones)
        group = 0
        for shares in ((0.3, 0.6, 0.5), (0.7, 0.2, 0.5), (0.8, 0.85, 0.1)):
            for memory, share in zip(memories, shares, strict=True):
                memory.share = share
            best = zones[shares.index(min(shares))]
            due = sorted(shares)
            for gate in gates:
                await until(
                    lambda gate=gate, due=due: [s.memory for s in gate.zones.of(SERVICE)] == due
                )
            # The same from any gateway, and so is what is done.
            for gate in gates:
                status, answer = await place(gate)
                assert (status, answer["machine"]) == (200, best.node.id)
                assert answer["node"] == str(best.id)
                group += 1
                async with connected(gate, "tcp") as client:
                    await client.hello()
                    await client.write(group, JOIN, node=int(answer["node"]))
                    await client.expect(JOIN)
                assert group in best.groups


def copies(group: int, zones: list[Zone]) -> int:
    return sum(group in each.groups for each in zones)


async def test_a_group_is_one_whoever_opens_it(registry_url: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        zones = [await enter(zone(registry_url)) for _ in range(3)]
        gates = [await enter(gateway(registry_url)) for _ in range(2)]
        await acquainted(gates, zones)
        clients = []
        for gate in gates:
            client = await enter(connected(gate, "tcp"))
            await client.hello()
            clients.append(client)
        for group in range(1, BOTH_AT_ONCE + 1):
            # Gateways that disagree where it is to be made: each is told by another zone.
            for gate, favourite in zip(gates, zones, strict=False):
                for each in zones:
                    state = {**each.facts(), "memory": 0.1 if each is favourite else 0.8}
                    gate.zones.heard(each.node.id, json.dumps(state).encode())
            await asyncio.gather(*[client.write(group, JOIN) for client in clients])
            for client in clients:
                await client.expect(JOIN)
            assert copies(group, zones) == 1
            (home,) = [each for each in zones if group in each.groups]
            assert home.group(group).users == {client.user for client in clients}
            for client in clients:
                await client.write(group, OTHERS, b"%d" % group)
            for client in clients:
                assert await client.expect(OTHERS) == b"%d" % group
        for client in clients:
            await client.send(6)
        await until(lambda: not any(each.users for each in zones))


async def test_a_zone_that_is_asked_twice_makes_it_once(registry_url: str) -> None:
    """An OPEN of each gateway in the same turn, at two zones: one has the group, once."""
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        made: list[int] = []

        def factory(id: int, zone: Zone) -> Ledger:
            made.append(id)
            return Ledger(id, zone)

        zones = [await enter(zone(registry_url, factory)) for _ in range(2)]
        gates = [await enter(gateway(registry_url)) for _ in range(3)]
        await acquainted(gates, zones)
        for group in range(1, BOTH_AT_ONCE + 1):
            for gate in gates:
                for each in zones:
                    asked = wire.group(ToZone.OPEN, group)
                    gate.node.notify(LibraryChannel.ZONE, asked, to=each.node.id)
            await until(lambda group=group: copies(group, zones) == 1)
        await until(lambda: all(not len(each._openings) for each in zones))
        assert sorted(made) == list(range(1, BOTH_AT_ONCE + 1))
        assert all(copies(group, zones) == 1 for group in made)
