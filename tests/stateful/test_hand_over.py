"""Groups that move: nothing is lost, doubled or out of order for users that stay."""

from __future__ import annotations

import asyncio
import json

import pytest

from domi_fast import DomiError, LibraryChannel, Node, PeerLost
from domi_fast.gateway import wire
from domi_fast.gateway.wire import NOWHERE, ToGateway, ToZone
from domi_fast.gateway.zones import kind_of
from domi_fast.stateful import Group, Message, Zone, hand_over, zone_wire
from domi_fast.stateful.snapshots import Snapshot, pack
from tests.stateful.gateway import Gateway, connected, gateway, until_free, zone
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
            assert 7 not in here.groups
            assert 7 in there.groups
            here, there = there, here
            # A group that moves on at once handles nothing, and what is said to it only grows.
            mailbox = here.group(7)._mailbox
            await until(lambda mailbox=mailbox: mailbox.idle)
        stop = True
        await asyncio.gather(*talking)
        room = here.group(7)
        assert isinstance(room, Counting)
        await until(lambda: room.next == sent, 10)
        assert room.faults == []
        assert room.next == sent
        for each, users in at.items():
            for user in users:
                await until(lambda each=each, user=user: len(each.got(user, SAID)) == room.number)
                assert each.got(user, SAID) == [b"%d" % number for number in range(room.number)]
            assert not each.faults
            assert not each.lost
            assert not any(each.refused.values())
            assert each.moves == HAND_OVERS
        assert room.number > HAND_OVERS


async def placed(a: Zone, one: Gateway, *users: int) -> None:
    """Group 7, in this zone, with these members."""
    await connected(one)
    await one.opened(7, a.node.id)
    for user in users:
        one.say(user, 7, JOIN)
    await until(lambda: set(users) <= one.members[7])


async def goes_on(a: Zone, one: Gateway, user: int) -> None:
    """The group is where it was, and serves."""
    one.say(user, 7, SAY, b"goes on")
    await until(lambda: one.got(user, SAID)[-1:] == [b"goes on"])
    room = a.group(7)
    room.add_user(user)
    assert one.ways[7].zone == a.node.id
    assert not one.faults
    assert not one.lost


async def refused(a: Zone, to: Zone, reason: str) -> None:
    await until(lambda: LibraryChannel.ZONE in a.node.peers[to.node.id].channels)
    with pytest.raises(DomiError, match=f"does not take group 7: {reason}"):
        await a.hand_over(7, to.node.id)


async def test_a_zone_that_does_not_take_it_leaves_it_where_it_is(registry_url: str) -> None:
    def fail(id: int, rooms: Zone) -> Group:
        raise LookupError("no room")

    async with zone(registry_url, Room) as a, gateway(registry_url) as one:
        user = one.user()
        await placed(a, one, user)
        with pytest.raises(DomiError, match=r"no other zone of 'room', of 0 zones"):
            await a.hand_over(7)
        async with zone(registry_url, Room, memory=lambda: 0.99) as full:
            await refused(a, full, "0 groups, 99% of memory are in use")
            with pytest.raises(DomiError, match=r"no other zone of 'room', of 1 zones"):
                await a.hand_over(7)
        async with zone(registry_url) as none:
            await refused(a, none, "there is none, and none is made on demand")
        async with zone(registry_url, fail) as failing:
            await refused(a, failing, "LookupError: no room")
            assert not failing.groups
        async with zone(registry_url, Room, node={"name": "hall"}) as other:
            await refused(a, other, "this zone is one of 'hall'")
        with pytest.raises(PeerLost, match="node 900 is not connected: group 7 stays"):
            await a.hand_over(7, 900)
        with pytest.raises(DomiError, match="is at node 0 already"):
            await a.hand_over(7, a.node.id)
        with pytest.raises(DomiError, match="group 8 is not in this zone"):
            await a.hand_over(8)
        await goes_on(a, one, user)


async def test_an_older_zone_takes_nothing_of_a_newer(registry_url: str) -> None:
    async with (
        zone(registry_url, Room, node={"version": "1.9"}) as old,
        Node("mover", registry=registry_url) as mover,
    ):
        mover.subscribe(LibraryChannel.ZONE, lambda context: None)
        content = zone_wire.Transfer(7, "room", "1.10", pack(Snapshot(7, (), b"[]")))
        message = zone_wire.transfer(content)
        answer = await mover.request(LibraryChannel.ZONE, message, to=old.node.id)
        assert answer == b"version 1.9 is older"


async def test_a_handler_that_runs_ends_before_its_group_moves(registry_url: str) -> None:
    async with (
        zone(registry_url, Room) as a,
        zone(registry_url, Room) as b,
        gateway(registry_url) as one,
    ):
        user = one.user()
        await placed(a, one, user)
        room = a.group(7)
        assert isinstance(room, Room)
        one.say(user, 7, WAIT)
        await until(lambda: room.said)
        moving = asyncio.ensure_future(a.hand_over(7))
        await asyncio.sleep(0.02)
        one.say(user, 7, SAY, b"behind it")
        await until(lambda: len(room._mailbox))
        with pytest.raises(DomiError, match="is moving to another zone: its members cannot"):
            room.add_user(one.user())
        with pytest.raises(DomiError, match="group 7 moves already"):
            await a.hand_over(7)
        room.broadcast(SAID, b"before it")
        room.gate.set()
        await moving
        there = b.group(7)
        assert isinstance(there, Room)
        await until(lambda: len(one.got(user, SAID)) == 2)
        assert there.said == [(user, b"waits"), (user, b"waited"), (user, b"behind it")]
        assert one.got(user, SAID) == [b"before it", b"behind it"]
        assert not one.faults
        with pytest.raises(DomiError, match=f"group 7 has moved to node {b.node.id}"):
            room.broadcast(SAID, b"too late")
        assert room.closings == 1
        assert a.users == 0
        assert b.users == 1


async def test_a_handler_cannot_wait_for_the_move_of_its_group(registry_url: str) -> None:
    async with (
        zone(registry_url, Room) as a,
        zone(registry_url, Room) as b,
        gateway(registry_url) as one,
    ):
        user = one.user()
        await placed(a, one, user)
        moves: list[asyncio.Task[None]] = []

        @a.group(7).handle(60)
        async def move(message: Message) -> None:
            with pytest.raises(DomiError, match="waits for its own end"):
                await a.hand_over(7)
            moves.append(asyncio.ensure_future(a.hand_over(7)))

        one.say(user, 7, 60)
        await until(lambda: moves)
        await moves[0]
        assert 7 in b.groups


async def test_who_leaves_while_the_group_moves_has_left_there(registry_url: str) -> None:
    async with (
        zone(registry_url, Room) as a,
        zone(registry_url, Room) as b,
        gateway(registry_url) as one,
    ):
        stays, leaves = one.user(), one.user()
        await placed(a, one, stays, leaves)
        one.hold_switched = True
        moving = asyncio.ensure_future(a.hand_over(7))
        await until(lambda: one.held)
        one.say(leaves, 7, SAY, b"goodbye")
        one.member(ToZone.LEAVE, leaves, 7)
        one.let_switch()
        one.say(stays, 7, SAY, b"alone")
        await moving
        await until(lambda: one.got(stays, SAID) == [b"goodbye", b"alone"])
        assert b.group(7).users == {stays}


async def test_who_asks_late_is_told_where_the_group_is(registry_url: str) -> None:
    async with (
        zone(registry_url, Room) as a,
        zone(registry_url, Room) as b,
        gateway(registry_url) as one,
        gateway(registry_url) as two,
        gateway(registry_url) as three,
    ):
        user, late = one.user(), two.user()
        await placed(a, one, user)
        await connected(two, three, zones=2)
        one.hold_switched = True
        moving = asyncio.ensure_future(a.hand_over(7))
        await until(lambda: one.held)
        two.open(7, a.node.id)
        await until(lambda: two.closed)
        # And where it is already, until it runs there.
        three.open(7, b.node.id)
        one.let_switch()
        await moving
        await until(lambda: two.ways[7].zone == three.ways[7].zone == b.node.id)
        assert two.closed[0] == (0, b.node.id)
        assert not three.closed
        three.ways[7] = type(three.ways[7])()
        three.open(7, a.node.id)
        await until(lambda: three.ways[7].zone == b.node.id)
        # A message that has gone to the wrong zone follows its group.
        two.tell(a.node.id, wire.message(7, late, JOIN, b"", b""))
        await until(lambda: late in b.group(7))


async def test_where_groups_have_gone_is_forgotten_in_time(
    registry_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hand_over, "_REMEMBERED", 0.3)
    async with (
        zone(registry_url, Room, empty_timeout=0.02) as a,
        zone(registry_url, Room) as b,
        gateway(registry_url) as one,
    ):
        user = one.user()
        await placed(a, one, user)
        await a.hand_over(7, b.node.id)
        await b.hand_over(7, a.node.id)
        # It has come back: where it had gone is of no use, and forgotten once.
        assert not a._hand_over._moved
        await a.hand_over(7, b.node.id)
        assert a._hand_over._place(7) == b.node.id
        await until(lambda: not a._hand_over._forgetting)
        assert not a._hand_over._moved


async def test_a_gateway_that_is_lost_while_the_group_moves(registry_url: str) -> None:
    async with (
        zone(registry_url, Room) as a,
        zone(registry_url, Room) as b,
        gateway(registry_url) as one,
    ):
        user = one.user()
        await placed(a, one, user)
        async with gateway(registry_url) as two:
            await connected(two)
            (gone,) = await joined(two, 7)
            two.hold_switched = True
            moving = asyncio.ensure_future(a.hand_over(7))
            await until(lambda: two.held)
            assert gone in b.group(7)
            two.held.clear()
        await moving
        await until(lambda: b.group(7).users == {user})


async def test_no_third_zone_makes_the_group_meanwhile(registry_url: str) -> None:
    async with (
        zone(registry_url, Room) as a,
        zone(registry_url, Room) as b,
        zone(registry_url, Room) as x,
        gateway(registry_url) as one,
        gateway(registry_url) as two,
    ):
        user = one.user()
        await placed(a, one, user)
        await connected(two, zones=3)
        stop = False

        async def ask() -> None:
            while not stop:
                two.tell(x.node.id, wire.group(wire.ToZone.OPEN, 7))
                await asyncio.sleep(0)

        asking = asyncio.ensure_future(ask())
        two._on_opened = lambda sender, data: two.faults.append("opened")  # type: ignore[method-assign]
        two._on_closed = lambda sender, data: two.closed.append(wire.unpack(wire.CLOSED, data)[2:])  # type: ignore[method-assign]
        here, there = a, b
        for _ in range(20):
            await here.hand_over(7, there.node.id)
            assert 7 not in x.groups
            here, there = there, here
        stop = True
        await asking
        await until(lambda: len(two.closed) > 20)
        assert not two.faults
        assert {code for code, _ in two.closed} == {0}
        await goes_on(here, one, user)


async def test_a_name_that_is_free_for_an_instant_is_given_back(registry_url: str) -> None:
    """What a third zone does that claims a group between its release and the next claim."""
    async with (
        zone(registry_url, Room) as x,
        gateway(registry_url) as one,
        Node("room", registry=registry_url) as mover,
    ):
        await connected(one)
        marker = await mover.cluster.names(f"handovers.{kind_of('room')}").claim("7")
        one.tell(x.node.id, wire.group(ToZone.OPEN, 7))
        await until(lambda: one.kinds(ToGateway.CLOSED))
        assert one.kinds(ToGateway.CLOSED)[0][:13] == wire.closed(7, 0, NOWHERE, "")
        assert not x.groups
        names = mover.cluster.names(kind_of("room"))
        await until_free(names, "7")
        name = await names.claim("7")
        await name.release()
        await marker.release()
        await one.opened(7)
        assert 7 in x.groups


async def test_the_zone_with_most_room_of_the_newest_version_is_chosen(registry_url: str) -> None:
    async with (
        zone(registry_url, Room, memory=lambda: 0.1) as a,
        zone(registry_url, Room, memory=lambda: 0.5),
        zone(registry_url, Room, memory=lambda: 0.3) as best,
        zone(registry_url, Room, memory=lambda: 0.01, node={"name": "hall"}),
        gateway(registry_url) as one,
    ):
        await placed(a, one, one.user())
        await a.hand_over(7)
        assert 7 in best.groups
