"""Zones: which groups they have, and what gateways are told of it."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from typing import Any

import pytest

from domi_fast import DomiError, Names, NameTaken, Node, RegistryError
from domi_fast.gateway import wire
from domi_fast.gateway.events import Refusal
from domi_fast.gateway.ids import machine_of
from domi_fast.gateway.wire import NOWHERE, ToGateway, ToZone
from domi_fast.gateway.zones import kind_of
from domi_fast.stateful import Group, Zone
from tests.stateful.gateway import connected, gateway, until_free, zone
from tests.stateful.rooms import JOIN, SAID, SAY, WAIT, Room
from tests.stateful.test_groups import joined
from tests.support import ROOT, until


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"memory_limit": 0}, "memory_limit 0: a number from 0.001 to 1.0 is wanted"),
        ({"memory_limit": 1.1}, "memory_limit 1.1"),
        ({"group_limit": 0}, "group_limit 0"),
        ({"group_limit": 1.5}, "group_limit of type float: int is wanted"),
        ({"empty_timeout": -1}, "empty_timeout -1"),
        ({"mailbox_limit": 0}, "mailbox_limit 0"),
        ({"mailbox_bytes": 0}, "mailbox_bytes 0"),
        ({"mailbox_bytes": 1.5}, "mailbox_bytes of type float: int is wanted"),
        ({"memory": 0.5}, "memory 0.5 is not callable: a function that returns the share"),
        ({"factory": 5}, "factory 5 is not callable"),
        ({"factory": asyncio.sleep}, "is an async def"),
        ({"snapshots": "file"}, "snapshots of type str: a SnapshotStore"),
        ({"snapshot_interval": 1.0}, "snapshot_interval 1.0: it is of use with snapshots only"),
        ({"roll": "stay"}, "roll 'stay': leave or hand_over is wanted"),
    ],
)
def test_settings(registry_url: str, settings: dict[str, Any], error: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(error)):
        Zone(Node("room", registry=registry_url), **settings)


def test_a_zone_is_of_a_node() -> None:
    with pytest.raises(TypeError, match="a Node is wanted"):
        Zone("room")  # type: ignore[arg-type]


def test_the_kind_of_a_services_names() -> None:
    assert kind_of("room") == "groups.room"
    assert re.fullmatch(r"groups\.-[0-9a-f]{64}", kind_of("räume/1"))
    assert re.fullmatch(r"groups\.-[0-9a-f]{64}", kind_of("x" * 101))
    assert len(f"handovers.{kind_of('x' * 100)}") <= 128


async def test_a_zone_says_what_it_is(registry_url: str) -> None:
    share = 0.25
    async with (
        gateway(registry_url) as one,
        zone(registry_url, Room, memory=lambda: share, node={"version": "1.2"}) as rooms,
    ):
        await connected(one)
        assert one.states[rooms.node.id] == {
            "zone": rooms.id,
            "service": "room",
            "version": "1.2",
            "open": True,
            "full": False,
            "memory": 0.25,
            "groups": 0,
            "users": 0,
            "host": "127.0.0.1",
            "port": rooms.node.port,
        }
        assert machine_of(rooms.id) == rooms.node.id
        await joined(one, 1, 2)
        # Every second by itself, and at once to who asks.
        await until(lambda: one.states[rooms.node.id]["users"] == 2)
        one.states.clear()
        one.tell(rooms.node.id, bytes((ToZone.HELLO,)))
        await until(lambda: one.states)
        one.states.clear()
        share = 0.95
        await until(lambda: one.states and one.states[rooms.node.id]["full"])
        assert not one.states[rooms.node.id]["open"]
        share = 0.5
        await until(lambda: one.states[rooms.node.id]["open"])
        await rooms.close()
        await until(lambda: not one.states[rooms.node.id]["open"])


async def test_a_zone_that_is_full_makes_no_group(registry_url: str) -> None:
    share = 0.95
    async with (
        gateway(registry_url) as one,
        zone(registry_url, Room, memory=lambda: share, group_limit=2) as rooms,
    ):
        await connected(one)
        user = one.user()
        one.open(1, rooms.node.id)
        await until(lambda: one.closed)
        assert one.closed == [(Refusal.FULL, NOWHERE)]
        share = 0.9
        await until(lambda: not rooms.full)
        for id in (1, 2, 3):
            one.open(id, rooms.node.id)
        await until(lambda: len(one.closed) == 2)
        assert one.closed[1] == (Refusal.FULL, NOWHERE)
        assert sorted(rooms.groups) == [1, 2]
        share = 0.95
        # Who is a group already goes on.
        one.say(user, 1, JOIN)
        await until(lambda: one.got(user, JOIN))


async def test_without_a_factory_there_is_what_the_program_makes(registry_url: str) -> None:
    async with gateway(registry_url) as one, zone(registry_url) as rooms:
        await connected(one)
        assert one.states[rooms.node.id]["open"] is False
        Room(666, rooms)
        assert await one.opened(666, rooms.node.id) == rooms.node.id
        one.open(1, rooms.node.id)
        await until(lambda: one.closed)
        assert one.closed == [(Refusal.NO_GROUP, NOWHERE)]


async def test_a_factory_that_fails_leaves_the_name_free(registry_url: str) -> None:
    def fail(id: int, rooms: Zone) -> Group:
        Room(id, rooms)
        raise LookupError("no room")

    def mistake(id: int, rooms: Zone) -> Any:
        return id

    for make, reason in ((fail, "LookupError: no room"), (mistake, "the factory returned 1")):
        async with gateway(registry_url) as one, zone(registry_url, make) as rooms:
            await connected(one)
            one.open(1, rooms.node.id)
            await until(lambda: one.closed)
            assert one.closed == [(Refusal.FAILED, NOWHERE)]
            assert reason in wire.text(wire.CLOSED, one.kinds(ToGateway.CLOSED)[0])
            names = rooms.node.cluster.names(kind_of("room"))
            await until_free(names, "1")
            assert not rooms.groups


async def test_two_zones_that_are_asked_at_once_make_one_group(registry_url: str) -> None:
    async with (
        zone(registry_url, Room) as a,
        zone(registry_url, Room) as b,
        gateway(registry_url) as one,
        gateway(registry_url) as two,
    ):
        await connected(one, two, zones=2)
        for id in range(20):
            places = await asyncio.gather(
                one.opened(id, a.node.id), two.opened(id, b.node.id), two.opened(id, b.node.id)
            )
            assert len(set(places)) == 1
            assert (id in a.groups) + (id in b.groups) == 1
        # Who lost was told where it is.
        assert {elsewhere for _, elsewhere in one.closed} <= {b.node.id}
        assert {elsewhere for _, elsewhere in two.closed} <= {a.node.id}
        assert one.closed or two.closed
        assert {code for code, _ in one.closed + two.closed} == {0}


async def test_several_gateways_that_wait_are_all_answered(registry_url: str) -> None:
    async with (
        zone(registry_url, Room) as rooms,
        gateway(registry_url) as one,
        gateway(registry_url) as two,
    ):
        await connected(one, two)
        await asyncio.gather(one.opened(1), two.opened(1))
        assert list(rooms.groups) == [1]


async def test_groups_that_are_made_by_hand(registry_url: str) -> None:
    rooms = Zone(Node("room", registry=registry_url), empty_timeout=0.02)
    before = Room(666, rooms)
    with pytest.raises(DomiError, match=re.escape("await its ready(), once the zone has started")):
        await before.ready()
    with pytest.raises(DomiError, match="group 666 is not the zone's yet"):
        before.broadcast(SAID, b"")
    async with rooms, gateway(registry_url) as one:
        await before.ready()
        after = Room(667, rooms)
        await after.ready()
        with pytest.raises(DomiError, match="group 667 is in this zone already"):
            Room(667, rooms)
        await connected(one)
        (user,) = await joined(one, 666)
        one.member(ToZone.LEAVE, user, 666)
        await until(lambda: not before.users)
        made = Room(668, rooms)
        await made.ready()
        # As long as one that is disposed of is there.
        marker = Room(669, rooms)
        await marker.ready()
        marker._by_hand = False
        await until(lambda: 669 not in rooms.groups)
        assert rooms.groups == {666: before, 667: after, 668: made}
        with pytest.raises(DomiError, match="group 1 is not in this zone, which has 3"):
            rooms.group(1)


async def test_a_group_by_hand_that_another_zone_has(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with zone(registry_url) as a:
        await Room(666, a).ready()
        other = Zone(Node("room", registry=registry_url))
        late = Room(666, other)
        async with other:
            with pytest.raises(NameTaken) as caught:
                await late.ready()
            assert caught.value.holder.id == a.node.id
            assert json.loads(caught.value.holder.value) == {"zone": str(a.id)}
            assert not other.groups
            assert "is made by hand and is another's" in caplog.text


class Away:
    """The names of a cluster whose registry is away when one looks for the first time."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self.looks = 0

    async def find(self, name: str) -> object:
        self.looks += 1
        if self.looks == 1:
            raise RegistryError("away for a moment")
        return await self._names.find(name)


async def test_a_name_that_was_claimed_when_the_registry_goes_is_given_back(
    registry_url: str,
) -> None:
    async with zone(registry_url) as a, zone(registry_url) as b:
        a._openings.moves = Away(a._openings.moves)  # type: ignore[assignment]
        with pytest.raises(RegistryError, match="away for a moment"):
            await Room(666, a).ready()
        await until_free(b.node.cluster.names(kind_of("room")), "666")
        await Room(666, b).ready()


async def test_a_group_without_members_ends(registry_url: str) -> None:
    async with zone(registry_url, Room, empty_timeout=0.05) as rooms, gateway(registry_url) as one:
        await connected(one)
        (user,) = await joined(one, 1)
        room = rooms.group(1)
        assert isinstance(room, Room)
        # As long as one without is there.
        await one.opened(2)
        await until(lambda: 2 not in rooms.groups)
        assert 1 in rooms.groups
        one.frames.clear()
        one.moves = 0
        one.member(ToZone.LEAVE, user, 1)
        await until(lambda: 1 not in rooms.groups)
        assert one.kinds(ToGateway.MOVED) == [wire.moved(1, NOWHERE)]
        assert one.moves == 1
        await rooms._endings.over(1)
        assert await rooms.node.cluster.names(kind_of("room")).find("1") is None
        assert room.closings == 1
        assert not rooms.users
        with pytest.raises(DomiError, match="group 1 has ended: it had no members"):
            room.broadcast(SAID, b"")
        # It is made anew for who asks again.
        await joined(one, 1)
        assert rooms.group(1) is not room
        assert not one.faults


async def test_a_message_that_crosses_the_end_is_not_lost(registry_url: str) -> None:
    async with (
        zone(registry_url, Room, empty_timeout=0.02) as rooms,
        gateway(registry_url) as one,
        gateway(registry_url) as two,
    ):
        await connected(one, two)
        await one.opened(1)
        await two.opened(1)
        room = rooms.group(1)
        two.hold_switched = True
        await until(lambda: one.moves and two.held)
        # The zone has said MOVED to both; this gateway has not heard it when its user speaks.
        (user,) = await joined(two, 1)
        two.let_switch()
        two.say(user, 1, SAY, b"still there")
        await until(lambda: two.got(user, SAID) == [b"still there"])
        assert rooms.group(1) is room
        assert not two.refused[user]
        assert not two.lost


async def test_a_gateway_that_is_lost_while_a_group_ends_is_not_waited_for(
    registry_url: str,
) -> None:
    async with zone(registry_url, Room, empty_timeout=0.02) as rooms:
        async with gateway(registry_url) as one:
            await connected(one)
            one.hold_switched = True
            await one.opened(1)
            await until(lambda: one.held)
            assert 1 in rooms.groups
            one.held.clear()
        await until(lambda: 1 not in rooms.groups)


async def test_a_group_whose_name_is_anothers_is_lost(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with zone(registry_url, Room) as rooms, gateway(registry_url) as one:
        await connected(one)
        await joined(one, 1)
        room = rooms.group(1)
        assert room._name is not None
        # What the node's names do once another was quicker.
        room._name.lost.set()
        with pytest.raises(DomiError, match="group 1 is lost: another node has its name"):
            room.broadcast(SAID, b"twice")
        await until(lambda: one.lost == [1])
        assert not rooms.groups
        assert "another node has its name" in caplog.text


async def test_what_a_lost_group_does_not_take_is_refused(registry_url: str) -> None:
    async with zone(registry_url, Room) as rooms, gateway(registry_url) as one:
        await connected(one)
        (user,) = await joined(one, 1)
        room = rooms.group(1)
        assert isinstance(room, Room)
        one.say(user, 1, WAIT)
        one.say(user, 1, SAY, b"waits")
        await until(lambda: len(room._mailbox) == 1)
        assert room._name is not None
        room._name.lost.set()
        # The one that waits, and the one that finds it lost.
        one.say(user, 1, SAY, b"comes")
        await until(lambda: len(one.refused[user]) == 2)
        assert {got[:3] for got in one.refused[user]} == {(1, SAY, Refusal.NO_GROUP)}
        assert "is lost: another node has its name" in one.refused[user][0].reason
        assert one.lost == [1]
        room.gate.set()
        await until(lambda: len(room.said) == 2)


async def test_a_group_that_is_lost_is_noticed_by_itself(registry_url: str) -> None:
    async with zone(registry_url, Room) as rooms, gateway(registry_url) as one:
        await connected(one)
        await one.opened(1)
        name = rooms.group(1)._name
        assert name is not None
        name.lost.set()
        await until(lambda: one.lost == [1])


async def test_a_message_for_a_group_that_is_not_there(registry_url: str) -> None:
    async with zone(registry_url, Room) as rooms, gateway(registry_url) as one:
        await connected(one)
        user = one.user()
        one.tell(rooms.node.id, wire.message(1, user, SAY, b"", b""))
        await until(lambda: one.lost and one.refused[user])
        assert one.refused[user][0].code == Refusal.NO_GROUP


async def test_bad_messages_are_counted_and_hurt_nobody(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with zone(registry_url, Room) as rooms, gateway(registry_url) as one:
        await connected(one)
        bad = [b"", b"\x00", b"\xff", b"\x02\x01", b"\x03" + b"\xff" * 19, b"\x20" + b"\x09" * 10]
        bad += [b"\x23" + b"\x01" * 10, b"\x24\x03", b"\x07", b"\x04" * 16]
        for message in bad:
            one.tell(rooms.node.id, message)
        await joined(one, 1)
        assert rooms.node.counters()["zone_messages_bad"] == len(bad)
        assert caplog.text.count("says to the zone what it may not") == len(bad)


async def test_closing_tells_the_gateways_and_lets_handlers_end(registry_url: str) -> None:
    async with gateway(registry_url) as one, Node("room", registry=registry_url) as node:
        rooms = Zone(node, Room)
        async with rooms:
            await connected(one)
            (user,) = await joined(one, 1)
            room = rooms.group(1)
            assert isinstance(room, Room)
            one.say(user, 1, WAIT)
            await until(lambda: room.said)
            closing = asyncio.ensure_future(rooms.close())
            await asyncio.sleep(0.01)
            assert not closing.done()
            room.gate.set()
            await closing
        assert room.said == [(user, b"waits"), (user, b"waited")]
        await until(lambda: one.lost == [1])
        assert rooms.state == "closed"
        assert room.closings == 1
        await rooms.wait_closed()
        # The node was not the zone's.
        assert node.state == "serving"
        assert await node.cluster.names(kind_of("room")).find("1") is None
        with pytest.raises(DomiError, match="this zone is closed: make another Zone"):
            await rooms.start()


async def test_a_handler_that_hangs_is_cancelled_when_the_zone_closes(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with gateway(registry_url) as one:
        async with zone(registry_url, Room, node={"drain_timeout": 0.2}) as rooms:
            await connected(one)
            (user,) = await joined(one, 1)
            one.say(user, 1, WAIT)
            room = rooms.group(1)
            assert isinstance(room, Room)
            await until(lambda: room.said)
        assert "a handler still runs after 0.1 s" in caplog.text
        assert room.said == [(user, b"waits")]


async def test_the_node_closes_its_zone(registry_url: str) -> None:
    async with gateway(registry_url) as one:
        rooms = Zone(Node("room", registry=registry_url), Room)
        await rooms.start()
        await connected(one)
        await one.opened(1)
        await rooms.node.close()
        assert rooms.state == "closed"
        assert one.lost == [1]
        await rooms.close()


async def test_a_zone_that_starts_its_node_closes_it(registry_url: str) -> None:
    async with zone(registry_url, Room) as rooms:
        assert rooms.node.state == "serving"
    assert rooms.node.state == "closed"
    with pytest.raises(DomiError, match="its node is closed"):
        await Zone(rooms.node, Room).start()


async def test_a_node_has_one_zone(registry_url: str) -> None:
    async with zone(registry_url, Room) as rooms:
        with pytest.raises(DomiError, match="a node has one at a time, make another for another"):
            await Zone(rooms.node, Room).start()
        assert rooms.state == "serving"
        assert rooms.node.state == "serving"


async def test_a_node_whose_zone_was_closed_has_another(registry_url: str) -> None:
    async with Node("room", registry=registry_url) as node, gateway(registry_url) as one:
        async with Zone(node, Room) as first:
            await connected(one)
            await joined(one, 1)
        await until(lambda: one.lost == [1])
        one.states.clear()
        async with Zone(node, Room) as second:
            assert second.id != first.id
            assert node._wings._wings == [second]
            await connected(one)
            await joined(one, 1)
            assert 1 in second.groups
            # The node's drain is that of this zone.
            draining = asyncio.ensure_future(node.drain(20))
            await until(lambda: second.state == "retiring")
            draining.cancel()
        await node.wait_closed()


async def test_a_start_that_fails_leaves_the_node_as_it_was(registry_url: str) -> None:
    async with (
        Node("room", registry=registry_url) as node,
        Node("mover", registry=registry_url) as mover,
    ):
        node.on_newer(lambda peer: None)
        with pytest.raises(DomiError, match="on_newer is"):
            await Zone(node, Room).start()
        node.on_newer(None)
        # As if its group were moving, which is waited for.
        await mover.cluster.names(f"handovers.{kind_of('room')}").claim("1")
        failing = Zone(node, Room)
        Room(1, failing)
        starting = asyncio.ensure_future(failing.start())
        await until(lambda: failing.id)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert failing.state == "closed"
        async with Zone(node, Room) as rooms:
            assert rooms.state == "serving"


async def test_a_node_whose_zone_was_closed_rolls_by_itself(registry_url: str) -> None:
    old = {"registry": registry_url, "version": "1", "roll_deadline": 5.0}
    async with Node("room", **old) as node, Node("room", **old) as other:
        async with Zone(node, Room):
            pass
        async with Zone(other, Room) as rooms, gateway(registry_url) as one:
            await connected(one)
            await joined(one, 1)
            async with Node("room", registry=registry_url, version="2"):
                await node.wait_closed()
                # At once, where a newer one is there when its zone closes.
                assert other.state == "serving"
                await rooms.close()
                await other.wait_closed()


@pytest.mark.parametrize("whose", ["the system's", "the program's"])
async def test_how_often_the_memory_is_looked_at(
    registry_url: str, whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def memory() -> float:
        nonlocal looks
        looks += 1
        return 0.99

    settings: dict[str, Any] = {"memory": memory}
    if whose == "the system's":  # which cannot be counted otherwise
        monkeypatch.setattr("domi_fast.stateful.zone.used_share", memory)
        settings = {}
    async with zone(registry_url, Room, **settings) as rooms, gateway(registry_url) as one:
        await connected(one)
        looks = 0
        for id in range(100):
            one.tell(rooms.node.id, wire.group(ToZone.OPEN, id))
        await until(lambda: len(one.closed) == 100)
        assert looks < 50 if whose == "the system's" else looks >= 100


PROGRAM = """
import sys
from domi_fast import Node, run
from domi_fast.stateful import Group, Zone

zone = Zone(Node("room", registry=sys.argv[1], lease_ttl=0.5))
group = Group(666, zone)

@group.handle(50)
def join(message):
    group.add_user(message.user)

@group.handle(51)
def say(message):
    group.broadcast(52, message.data)

run(zone)
"""


async def test_the_seeds_program(sqlite_url: str) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM, sqlite_url], cwd=ROOT) as process:
        try:
            async with gateway(sqlite_url) as one:
                await connected(one)
                (user,) = await joined(one, 666)
                one.say(user, 666, SAY, b"hello")
                await until(lambda: one.got(user, SAID) == [b"hello"])
                process.send_signal(signal.SIGTERM)
                await until(lambda: process.poll() is not None, 10)
                assert process.returncode == 0
                await until(lambda: one.lost == [666])
        finally:
            process.kill()


async def test_a_group_by_hand_outlives_a_zone_that_was_killed(sqlite_url: str) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM, sqlite_url], cwd=ROOT) as process:
        try:
            async with gateway(sqlite_url) as one, zone(sqlite_url) as rooms:
                await connected(one, zones=2)
                place = await one.opened(666)
                process.kill()
                await until(lambda: place not in rooms.node.peers)
                # The registry has the killed one for its holder, until its lease is over.
                await Room(666, rooms).ready()
        finally:
            process.kill()


async def test_a_member_that_comes_while_a_group_ends_keeps_it(registry_url: str) -> None:
    async with zone(registry_url, Room, empty_timeout=0.02) as rooms, gateway(registry_url) as one:
        await connected(one)
        await one.opened(1)
        room, user = rooms.group(1), one.user()
        one.hold_switched = True
        await until(lambda: one.held)
        room.add_user(user)
        one.let_switch()
        await until(lambda: user in one.members[1])
        await until(lambda: not rooms._endings.ends(1))
        room.broadcast(SAID, b"you are in")
        await until(lambda: one.got(user, SAID))
        assert rooms.group(1) is room
