"""A gateway that reads nothing: what may be left out raises, and what may not waits in order."""

from __future__ import annotations

import contextlib

import pytest

from domi_fast import LibraryChannel, Overloaded
from domi_fast.gateway.wire import ToGateway
from tests.stateful.gateway import connected, gateway, zone
from tests.stateful.rooms import SAID, Room
from tests.stateful.test_groups import joined
from tests.support import until


async def test_what_a_full_queue_has_no_room_for(registry_url: str) -> None:
    node = {"queue_limit": 65536, "when_full": "drop_oldest"}
    async with (
        zone(registry_url, Room, node=node) as rooms,
        zone(registry_url, Room) as other,
        gateway(registry_url) as one,
    ):
        await connected(one, zones=2)
        await one.opened(1, rooms.node.id)
        first, second = await joined(one, 1, 2)
        room = rooms.group(1)
        sent = 0
        # Nothing is read of it before this test lets the loop go on. A node that drops when a queue
        # is full does so on the channels of programs alone.
        with contextlib.suppress(Overloaded):
            for number in range(1000):
                room.broadcast(SAID, b"%d" % number + b"x" * 50_000)
                sent = number + 1
        assert sent < 1000
        room.remove_user(second)
        with pytest.raises(Overloaded, match="the queue to node"):
            room.broadcast(SAID, b"behind what waits")
        await rooms.hand_over(1, other.node.id)
        await until(lambda: len(one.got(first, SAID)) == sent)
        got = one.got(second, SAID)
        assert [int(data.partition(b"x")[0]) for data in got] == list(range(sent))
        kinds = [data[0] for _, data in one.frames if data[0] != ToGateway.SEND]
        assert kinds[-2:] == [ToGateway.PART, ToGateway.MOVED]
        assert one.members[1] == {first} == other.group(1).users
        assert LibraryChannel.GATEWAY not in {channel for _, channel in rooms.node.drops()}
        assert not one.faults
