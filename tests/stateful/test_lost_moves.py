"""Moves of groups in which a zone or a gateway dies, or that are given up."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from domi_fast import DomiError, LibraryChannel, Node, PeerLost
from domi_fast.gateway import wire
from domi_fast.gateway.events import Refusal
from domi_fast.gateway.wire import NOWHERE, ToGateway, ToZone
from domi_fast.gateway.zones import kind_of
from domi_fast.stateful import Zone, zone_wire
from domi_fast.stateful.snapshots import Snapshot, pack
from tests.stateful.gateway import connected, gateway, until_free, zone
from tests.stateful.rooms import SAID, SAY, Room
from tests.stateful.test_groups import joined
from tests.stateful.test_hand_over import goes_on, placed
from tests.support import until


async def test_a_zone_that_dies_before_it_has_the_group_costs_nothing(registry_url: str) -> None:
    for takes in (False, True):
        async with zone(registry_url, Room) as a, gateway(registry_url) as one:
            user = one.user()
            await placed(a, one, user)
            heard: list[int] = []
            async with Node("room", registry=registry_url) as dying:

                @dying.subscribe(LibraryChannel.ZONE)
                async def answer(
                    context: Any,
                    dying: Node = dying,
                    heard: list[int] = heard,
                    takes: bool = takes,
                ) -> None:
                    heard.append(context.data[0])
                    if context.data[0] == zone_wire.Between.TRANSFER:
                        context.reply(b"")
                    elif context.data[0] == zone_wire.Between.TAKE:
                        if takes:  # it dies with the name
                            await dying.cluster.names(kind_of("room")).claim("7")
                        await dying.close()

                await until(lambda: LibraryChannel.ZONE in a.node.peers[dying.id].channels)
                with pytest.raises(DomiError):
                    await a.hand_over(7, dying.id)
            assert heard[:2] == [zone_wire.Between.TRANSFER, zone_wire.Between.TAKE]
            await goes_on(a, one, user)
            holder = await a.node.cluster.names(kind_of("room")).find("7")
            assert holder is not None
            assert holder.id == a.node.id
            moves = a.node.cluster.names(f"handovers.{kind_of('room')}")
            await until_free(moves, "7")


def as_a_zone(node: Node) -> None:
    """Hear what zones do."""
    node.subscribe(LibraryChannel.ZONE, lambda context: None)


async def transferred(by: Node, to: Zone, user: int) -> None:
    """A zone that is none sends group 7, with this member, and has it taken."""
    as_a_zone(by)
    snapshot = pack(Snapshot(7, (user,), b"[]"))
    content = zone_wire.Transfer(7, "room", "0", snapshot)
    request = by.request(LibraryChannel.ZONE, zone_wire.transfer(content), to=to.node.id)
    assert await request == b""
    take = zone_wire.simple(zone_wire.Between.TAKE, 7)
    assert await by.request(LibraryChannel.ZONE, take, to=to.node.id) == b""


async def test_a_zone_that_dies_after_it_has_sent_the_group(registry_url: str) -> None:
    async with zone(registry_url, Room) as b, gateway(registry_url) as one:
        await connected(one)
        user = one.user()
        async with Node("room", registry=registry_url) as dying:
            await transferred(dying, b, user)
            moving = zone_wire.with_machines(zone_wire.Between.MOVING, 7, [one.node.id])
            dying.notify(LibraryChannel.ZONE, moving, to=b.node.id)
            # What a gateway has said since it switched is there before what it said earlier.
            room = b.group(7)
            one.tell(b.node.id, wire.message(7, user, SAY, b"", b"second"))
            one.tell(b.node.id, wire.group(ToZone.OPEN, 7))
            await until(lambda: one.kinds(ToGateway.OPENED))
            passed = wire.UserMessage(7, user, SAY, b"", b"first")
            dying.notify(LibraryChannel.ZONE, zone_wire.forward(passed), to=b.node.id)
            await until(lambda: len(room._mailbox) == 1)
            assert not one.got(user, SAID)
            assert not one.members[7]
        # Its gateways may have told its members that it is lost: they are members all the same.
        one.faults.clear()
        await until(lambda: one.members[7] == {user} and len(room.users) == 1)
        assert isinstance(room, Room)
        await until(lambda: len(room.said) == 2)
        assert room.said == [(user, b"first"), (user, b"second")]


async def test_a_zone_that_dies_before_the_group_is_taken(registry_url: str) -> None:
    async with zone(registry_url, Room) as b, gateway(registry_url) as one:
        await connected(one)
        async with Node("room", registry=registry_url) as dying:
            as_a_zone(dying)
            content = zone_wire.Transfer(7, "room", "0", pack(Snapshot(7, (), b"[]")))
            message = zone_wire.transfer(content)
            assert await dying.request(LibraryChannel.ZONE, message, to=b.node.id) == b""
            one.open(7, b.node.id)
            await until(lambda: b._hand_over._arrivals[7]._asked)
            assert await dying.request(LibraryChannel.ZONE, message, to=b.node.id) == (
                b"there is such a group here"
            )
        await until(lambda: one.closed)
        assert one.closed[0] == (0, dying.id)
        # It is made anew by who asks for it.
        await until(lambda: one.ways[7].zone == b.node.id)


async def test_a_move_that_is_given_up(registry_url: str) -> None:
    async with (
        zone(registry_url, Room) as b,
        gateway(registry_url) as one,
        Node("room", registry=registry_url) as mover,
    ):
        await connected(one)
        await transferred(mover, b, one.user())
        mover.notify(
            LibraryChannel.ZONE,
            zone_wire.simple(zone_wire.Between.ABORT, 7),
            to=b.node.id,
        )
        await until(lambda: not b.groups)
        await until_free(mover.cluster.names(kind_of("room")), "7")
        for what in (zone_wire.Between.TAKE, zone_wire.Between.RUN):
            message = zone_wire.simple(what, 7) + b"\0\0"
            answer = await mover.request(LibraryChannel.ZONE, message, to=b.node.id)
            assert answer == b"it is not on its way here"


async def test_a_group_that_is_lost_on_its_way(registry_url: str) -> None:
    """Another has its name before it runs: nobody waits for it, and RUN is refused."""
    async with (
        zone(registry_url, Room) as b,
        gateway(registry_url) as one,
        gateway(registry_url) as two,
        Node("room", registry=registry_url) as mover,
    ):
        await connected(one, two)
        user = one.user()
        await transferred(mover, b, user)
        one.tell(b.node.id, wire.message(7, user, SAY, b"", b"waits"))
        two.open(7, b.node.id)
        arrival = b._hand_over._arrivals[7]
        await until(lambda: arrival._direct and arrival._asked)
        name = b.group(7)._name
        assert name is not None
        name.lost.set()
        two.ways[7].asked = None
        await until(lambda: one.refused[user] and two.closed)
        assert one.refused[user][0].code == Refusal.NO_GROUP
        assert two.closed[0] == (0, NOWHERE)
        assert not b._hand_over._arrivals
        run = zone_wire.with_machines(zone_wire.Between.RUN, 7, [])
        answer = await mover.request(LibraryChannel.ZONE, run, to=b.node.id)
        assert answer == b"it is not on its way here"
        await name.release()


async def test_a_zone_that_dies_with_the_group(registry_url: str) -> None:
    async with zone(registry_url, Room) as a, gateway(registry_url) as one:
        user = one.user()
        await placed(a, one, user)
        room = a.group(7)
        one.hold_switched = True
        async with Node("room", registry=registry_url) as dying:

            @dying.subscribe(LibraryChannel.ZONE)
            async def answer(context: Any) -> None:
                if context.data[0] == zone_wire.Between.TRANSFER:
                    context.reply(b"")
                elif context.data[0] == zone_wire.Between.TAKE:
                    await dying.cluster.names(kind_of("room")).claim("7")
                    context.reply(b"")
                elif context.data[0] == zone_wire.Between.MOVING:
                    await dying.close()

            await until(lambda: LibraryChannel.ZONE in a.node.peers[dying.id].channels)
            with pytest.raises(PeerLost, match="was lost with group 7, which it had taken"):
                await a.hand_over(7, dying.id)
        assert not a.groups
        with pytest.raises(DomiError, match="group 7 has moved to node"):
            room.broadcast(SAID, b"")
        # It is made anew for who asks, in the place where it was, too.
        one.held.clear()
        one.ways.pop(7)
        one.members.pop(7)
        assert await one.opened(7, a.node.id) == a.node.id


async def test_a_gateway_that_closes_before_it_has_switched(registry_url: str) -> None:
    """Its node goes on."""
    async with (
        zone(registry_url, Room) as a,
        zone(registry_url, Room) as b,
        gateway(registry_url) as one,
        gateway(registry_url) as two,
    ):
        user = one.user()
        await placed(a, one, user)
        await connected(two, zones=2)
        await joined(two, 7)
        two.hold_switched = True
        moving = asyncio.ensure_future(a.hand_over(7, b.node.id))
        await until(lambda: two.held)
        two.held.clear()
        await two.end()
        await asyncio.wait_for(moving, 5)
        await until(lambda: b.group(7).users == {user})
        await goes_on(b, one, user)


async def test_a_gateway_that_cannot_be_told_is_not_waited_for(registry_url: str) -> None:
    async with (
        zone(registry_url, Room, empty_timeout=0.02) as a,
        zone(registry_url, Room) as b,
        gateway(registry_url) as one,
        gateway(registry_url) as two,
    ):
        user = one.user()
        await placed(a, one, user)
        await connected(two, zones=2)
        await two.opened(7, a.node.id)
        await two.end()
        await until(lambda: LibraryChannel.GATEWAY not in a.node.peers[two.node.id].channels)
        gone = a._links.of(two.node.id)
        assert gone is not None
        assert not gone.tell(b"")
        # As if it had closed when the zone had looked around already.
        a._links.check = b._links.check = lambda: None  # type: ignore[method-assign]
        a.group(7)._note_gateway(gone)
        await asyncio.wait_for(a.hand_over(7, b.node.id), 5)
        await goes_on(b, one, user)
        await one.opened(8, a.node.id)
        a.group(8)._note_gateway(gone)
        await until(lambda: 8 not in a.groups)


async def test_a_zone_that_closes_while_its_group_moves(registry_url: str) -> None:
    """The other zone runs it; who has not switched begins anew."""
    async with (
        Node("room", registry=registry_url, drain_timeout=0.4) as node,
        zone(registry_url, Room) as b,
        gateway(registry_url) as one,
        gateway(registry_url) as two,
    ):
        async with Zone(node, Room) as a:
            user = one.user()
            await placed(a, one, user)
            await connected(two, zones=2)
            await joined(two, 7)
            two.hold_switched = True
            moving = asyncio.ensure_future(a.hand_over(7, b.node.id))
            await until(lambda: two.held)
        with pytest.raises(DomiError, match="the zone was closed while group 7 moved"):
            await moving
        await until(lambda: two.lost == [7])
        await until(lambda: b.group(7).users == {user})
        await goes_on(b, one, user)
        assert node.state == "serving"


async def test_a_zone_that_closes_on_a_node_that_goes_on(registry_url: str) -> None:
    """It is lost to others as if the node were."""
    async with zone(registry_url, Room) as b, gateway(registry_url) as one:
        await connected(one)
        user = one.user()
        async with Node("room", registry=registry_url) as mover:
            await transferred(mover, b, user)
            assert 7 in b._hand_over._arrivals
            mover.unsubscribe(LibraryChannel.ZONE)
            await until(lambda: one.members[7] == {user})
            assert mover.state == "serving"


async def test_a_gateway_that_only_the_old_zone_has_lost(registry_url: str) -> None:
    async with zone(registry_url, Room) as b, gateway(registry_url) as one:
        await connected(one)
        user = one.user()
        async with Node("room", registry=registry_url) as mover:
            await transferred(mover, b, user)
            room = b.group(7)
            run = zone_wire.with_machines(zone_wire.Between.RUN, 7, [one.node.id])
            assert await mover.request(LibraryChannel.ZONE, run, to=b.node.id) == b""
            # Nobody knows what it knows: it begins anew.
            await until(lambda: one.lost == [7])
            assert not room.users
            await joined(one, 7)
