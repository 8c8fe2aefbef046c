"""Groups: their handlers, their members, and what members hear."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from domi_fast import DomiError, LibraryChannel, Node, PeerLost
from domi_fast.gateway.events import LibraryEvent, Refusal
from domi_fast.gateway.ids import Ids
from domi_fast.gateway.wire import ToGateway, ToZone
from domi_fast.stateful import Group, Message, Zone
from tests.stateful.gateway import Gateway, connected, gateway, zone
from tests.stateful.rooms import FAIL, JOIN, SAID, SAY, WAIT, Room
from tests.support import until


async def joined(asked: Gateway, group: int, count: int = 1) -> list[int]:
    """New members of the group, at this gateway."""
    users = [asked.user() for _ in range(count)]
    for user in users:
        asked.say(user, group, JOIN)
    await until(lambda: all(user in asked.members[group] for user in users))
    return users


async def test_a_group_is_made_for_who_asks_and_all_its_members_hear(registry_url: str) -> None:
    async with zone(registry_url, Room) as rooms, gateway(registry_url) as one:
        await connected(one)
        first, second = await joined(one, 666, 2)
        one.say(first, 666, SAY, b"hello")
        await until(lambda: one.got(second, SAID))
        assert one.got(first, SAID) == one.got(second, SAID) == [b"hello"]
        assert one.got(first, JOIN) == [b"welcome"]
        room = rooms.group(666)
        assert room.users == {first, second} and len(room) == 2 and first in room
        assert room.gateways == {one.node.id} and room.id == 666 and room.zone is rooms
        assert rooms.users == 2 and list(rooms.groups) == [666]
        assert not one.faults


async def test_a_broadcast_is_one_frame_for_each_gateway(registry_url: str) -> None:
    async with (
        zone(registry_url, Room) as rooms,
        gateway(registry_url) as one,
        gateway(registry_url) as two,
        gateway(registry_url) as three,
    ):
        await connected(one, two, three)
        await joined(one, 1, 5)
        await joined(two, 1, 2)
        await three.opened(1)
        counted = {each: each.node.counters()["frames_in"] for each in (one, two)}
        for _ in range(20):
            rooms.group(1).broadcast(SAID, b"x" * 100)
        await until(lambda: len(two.kinds(ToGateway.BROADCAST)) == 20)
        await until(lambda: len(one.kinds(ToGateway.BROADCAST)) == 20)
        for each, before in counted.items():
            # Beside them only the states, one a second, and heartbeats.
            assert 20 <= each.node.counters()["frames_in"] - before <= 24
        assert len(set(one.kinds(ToGateway.BROADCAST)) | set(two.kinds(ToGateway.BROADCAST))) == 1
        assert not three.kinds(ToGateway.BROADCAST)


async def test_exclude(registry_url: str) -> None:
    async with (
        zone(registry_url, Room) as rooms,
        gateway(registry_url) as one,
        gateway(registry_url) as two,
    ):
        await connected(one, two)
        a, b = await joined(one, 1, 2)
        (c,) = await joined(two, 1)
        room = rooms.group(1)
        room.broadcast(SAID, b"1", exclude=a)
        room.broadcast(SAID, b"2", exclude=[a, c])
        room.broadcast(SAID, b"3", exclude=(user for user in (a, b, c)))
        room.broadcast(SAID, b"4")
        await until(lambda: b"4" in one.got(a, SAID) and b"4" in two.got(c, SAID))
        assert one.got(a, SAID) == [b"4"]
        assert one.got(b, SAID) == [b"1", b"2", b"4"]
        assert two.got(c, SAID) == [b"1", b"4"]
        # Each gateway is told of its own users alone, and of none where it has nobody to send to.
        assert [data[11] for data in one.kinds(ToGateway.BROADCAST)] == [1, 1, 0]
        assert [data[11] for data in two.kinds(ToGateway.BROADCAST)] == [0, 0]
        with pytest.raises(ValueError, match="65536 users to exclude: 65535 at most"):
            room.broadcast(SAID, b"", exclude=range(65536))


async def test_a_gateway_that_cannot_be_sent_to_does_not_keep_others_from_it(
    registry_url: str,
) -> None:
    async with (
        zone(registry_url, Room) as rooms,
        gateway(registry_url) as one,
        gateway(registry_url) as two,
    ):
        await connected(one, two)
        await joined(min(one, two, key=lambda each: each.node.id), 1)
        slow = min(one, two, key=lambda each: each.node.id)
        quick = two if slow is one else one
        (user,) = await joined(quick, 1)
        slow.node.unsubscribe(LibraryChannel.GATEWAY)
        await until(lambda: LibraryChannel.GATEWAY not in rooms.node.peers[slow.node.id].channels)
        with pytest.raises(DomiError) as caught:
            rooms.group(1).broadcast(SAID, b"all the same")
        assert caught.value.channel == LibraryChannel.GATEWAY
        await until(lambda: quick.got(user, SAID) == [b"all the same"])
        slow.node.subscribe(LibraryChannel.GATEWAY, slow._on)
