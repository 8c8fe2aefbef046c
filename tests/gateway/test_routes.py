"""How messages find their group, and what comes back, against a zone that does as it is told."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import pytest

from domi_fast import LibraryChannel, Node
from domi_fast.gateway import Gateway, Refusal, wire
from domi_fast.gateway.wire import ToGateway, ToZone
from domi_fast.gateway.zones import kind_of
from tests.gateway.clients import LOST, Told, connected
from tests.gateway.nodes import gateway
from tests.gateway.zones import zone
from tests.support import until


@pytest.mark.parametrize("carrier", ["tcp", "websocket"])
@pytest.mark.parametrize("by", ["nothing", "zone", "machine"])
async def test_a_message_finds_its_group(carrier: str, by: str) -> None:
    async with gateway(authenticate=lambda login: login.data) as gate, zone(gate) as room:
        async with connected(gate, carrier) as client:
            await client.hello(b"alice")
            node = {"nothing": 0, "zone": room.id, "machine": room.node.id}[by]
            for number in range(3):
                await client.write(666, 50, b"hello %d" % number, node)
            for number in range(3):
                told = await room.message()
                assert told == (666, client.user, 50, b"alice", b"hello %d" % number)
            assert room.opened == [666]


async def test_what_a_group_says_comes_to_its_members() -> None:
    async with gateway() as gate, zone(gate) as room:
        async with connected(gate) as one, connected(gate, "tcp") as two, connected(gate) as three:
            for client in (one, two, three):
                await client.hello()
                await client.write(1, 50)
                await room.message()
            for client in (one, two):
                room.tell(gate.node, wire.member(ToGateway.JOIN, 1, client.user))
            room.tell(gate.node, wire.broadcast(1, 51, b"all"))
            room.tell(gate.node, wire.broadcast(1, 51, b"but one", (one.user, 12345)))
            room.tell(gate.node, wire.send(three.user, 52, b"alone"))
            room.tell(gate.node, wire.member(ToGateway.PART, 1, two.user))
            room.tell(gate.node, wire.broadcast(1, 53, b"rest"))
            assert [await one.take() for _ in range(2)] == [Told(51, b"all"), Told(53, b"rest")]
            assert [await two.take() for _ in range(2)] == [Told(51, b"all"), Told(51, b"but one")]
            assert await three.take() == Told(52, b"alone")
            assert gate.node.counters()["broadcasts"] == 3


async def test_the_end_of_a_session_is_told_to_its_groups() -> None:
    async with gateway(grace=0) as gate, zone(gate) as room:
        async with connected(gate, "tcp") as client:
            await client.hello()
            for group in (1, 2, 3):
                await client.write(group, 50)
                await room.message()
            for group in (1, 2):
                room.tell(gate.node, wire.member(ToGateway.JOIN, group, client.user))
            room.tell(gate.node, wire.broadcast(2, 51, b"x"))
            await client.take()
        left = {(await room.hear(ToZone.LEAVE))[1] for _ in range(2)}
        assert left == {wire.member(ToZone.LEAVE, group, client.user) for group in (1, 2)}
        room.tell(gate.node, wire.member(ToGateway.JOIN, 3, client.user))
        assert (await room.hear(ToZone.LEAVE))[1] == wire.member(ToZone.LEAVE, 3, client.user)


async def test_a_member_that_is_away_and_back() -> None:
    async with gateway() as gate, zone(gate) as room:
        async with connected(gate) as client:
            await client.hello()
            await client.write(1, 50)
            await room.message()
            room.tell(gate.node, wire.member(ToGateway.JOIN, 1, client.user))
            room.tell(gate.node, wire.broadcast(1, 51, b"first"))
            await client.take()
            client.cut()
        assert (await room.hear(ToZone.AWAY))[1] == wire.member(ToZone.AWAY, 1, client.user)
        room.tell(gate.node, wire.broadcast(1, 51, b"missed"))
        await until(lambda: gate.node.counters()["broadcasts"] == 2)
        async with connected(gate) as again:
            await again.resume(client.session, client.received)
            assert await again.take() == Told(51, b"missed")
            assert (await room.hear(ToZone.BACK))[1] == wire.member(ToZone.BACK, 1, client.user)


async def test_the_zone_refuses_a_message() -> None:
    async with gateway() as gate, zone(gate) as room, connected(gate) as client:
        await client.hello()
        await client.write(1, 50)
        await room.message()
        room.tell(gate.node, wire.refused(1, client.user, 50, Refusal.NO_HANDLER, "nobody"))
        assert await client.refused() == (1, 50, Refusal.NO_HANDLER, "nobody")


# ---------------------------------------------------------------------------------------- placing


async def test_a_group_goes_where_the_registry_says() -> None:
    async with gateway() as gate, zone(gate) as one, zone(gate) as two, connected(gate) as client:
        two.publish(memory=0.9)
        one.publish(memory=0.1)
        await two.claim(7)
        await client.hello()
        await client.write(7, 50)
        assert (await two.message()).group == 7
        assert one.opened == []


async def test_a_new_group_goes_to_the_zone_with_most_room() -> None:
    async with gateway() as gate, zone(gate) as one, zone(gate) as two, connected(gate) as client:
        one.publish(memory=0.5)
        two.publish(memory=0.4)
        await until(lambda: [s.memory for s in gate.zones.of("room")] == [0.4, 0.5])
        await client.hello()
        await client.write(1, 50)
        await two.message()
        one.publish(memory=0.2)
        await until(lambda: [s.memory for s in gate.zones.of("room")] == [0.2, 0.4])
        await client.write(2, 50)
        await one.message()


async def test_who_has_less_users_has_more_room_at_the_same_share() -> None:
    async with gateway() as gate, zone(gate) as one, zone(gate) as two, connected(gate) as client:
        one.publish(memory=0.502, users=3)
        two.publish(memory=0.498, users=4)
        await until(lambda: [s.users for s in gate.zones.of("room")] == [3, 4])
        await client.hello()
        await client.write(1, 50)
        await one.message()


async def test_a_newer_version_has_the_new_groups() -> None:
    async with gateway() as gate:
        async with zone(gate, version="1.9", roll_deadline=None) as old:
            async with zone(gate, version="1.10") as new, connected(gate) as client:
                old.publish(memory=0.1)
                new.publish(memory=0.8)
                await client.hello()
                await client.write(1, 50)
                await new.message()
                await old.claim(2)
                await client.write(2, 50)
                await old.message()


async def test_full_zones_are_passed_over_and_all_full_is_a_refusal() -> None:
    async with gateway() as gate, zone(gate) as one, zone(gate) as two, connected(gate) as client:
        one.publish(memory=0.95, open=False, full=True)
        two.publish(memory=0.5)
        await until(lambda: [s.open for s in gate.zones.of("room")] == [True, False])
        await client.hello()
        await client.write(1, 50)
        await two.message()
        two.closes[2] = (Refusal.FULL, wire.NOWHERE)  # which has filled up meanwhile
        await client.write(2, 50)
        assert (await client.refused())[:3] == (2, 50, Refusal.FULL)
        two.publish(memory=0.91, open=False, full=True)
        await until(lambda: gate.zones.is_full("room"))
        await client.write(3, 50)
        group, event, code, why = await client.refused()
        assert (group, event, code) == (3, 50, Refusal.FULL)
        assert "try again later" in why
        await client.write(1, 50, b"an old group goes on")
        assert (await two.message()).data == b"an old group goes on"


async def test_another_zone_was_quicker() -> None:
    async with gateway() as gate, zone(gate) as one, zone(gate) as two, connected(gate) as client:
        one.publish(memory=0.1)
        await until(lambda: gate.zones.of("room")[0].memory == 0.1)
        one.closes[1] = (0, two.node.id)
        await client.hello()
        await client.write(1, 50, b"first")
        await until(lambda: one.opened)
        await two.claim(1)
        await client.write(1, 50, b"second")
        assert [(await two.message()).data for _ in range(2)] == [b"first", b"second"]


@pytest.mark.parametrize("code", [Refusal.NO_GROUP, Refusal.FAILED])
async def test_a_group_that_is_not_made(code: Refusal) -> None:
    async with gateway() as gate, zone(gate) as room, connected(gate) as client:
        room.closes[1] = (code, wire.NOWHERE)
        await client.hello()
        await client.write(1, 50)
        await client.write(1, 51)
        assert await client.refused() == (1, 50, code, "as the test says")
        assert await client.refused() == (1, 51, code, "as the test says")
        del room.closes[1]
        await client.write(1, 52)
        assert (await room.message()).event == 52


async def test_a_zone_that_never_answers() -> None:
    async with gateway(place_timeout=0.3) as gate, zone(gate) as room, connected(gate) as client:
        room.silent = True
        await client.hello()
        await client.write(1, 50)
        assert await client.refused() == (
            1,
            50,
            Refusal.TIMEOUT,
            "no zone has opened group 1 within 0.3 s",
        )


async def test_no_zone_at_all() -> None:
    async with gateway(place_timeout=0.2, service="room") as gate, connected(gate) as client:
        await client.hello()
        await client.write(1, 50)
        group, event, code, why = await client.refused()
        assert (group, event, code) == (1, 50, Refusal.NO_SERVICE)
        assert why == "no zone of service 'room' was there within 0.2 s"


async def test_a_node_that_nobody_knows() -> None:
    async with gateway() as gate, zone(gate), connected(gate) as client:
        await client.hello()
        await client.write(1, 50, node=1 << 40)
        assert await client.refused() == (
            1,
            50,
            Refusal.NO_SERVICE,
            f"node {1 << 40} has no groups: name the node of a service",
        )


async def test_no_zone_and_no_service_that_is_named() -> None:
    async with gateway(place_timeout=0.2, held_limit=2) as gate, connected(gate) as client:
        await client.hello()
        for number in range(3):
            await client.write(number, 50)
        assert (await client.refused())[0] == 2  # more than may wait
        for number in range(2):
            assert await client.refused() == (
                number,
                50,
                Refusal.NO_SERVICE,
                "no zone was there within 0.2 s",
            )


@pytest.mark.parametrize("service", ["room", None])
async def test_a_zone_that_comes_in_time(service: str | None) -> None:
    async with gateway(service=service) as gate, connected(gate) as client:
        await client.hello()
        await client.write(1, 50)
        async with zone(gate) as room:
            assert (await room.message()).group == 1


async def test_groups_of_two_services_are_not_the_same() -> None:
    async with gateway(service="room") as gate, zone(gate) as room, zone(gate, "game") as game:
        async with connected(gate) as client:
            await client.hello()
            await client.write(1, 50, b"room")
            assert (await room.message()).data == b"room"
            await client.write(1, 50, b"game", node=game.id)
            assert (await game.message()).data == b"game"
            await client.write(1, 50, b"room again", node=room.node.id)
            assert (await room.message()).data == b"room again"


async def test_which_service_is_meant_where_nobody_says() -> None:
    async with gateway() as gate, zone(gate) as room, zone(gate, "game"), connected(gate) as client:
        await client.hello()
        await client.write(1, 50, node=room.node.id)
        await room.message()
        await client.write(1, 50)
        assert await client.refused() == (
            1,
            50,
            Refusal.NO_SERVICE,
            "this gateway has no groups: name the node of a service",
        )


def test_any_name_of_a_service_has_a_kind_of_names() -> None:
    assert kind_of("room") == "groups.room"
    kinds = {kind_of(name) for name in ("größe", "a/b", "a b", "", ".x", "x" * 255, "x" * 254)}
    assert len(kinds) == 7
    assert all(kind.isascii() and len(kind) <= 128 for kind in kinds)


async def test_a_client_that_has_left_before_the_first_zone_came() -> None:
    async with gateway() as gate:
        async with connected(gate) as client:
            await client.hello()
            await client.write(1, 50, b"too early")
            await client.send(6)
            await client.closed()
        async with zone(gate) as room:
            assert (await room.message()).data == b"too early"
            assert gate._routes._of_user == {}


async def test_a_zone_that_makes_none_on_demand_says_so() -> None:
    async with gateway() as gate, zone(gate) as room, connected(gate) as client:
        room.publish(open=False)
        await until(lambda: gate.zones.place("room") is None)
        room.closes[1] = (Refusal.NO_GROUP, wire.NOWHERE)
        await client.hello()
        await client.write(1, 50)
        assert (await client.refused())[:3] == (1, 50, Refusal.NO_GROUP)


async def test_a_refusal_that_this_version_does_not_know() -> None:
    async with gateway() as gate, zone(gate) as room, connected(gate) as client:
        room.closes[1] = (77, wire.NOWHERE)
        await client.hello()
        await client.write(1, 50)
        assert (await client.refused())[:3] == (1, 50, 77)


async def test_a_group_that_takes_a_client_in_while_it_is_looked_for() -> None:
    """It is open then, wherever the search would have led."""
    async with gateway() as gate, zone(gate) as one, zone(gate) as two, connected(gate) as client:
        one.publish(memory=0.9)
        two.publish(memory=0.1)
        await until(lambda: gate.zones.of("room")[0].memory == 0.1)
        asked, answer = asyncio.Event(), asyncio.Event()
        holder = gate._routes._finder._holder

        async def slowly(route: Any) -> Any:
            found = await holder(route)
            asked.set()
            await answer.wait()
            return found

        # A registry that answers at this moment cannot be had on purpose.
        gate._routes._finder._holder = slowly
        await client.hello()
        await client.write(1, 50, b"where are you")
        await asked.wait()
        one.tell(gate.node, wire.member(ToGateway.JOIN, 1, client.user))
        assert (await one.message()).data == b"where are you"
        answer.set()
        one.tell(gate.node, wire.broadcast(1, 51, b"here"))
        assert await client.take() == Told(51, b"here")
        await client.write(1, 50, b"good")
        assert (await one.message()).data == b"good"
        assert two.opened == []


async def test_a_member_that_is_away_already() -> None:
    async with gateway() as gate, zone(gate) as room:
        async with connected(gate) as client:
            await client.hello()
            client.cut()
        await until(lambda: gate._sessions.get(client.user).connection is None)
        room.tell(gate.node, wire.member(ToGateway.JOIN, 1, client.user))
        assert (await room.hear(ToZone.AWAY))[1] == wire.member(ToZone.AWAY, 1, client.user)


# ---------------------------------------------------------------------------------------- limits


async def test_a_client_may_write_to_so_many_groups() -> None:
    async with gateway(groups_per_client=2) as gate, zone(gate) as room, connected(gate) as client:
        await client.hello()
        for group in (1, 2):
            await client.write(group, 50)
            await room.message()
        await client.write(3, 50)
        assert await client.refused() == (
            3,
            50,
            Refusal.LIMIT,
            "2 groups are as many as a client may be in",
        )
        room.tell(gate.node, wire.moved(1, wire.NOWHERE))
        await room.hear(ToZone.SWITCHED)
        await client.write(3, 50)
        assert (await room.message()).group == 3


async def test_so_many_bytes_wait_for_all_groups() -> None:
    async with gateway(held_bytes=4096) as gate, zone(gate) as room, connected(gate) as client:
        room.silent = True
        await client.hello()
        await client.write(1, 50, bytes(3000))
        await client.write(2, 50, bytes(3000))
        assert (await client.refused())[:3] == (2, 50, Refusal.OVERLOADED)
        room.tell(gate.node, wire.group(ToGateway.OPENED, 1))
        assert len((await room.message()).data) == 3000
        await client.write(3, 50, bytes(3000))
        await until(lambda: 3 in room.opened)
        room.tell(gate.node, wire.group(ToGateway.OPENED, 3))
        assert len((await room.message()).data) == 3000


async def test_so_many_messages_wait_for_a_group() -> None:
    async with gateway(held_limit=3) as gate, zone(gate) as room, connected(gate) as client:
        room.silent = True
        await client.hello()
        for number in range(4):
            await client.write(1, 50, bytes([number]))
        assert (await client.refused())[:3] == (1, 50, Refusal.OVERLOADED)
        room.tell(gate.node, wire.group(ToGateway.OPENED, 1))
        assert [(await room.message()).data for _ in range(3)] == [b"\0", b"\1", b"\2"]


# ---------------------------------------------------------------------------------------- moves


async def test_a_group_moves_and_nobody_is_told() -> None:
    async with gateway() as gate, zone(gate) as one, zone(gate) as two, connected(gate) as client:
        await one.claim(1)
        await client.hello()
        await client.write(1, 50, b"a")
        await one.message()
        one.tell(gate.node, wire.member(ToGateway.JOIN, 1, client.user))
        one.tell(gate.node, wire.broadcast(1, 51, b"old"))
        one.tell(gate.node, wire.moved(1, two.node.id))
        assert await one.hear(ToZone.SWITCHED) == (gate.node.id, wire.group(ToZone.SWITCHED, 1))
        await client.write(1, 50, b"b")
        assert (await two.message()).data == b"b"
        two.tell(gate.node, wire.broadcast(1, 51, b"new"))
        one.tell(gate.node, wire.broadcast(1, 51, b"from who has it no more"))
        two.tell(gate.node, wire.broadcast(1, 51, b"newer"))
        assert [(await client.take()).data for _ in range(3)] == [b"old", b"new", b"newer"]
        await until(lambda: gate.node.counters()["broadcasts_for_lost_groups"] == 1)


async def test_a_group_that_ends_is_opened_anew() -> None:
    async with gateway() as gate, zone(gate) as room, connected(gate) as client:
        await client.hello()
        await client.write(1, 50)
        await room.message()
        room.tell(gate.node, wire.moved(1, wire.NOWHERE))
        await room.hear(ToZone.SWITCHED)
        await client.write(1, 50, b"again")
        assert (await room.message()).data == b"again"
        assert room.opened == [1, 1]


async def test_a_group_that_is_lost() -> None:
    async with gateway() as gate, zone(gate) as room, connected(gate) as client:
        await client.hello()
        await client.write(1, 50)
        await room.message()
        room.tell(gate.node, wire.member(ToGateway.JOIN, 1, client.user))
        room.tell(gate.node, wire.group(ToGateway.LOST, 1, "somebody else has its name"))
        assert await client.expect(LOST) == struct.pack("<Q", 1) + b"somebody else has its name"
        await client.write(1, 50, b"again")
        assert (await room.message()).data == b"again"


async def test_a_zone_that_dies_takes_its_groups_with_it() -> None:
    async with gateway() as gate, zone(gate) as other:
        other.publish(memory=0.9)
        async with connected(gate) as member, connected(gate) as visitor:
            async with zone(gate) as room:
                room.publish(memory=0.1)
                await until(lambda: gate.zones.of("room")[0].machine == room.node.id)
                for client in (member, visitor):
                    await client.hello()
                    await client.write(1, 50)
                    await room.message()
                room.tell(gate.node, wire.member(ToGateway.JOIN, 1, member.user))
                room.tell(gate.node, wire.broadcast(1, 51, b"x"))
                await member.take()
            assert (await member.take()).event == LOST
            await visitor.write(1, 50, b"to whoever has it")
            assert (await other.message()).data == b"to whoever has it"


async def test_a_zone_that_closes_while_its_node_goes_on() -> None:
    async with (
        gateway() as gate,
        zone(gate) as room,
        zone(gate) as other,
        connected(gate) as client,
    ):
        room.publish(memory=0.1)
        other.publish(memory=0.9)
        await until(lambda: gate.zones.of("room")[0].machine == room.node.id)
        await client.hello()
        await client.write(1, 50)
        await room.message()
        room.tell(gate.node, wire.member(ToGateway.JOIN, 1, client.user))
        room.tell(gate.node, wire.broadcast(1, 51, b"x"))
        await client.take()
        room.node.unsubscribe(LibraryChannel.ZONE)
        assert (await client.take()).event == LOST
        assert [state.machine for state in gate.zones.of("room")] == [other.node.id]
        await client.write(1, 50, b"again")
        assert (await other.message()).data == b"again"


async def test_a_zone_adds_a_user_who_has_not_written() -> None:
    async with gateway() as gate, zone(gate) as room, connected(gate) as client:
        await client.hello()
        room.tell(gate.node, wire.member(ToGateway.JOIN, 9, client.user))
        room.tell(gate.node, wire.broadcast(9, 51, b"welcome"))
        assert await client.take() == Told(51, b"welcome")
        await client.write(9, 50, b"thanks")
        assert (await room.message()).data == b"thanks"
        assert room.opened == []


@pytest.mark.parametrize("raw", [b"", b"\0", b"\xff", b"\2", b"\7" + bytes(11), b"\1{", b"\4" * 9])
async def test_what_is_no_message_of_a_zone_is_counted(raw: bytes) -> None:
    async with gateway() as gate, zone(gate) as room:
        room.tell(gate.node, raw)
        await until(lambda: gate.node.counters()["zone_messages_bad"] == 1)


async def test_a_broadcast_that_lies_about_its_size() -> None:
    async with gateway() as gate, zone(gate) as room:
        room.tell(gate.node, wire.broadcast(1, 51, b"", (1, 2, 3))[:-1])
        await until(lambda: gate.node.counters()["zone_messages_bad"] == 1)


async def test_two_gateways_have_the_members_of_their_own() -> None:
    async with gateway() as gate, zone(gate) as room:
        url = gate.node.config.registry
        async with Gateway(Node("gate", registry=url)) as other:
            await until(lambda: other.zones.has(room.node.id))
            async with connected(gate) as one, connected(other) as two:
                for client in (one, two):
                    await client.hello()
                    await client.write(1, 50)
                    await room.message()
                assert room.opened == [1, 1]
                room.tell(gate.node, wire.member(ToGateway.JOIN, 1, one.user))
                room.tell(other.node, wire.member(ToGateway.JOIN, 1, two.user))
                room.tell(gate.node, wire.broadcast(1, 51, b"to one"))
                room.tell(other.node, wire.broadcast(1, 51, b"to two"))
                assert await one.take() == Told(51, b"to one")
                assert await two.take() == Told(51, b"to two")
