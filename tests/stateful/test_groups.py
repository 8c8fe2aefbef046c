"""Groups: their handlers, their members, and what members hear."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from domi_fast import DomiError, LibraryChannel, Node, Overloaded, PeerLost
from domi_fast.gateway import wire
from domi_fast.gateway.events import LibraryEvent, Refusal
from domi_fast.gateway.ids import Ids, machine_of
from domi_fast.gateway.links import Link, Links
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
        assert room.users == {first, second}
        assert len(room) == 2
        assert first in room
        assert room.gateways == {one.node.id}
        assert room.id == 666
        assert room.zone is rooms
        assert rooms.users == 2
        assert list(rooms.groups) == [666]
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


async def test_a_gateway_that_closes_does_not_keep_others_from_it(
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
        rooms.group(1).broadcast(SAID, b"all the same")
        await until(lambda: quick.got(user, SAID) == [b"all the same"])
        slow.node.subscribe(LibraryChannel.GATEWAY, slow._on)


async def test_a_gateway_that_cannot_be_sent_to_does_not_keep_others_from_it(
    registry_url: str,
) -> None:
    async with (
        zone(registry_url, Room, node={"queue_limit": 65536}) as rooms,
        gateway(registry_url) as one,
        gateway(registry_url) as two,
    ):
        await connected(one, two)
        await joined(min(one, two, key=lambda each: each.node.id), 1)
        slow = min(one, two, key=lambda each: each.node.id)
        quick = two if slow is one else one
        (user,) = await joined(quick, 1)
        room, link = rooms.group(1), rooms._links.of(slow.node.id)
        assert link is not None
        # In one turn of the loop, in which nothing is written.
        with contextlib.suppress(Overloaded):
            while True:
                link.send(wire.send(0, SAID, bytes(50_000)))
        with pytest.raises(Overloaded) as caught:
            room.broadcast(SAID, b"all the same")
        assert caught.value.channel == LibraryChannel.GATEWAY
        assert caught.value.peer == slow.node.id
        await until(lambda: quick.got(user, SAID) == [b"all the same"])


async def test_the_handlers_of_a_group_run_one_at_a_time_and_groups_do_not_wait(
    registry_url: str,
) -> None:
    async with zone(registry_url, Room) as rooms, gateway(registry_url) as one:
        await connected(one)
        first, second = await joined(one, 1, 2)
        (other,) = await joined(one, 2)
        one.say(first, 1, WAIT)
        one.say(second, 1, SAY, b"behind it")
        one.say(other, 2, SAY, b"beside it")
        await until(lambda: one.got(other, SAID) == [b"beside it"])
        room = rooms.group(1)
        assert isinstance(room, Room)
        assert room.said == [(first, b"waits")]
        assert not one.got(second, SAID)
        room.gate.set()
        await until(lambda: one.got(second, SAID))
        assert room.said == [(first, b"waits"), (first, b"waited"), (second, b"behind it")]


async def test_what_waits_is_handled_in_the_order_of_arrival(registry_url: str) -> None:
    async with zone(registry_url, Room) as rooms, gateway(registry_url) as one:
        await connected(one)
        (user,) = await joined(one, 1)
        one.say(user, 1, WAIT)
        sent = [b"%d" % number for number in range(500)]
        for data in sent:
            one.say(user, 1, SAY, data)
        room = rooms.group(1)
        assert isinstance(room, Room)
        await until(lambda: len(room._mailbox) == len(sent))
        room.gate.set()
        await until(lambda: len(one.got(user, SAID)) == len(sent))
        assert one.got(user, SAID) == sent


async def test_a_full_mailbox_refuses(registry_url: str) -> None:
    async with zone(registry_url, Room, mailbox_limit=2) as rooms, gateway(registry_url) as one:
        await connected(one)
        (user,) = await joined(one, 1)
        one.say(user, 1, WAIT)
        for data in (b"1", b"2", b"3"):
            one.say(user, 1, SAY, data)
        one.member(ToZone.LEAVE, user, 1)
        await until(lambda: one.refused[user])
        assert [(got.event, got.code) for got in one.refused[user]] == [(SAY, Refusal.OVERLOADED)]
        room = rooms.group(1)
        assert isinstance(room, Room)
        await until(lambda: len(room._mailbox) == 3)
        room.gate.set()
        # That a member has left is never refused.
        await until(lambda: not room.users)
        assert [data for _, data in room.said] == [b"waits", b"waited", b"1", b"2"]


async def test_a_mailbox_is_bounded_in_bytes(registry_url: str) -> None:
    async with zone(registry_url, Room, mailbox_bytes=1000) as rooms, gateway(registry_url) as one:
        await connected(one)
        (user,) = await joined(one, 1)
        one.say(user, 1, WAIT)
        for _ in range(3):
            one.say(user, 1, SAY, bytes(400), b"me" * 50)
        await until(lambda: one.refused[user])
        assert one.refused[user] == [
            (1, SAY, Refusal.OVERLOADED, "2 messages of 1000 bytes wait"),
        ]
        room = rooms.group(1)
        assert isinstance(room, Room)
        room.gate.set()
        await until(lambda: len(one.got(user, SAID)) == 2)
        # What was handled counts no more.
        one.say(user, 1, SAY, bytes(400))
        await until(lambda: len(one.got(user, SAID)) == 3)


async def test_refusals_of_a_flood_do_not_pile_up(registry_url: str) -> None:
    """They are left out where the queue to the gateway is full."""
    node = {"queue_limit": 65536}
    async with (
        zone(registry_url, Room, mailbox_limit=1, node=node) as rooms,
        gateway(registry_url) as one,
    ):
        await connected(one)
        (user,) = await joined(one, 1)
        room, link = rooms.group(1), rooms._links.of(one.node.id)
        assert link is not None
        one.say(user, 1, WAIT)
        one.say(user, 1, SAY)
        await until(lambda: len(room._mailbox) == 1)
        flood = wire.UserMessage(1, user, SAY, b"", b"")
        # In one turn of the loop, in which nothing is written.
        for size in (50_000, 1):
            with contextlib.suppress(Overloaded):
                while True:
                    link.send(wire.send(0, SAID, bytes(size)))
        for _ in range(100):
            room._take(link, flood)
        assert not link._waiting
        await rooms.node.drained(one.node.id)
        assert isinstance(room, Room)
        room.gate.set()
        await until(lambda: one.got(user, SAID))
        assert len(one.refused[user]) < 100


async def test_what_nobody_handles_is_refused(registry_url: str) -> None:
    async with zone(registry_url, Room), gateway(registry_url) as one:
        await connected(one)
        (user,) = await joined(one, 1)
        one.say(user, 1, 999)
        await until(lambda: one.refused[user])
        assert one.refused[user] == [(1, 999, Refusal.NO_HANDLER, "group 1 does not handle 999")]


async def test_a_handler_that_raises_hurts_only_its_message(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with zone(registry_url, Room) as rooms, gateway(registry_url) as one:
        await connected(one)
        (user,) = await joined(one, 1)
        room = rooms.group(1)

        @room.handle(60)
        async def fail_later(message: Message) -> None:
            await asyncio.sleep(0)
            raise ValueError("too late")

        one.say(user, 1, FAIL)
        one.say(user, 1, 60)
        one.say(user, 1, SAY, b"it goes on")
        await until(lambda: one.got(user, SAID) == [b"it goes on"])
        assert one.refused[user] == [
            (1, FAIL, Refusal.FAILED, "LookupError: no such thing"),
            (1, 60, Refusal.FAILED, "ValueError: too late"),
        ]
        assert rooms.node.counters()["group_handler_errors"] == 2
        assert caplog.text.count("Traceback") == 2


async def test_a_text_that_cannot_be_sent_hurts_only_its_message(registry_url: str) -> None:
    async with zone(registry_url, Room) as rooms, gateway(registry_url) as one:
        await connected(one)
        (user,) = await joined(one, 1)
        room = rooms.group(1)

        @room.handle(60)
        def fail(message: Message) -> None:
            raise ValueError(json.loads('"no such \\ud800"'))

        one.say(user, 1, WAIT)
        one.say(user, 1, 60)
        one.say(user, 1, SAY, b"it goes on")
        assert isinstance(room, Room)
        await until(lambda: len(room._mailbox) == 2)
        room.gate.set()
        await until(lambda: one.got(user, SAID) == [b"it goes on"])
        assert one.refused[user] == [(1, 60, Refusal.FAILED, "ValueError: no such ?")]


async def test_a_cancellation_that_nobody_asked_for_is_a_failure(registry_url: str) -> None:
    async with zone(registry_url, Room) as rooms, gateway(registry_url) as one:
        await connected(one)
        (user,) = await joined(one, 1)
        room = rooms.group(1)
        work = asyncio.get_running_loop().create_future()
        work.cancel()
        room.handle(60, lambda message: work.result())

        @room.handle(61)
        async def later(message: Message) -> None:
            await work

        one.say(user, 1, WAIT)
        one.say(user, 1, 60)
        one.say(user, 1, 61)
        one.say(user, 1, SAY, b"it goes on")
        assert isinstance(room, Room)
        await until(lambda: len(room._mailbox) == 3)
        room.gate.set()
        await until(lambda: one.got(user, SAID) == [b"it goes on"])
        assert [(got.event, got.code) for got in one.refused[user]] == [
            (60, Refusal.FAILED),
            (61, Refusal.FAILED),
        ]


async def test_a_gateway_that_is_found_lost_by_a_handler(registry_url: str) -> None:
    """What its users leave comes behind the message of that handler, and the group goes on."""
    async with zone(registry_url, Room) as rooms, gateway(registry_url) as one:
        await connected(one)
        (user,) = await joined(one, 1)
        room = rooms.group(1)
        async with gateway(registry_url) as two:
            await connected(two)
            (gone,) = await joined(two, 1)
            link = rooms._links.of(two.node.id)
            assert link is not None

            @room.handle(60)
            def answer_all(message: Message) -> None:
                # What it finds when it sends before the zone has looked around.
                link.lost = True
                assert rooms._links.of(machine_of(gone)) is not link

            one.say(user, 1, 60)
            await until(lambda: gone not in room)
            one.say(user, 1, SAY, b"it goes on")
            await until(lambda: one.got(user, SAID) == [b"it goes on"])


async def test_members_that_leave_go_away_and_come_back(registry_url: str) -> None:
    heard: list[tuple[str, int, bool]] = []

    def make(id: int, rooms: Zone) -> Group:
        room = Room(id, rooms)
        for event in (LibraryEvent.LEAVE, LibraryEvent.AWAY, LibraryEvent.BACK):

            @room.handle(event)
            def note(message: Message) -> None:
                event = LibraryEvent(message.event).name
                heard.append((event, message.user, message.user in message.group))

        return room

    async with zone(registry_url, make) as rooms, gateway(registry_url) as one:
        await connected(one)
        first, second = await joined(one, 1, 2)
        one.member(ToZone.AWAY, first, 1)
        one.member(ToZone.BACK, first, 1)
        one.member(ToZone.LEAVE, first, 1)
        one.member(ToZone.LEAVE, first, 1)
        one.member(ToZone.AWAY, first, 1)
        one.say(second, 1, SAY, b"done")
        await until(lambda: one.got(second, SAID))
        # Who is no member goes neither away nor again.
        assert heard == [("AWAY", first, True), ("BACK", first, True), ("LEAVE", first, False)]
        assert rooms.group(1).users == {second}


async def test_without_handlers_members_leave_all_the_same(registry_url: str) -> None:
    async with zone(registry_url, Room) as rooms, gateway(registry_url) as one:
        await connected(one)
        (user,) = await joined(one, 1)
        for what in (ToZone.AWAY, ToZone.BACK, ToZone.LEAVE):
            one.member(what, user, 1)
        await until(lambda: not rooms.group(1).users)
        assert not one.refused[user]
        assert rooms.users == 0


async def test_a_user_cannot_say_what_only_the_library_says(registry_url: str) -> None:
    async with zone(registry_url, Room) as rooms, gateway(registry_url) as one:
        await connected(one)
        (user,) = await joined(one, 1)
        one.say(user, 1, LibraryEvent.LEAVE)
        await until(lambda: one.refused[user])
        assert one.refused[user][0].code == Refusal.NO_HANDLER
        assert user in rooms.group(1)


async def test_a_lost_gateway_takes_its_users_along(registry_url: str) -> None:
    left: list[int] = []

    def make(id: int, rooms: Zone) -> Group:
        room = Room(id, rooms)
        room.handle(LibraryEvent.LEAVE, lambda message: left.append(message.user))
        return room

    async with zone(registry_url, make) as rooms, gateway(registry_url) as one:
        await connected(one)
        (stays,) = await joined(one, 1)
        async with gateway(registry_url) as two:
            await connected(two)
            gone = await joined(two, 1, 3)
            assert rooms.group(1).gateways == {one.node.id, two.node.id}
        await until(lambda: rooms.group(1).users == {stays})
        assert sorted(left) == sorted(gone)
        assert rooms.group(1).gateways == {one.node.id}
        rooms.group(1).broadcast(SAID, b"to who is left")
        await until(lambda: one.got(stays, SAID))


async def test_a_gateway_that_closes_takes_its_users_along(registry_url: str) -> None:
    """Its node goes on."""
    async with (
        zone(registry_url, Room) as rooms,
        gateway(registry_url) as one,
        gateway(registry_url) as two,
    ):
        here = Gateway(rooms.node)
        await connected(one, two, here)
        (stays,) = await joined(one, 1)
        for each in (two, here):
            await joined(each, 1)
        assert rooms.group(1).gateways == {one.node.id, two.node.id, rooms.node.id}
        await two.end()
        await here.end()
        await until(lambda: rooms.group(1).users == {stays})
        assert {two.node.state, rooms.node.state} == {"serving"}


async def test_a_gateway_that_is_back_before_anybody_looked_is_another(registry_url: str) -> None:
    async with zone(registry_url, Room) as rooms, gateway(registry_url) as one:
        await connected(one)
        (user,) = await joined(one, 1)
        lost: list[Link] = []
        links = Links(
            rooms.node, LibraryChannel.GATEWAY, lost.append
        )  # beside the zone's, and nobody looks at these
        link = links.of(one.node.id)
        assert link is not None
        assert links.of(one.node.id) is link
        peer = rooms.node.peers[one.node.id]
        peer._session.close("for the test")
        await until(lambda: rooms.node.peers.get(one.node.id) not in {None, peer})
        again = links.of(one.node.id)
        assert again is not None
        assert again is not link
        assert lost == [link]
        # Nobody of its users is a member any more.
        await until(lambda: user not in rooms.group(1))


async def test_add_and_remove(registry_url: str) -> None:
    async with zone(registry_url, Room) as rooms, gateway(registry_url) as one:
        await connected(one)
        await one.opened(1)
        room, user = rooms.group(1), one.user()
        room.add_user(user)
        room.add_user(user)
        await until(lambda: user in one.members[1])
        assert len(room) == 1
        assert rooms.users == 1
        room.remove_user(user)
        room.remove_user(user)
        await until(lambda: user not in one.members[1])
        assert len(one.kinds(ToGateway.PART)) == 1
        assert not room.users
        assert rooms.users == 0
        room.send(user, SAID, b"you are no member")
        await until(lambda: one.got(user, SAID))
        for nobody in (-1, 1 << 64, "user"):
            with pytest.raises(ValueError, match="the id of a user is an int"):
                room.add_user(nobody)  # type: ignore[arg-type]
        stranger = Ids(1000).next()
        for send in (
            lambda: room.add_user(stranger),
            lambda: room.send(stranger, SAID, b""),
        ):
            with pytest.raises(PeerLost, match="is at gateway 1000, which is not connected"):
                send()


async def test_a_gateway_on_the_zones_own_node(registry_url: str) -> None:
    async with zone(registry_url, Room) as rooms:
        one = Gateway(rooms.node)
        await connected(one)
        first, second = await joined(one, 1, 2)
        one.say(first, 1, SAY, b"at home")
        await until(lambda: one.got(second, SAID) == [b"at home"])
        assert rooms.group(1).gateways == {rooms.node.id}
        await one.end()


async def test_messages_carry_who_it_is(registry_url: str) -> None:
    heard: list[Message] = []
    async with zone(registry_url, Room) as rooms, gateway(registry_url) as one:
        await connected(one)
        await one.opened(1)
        rooms.group(1).handle(60, heard.append)
        user = one.user()
        one.say(user, 1, 60, b"data", identity=b"alice")
        await until(lambda: heard)
        (message,) = heard
        assert (message.group, message.user, message.event) == (rooms.group(1), user, 60)
        assert (message.data, message.identity) == (b"data", b"alice")
        with pytest.raises(AttributeError):
            message.user = 1  # type: ignore[misc]


def test_events_that_a_group_cannot_handle(registry_url: str) -> None:
    group = Group(1, Zone(Node("room", registry=registry_url)))
    group.handle(50, print)
    group.handle(65535, print)
    with pytest.raises(ValueError, match="event 8 is the library's own: programs have 50 to 65535"):
        group.handle(8)
    with pytest.raises(ValueError, match="an int from 50 to 65535 is wanted"):
        group.handle(65536, print)
    with pytest.raises(ValueError, match="event True: an int"):
        group.handle(True, print)
    with pytest.raises(DomiError, match="event 50 of group 1 has a handler already"):
        group.handle(50, print)
    with pytest.raises(TypeError, match="handler 3 is not callable"):
        group.handle(51, 3)  # type: ignore[type-var]
    for id in (-1, 1 << 64, "1", True):
        with pytest.raises(ValueError, match=r"an int from 0 to 2\*\*64 - 1"):
            Group(id, group.zone)  # type: ignore[arg-type]


async def test_events_that_cannot_be_sent(registry_url: str) -> None:
    async with zone(registry_url, Room) as rooms, gateway(registry_url) as one:
        await connected(one)
        await one.opened(1)
        for event in (49, 11, 65536, -1):
            with pytest.raises(ValueError, match=f"event {event}"):
                rooms.group(1).send(one.user(), event, b"")
            with pytest.raises(ValueError, match=f"event {event}"):
                rooms.group(1).broadcast(event, b"")


async def test_what_is_said_of_a_wrong_group(registry_url: str) -> None:
    class Waiting(Group):
        async def load(self, state: bytes) -> None: ...  # type: ignore[override]

    async with zone(registry_url, Room) as rooms, gateway(registry_url) as one:
        await connected(one)
        (user,) = await joined(one, 1)
        room = rooms.group(1)
        for wrong in ("text", None, 7):
            with pytest.raises(TypeError, match="bytes are wanted"):
                room.send(user, SAID, wrong)
            with pytest.raises(TypeError, match="bytes are wanted"):
                room.broadcast(SAID, wrong)
        with pytest.raises(TypeError, match="a Zone is wanted"):
            Group(2, rooms.node)
        with pytest.raises(TypeError, match="load is an async def, which nobody would await"):
            Waiting(3, rooms)
        with pytest.raises(TypeError, match=r"as 'await group.snapshot\(\)' gives them"):
            Group.restore("text", rooms)
        assert list(rooms.groups) == [1]
        room.broadcast(SAID, bytearray(b"as bytes"), exclude=None)
        room.send(user, SAID, memoryview(b"too"))
        await until(lambda: one.got(user, SAID) == [b"as bytes", b"too"])
        for member in room.users:
            room.remove_user(member)
        assert not room.users


async def test_a_factory_may_restore_a_snapshot(registry_url: str) -> None:
    kept: dict[int, bytes] = {}

    def make(id: int, home: Zone) -> Group:
        return Room.restore(kept[id], home) if id in kept else Room(id, home)

    async with gateway(registry_url) as one:
        async with zone(registry_url, make) as rooms:
            await connected(one)
            (user,) = await joined(one, 1)
            kept[1] = await rooms.group(1).snapshot()
        await until(lambda: one.lost == [1])
        async with zone(registry_url, make) as rooms:
            await connected(one)
            (other,) = await joined(one, 1)
            assert rooms.group(1).users == {user, other}
            rooms.group(1).broadcast(SAID, b"both")
            for each in (user, other):
                await until(lambda each=each: b"both" in one.got(each, SAID))


async def test_what_a_factory_leaves_half_made_is_gone(registry_url: str) -> None:
    class Failing(Room):
        def __init__(self, id: int, home: Zone) -> None:
            super().__init__(id, home)
            if id == 1:
                raise RuntimeError("on purpose")

    def make(id: int, home: Zone) -> Group:
        return Failing(id + 1 if id == 5 else id, home)

    async with zone(registry_url, make) as rooms, gateway(registry_url) as one:
        await connected(one)
        for id in (1, 5):
            one.say(one.user(), id, JOIN)
        await until(lambda: len(one.closed) == 2)
        assert [code for code, _ in one.closed] == [Refusal.FAILED] * 2
        assert not rooms.groups
        await joined(one, 6)
