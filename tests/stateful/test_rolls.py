"""A new version comes: what becomes of the groups of the old."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from domi_fast import Context, DomiError, LibraryChannel, Node
from domi_fast.gateway.wire import NOWHERE, ToZone
from domi_fast.stateful import Zone
from tests.stateful.gateway import connected, gateway, zone
from tests.stateful.rooms import JOIN, SAID, SAY, Room
from tests.stateful.test_groups import joined
from tests.support import until

OLD, NEW = {"version": "1"}, {"version": "2"}


async def test_leave_keeps_each_group_until_its_last_member_has_gone(registry_url: str) -> None:
    async with gateway(registry_url) as one, zone(registry_url, Room, node=OLD) as old:
        await connected(one)
        first, second = await joined(one, 1, 2)
        (third,) = await joined(one, 2)
        by_hand = Room(3, old)
        await by_hand.ready()
        async with zone(registry_url, Room, node=NEW) as new:
            await until(lambda: old.state == "retiring")
            await until(lambda: not one.states[old.node.id]["open"])
            # An empty group goes at once, and no new one is made.
            await until(lambda: sorted(old.groups) == [1, 2])
            one.open(9, old.node.id)
            await until(lambda: one.closed)
            assert one.closed[0] == (0, NOWHERE)
            await until(lambda: list(new.groups) == [9])
            one.say(first, 1, SAY, b"we stay")
            await until(lambda: one.got(second, SAID) == [b"we stay"])
            one.member(ToZone.LEAVE, first, 1)
            one.member(ToZone.LEAVE, third, 2)
            await until(lambda: sorted(old.groups) == [1])
            assert old.node.state == "serving"
            one.member(ToZone.LEAVE, second, 1)
            await old.wait_closed()
            await old.node.wait_closed()
            assert not one.lost
            assert not one.faults
            assert 1 not in new.groups
            await joined(one, 1)
            assert 1 in new.groups


async def test_hand_over_moves_the_groups_to_the_newer(registry_url: str) -> None:
    async with (
        gateway(registry_url) as one,
        zone(registry_url, Room, node=OLD, roll="hand_over") as old,
    ):
        await connected(one)
        users = {id: (await joined(one, id))[0] for id in range(20)}
        async with zone(registry_url, Room, node=NEW) as new:
            await old.node.wait_closed()
            assert sorted(new.groups) == sorted(users)
            assert new.users == len(users)
            for id, user in users.items():
                one.say(user, id, SAY, b"here")
            await until(lambda: all(one.got(user, SAID) == [b"here"] for user in users.values()))
            assert not one.lost
            assert not one.faults
            assert one.moves == len(users)


async def test_what_cannot_be_moved_stays(registry_url: str) -> None:
    async with (
        gateway(registry_url) as one,
        zone(registry_url, Room, node=OLD, roll="hand_over") as old,
    ):
        await connected(one)
        (user,) = await joined(one, 1)
        async with zone(registry_url, node=NEW):
            await until(lambda: old.state == "retiring")
            one.say(user, 1, SAY, b"still here")
            await until(lambda: one.got(user, SAID))
            assert 1 in old.groups
            one.member(ToZone.LEAVE, user, 1)
            await old.node.wait_closed()
        assert not one.lost


class Stubborn(Room):
    """Its state cannot be had for a while."""

    stubborn = True

    def save(self) -> bytes:
        if self.stubborn:
            raise KeyError("not now")
        return super().save()


async def test_what_fails_ends_no_roll(registry_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Neither a group whose save() raises, nor a stranger on the channel of zones."""
    async with (
        gateway(registry_url) as one,
        zone(registry_url, Stubborn, node=OLD, roll="hand_over") as old,
        Node("stranger", registry=registry_url) as stranger,
    ):
        await connected(one)
        await joined(one, 1)
        room = old.group(1)
        assert isinstance(room, Stubborn)
        asked = 0

        @stranger.subscribe(LibraryChannel.ZONE)
        def answer(context: Context) -> None:
            nonlocal asked
            if context.is_request:
                asked += 1
                context.reply(b'{"open": true}' if asked % 2 else b'["service"]')

        await until(lambda: LibraryChannel.ZONE in old.node.peers[stranger.id].channels)
        async with zone(registry_url, Stubborn, node=NEW) as new:
            await until(lambda: "group 1 cannot be moved" in caplog.text)
            assert asked
            room.stubborn = False
            await until(lambda: 1 in new.groups)
            await old.node.wait_closed()
            # Not once a try.
            assert caplog.text.count("group 1 cannot be moved") == 1


async def test_zones_are_not_asked_for_each_group(registry_url: str) -> None:
    async with (
        gateway(registry_url) as one,
        zone(registry_url, Room) as a,
        zone(registry_url, Room) as b,
    ):
        await connected(one, zones=2)
        for id in range(50):
            await one.opened(id, a.node.id)
        asked = 0
        facts = b.facts

        def count() -> dict[str, Any]:
            nonlocal asked
            asked += 1
            return facts()

        b._hand_over._zone.facts = count  # type: ignore[method-assign]
        first = a._hand_over._choose()
        assert await asyncio.gather(first, *[a._hand_over._choose() for _ in range(50)]) == (
            [b.node.id] * 51
        )
        asked_by_then = asked
        assert asked_by_then == 1
        # What is refused is asked for anew.
        b._state = "retiring"
        with pytest.raises(DomiError, match="does not take group 1"):
            await a.hand_over(1)
        with pytest.raises(DomiError, match="no other zone of 'room', of 1 zones"):
            await a.hand_over(1)
        b._state = "serving"


async def test_a_node_that_drains_waits_for_the_members(registry_url: str) -> None:
    async with gateway(registry_url) as one, Node("room", registry=registry_url) as node:
        async with Zone(node, Room) as rooms:
            await connected(one)
            (user,) = await joined(one, 1)
            draining = asyncio.ensure_future(node.drain(20))
            await until(lambda: rooms.state == "retiring")
            one.say(user, 1, SAY, b"a last word")
            await until(lambda: one.got(user, SAID))
            assert not draining.done()
            one.member(ToZone.LEAVE, user, 1)
            assert await draining
        assert not one.refused[user]


async def test_a_draining_ends_at_its_deadline(registry_url: str) -> None:
    async with gateway(registry_url) as one, Node("room", registry=registry_url) as node:
        async with Zone(node, Room) as rooms:
            await connected(one)
            (user,) = await joined(one, 1)
            assert not await node.drain(0.2)
            assert rooms.state == "closed"
            await until(lambda: one.lost == [1])
        one.say(user, 1, JOIN)


async def test_a_node_that_drains_hands_its_groups_over(registry_url: str) -> None:
    async with (
        gateway(registry_url) as one,
        zone(registry_url, Room, roll="hand_over") as a,
        zone(registry_url, Room) as b,
    ):
        await connected(one, zones=2)
        await one.opened(1, a.node.id)
        (user,) = await joined(one, 1)
        assert await a.node.drain(20)
        assert b.group(1).users == {user}
        assert not one.lost
