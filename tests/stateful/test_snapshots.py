"""Snapshots: what a group is made from again, here or elsewhere."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from domi_fast import Context, DomiError, LibraryChannel, Node
from domi_fast.gateway import wire
from domi_fast.gateway.events import Refusal
from domi_fast.gateway.ids import Ids
from domi_fast.gateway.wire import NOWHERE, ToGateway, ToZone
from domi_fast.gateway.zones import kind_of
from domi_fast.stateful import SnapshotStore, SqliteSnapshots, Zone
from domi_fast.stateful.snapshots import Snapshot, pack, unpack
from tests.stateful.gateway import connected, gateway, zone
from tests.stateful.rooms import JOIN, SAID, SAY, WAIT, Room
from tests.stateful.test_groups import joined
from tests.support import ROOT, until

LARGEST = (1 << 64) - 1


class Kept:
    """A store in this process."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, int], bytes] = {}
        self.saves = 0
        self.broken = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.saving = 0

    async def save(self, service: str, group: int, data: bytes) -> None:
        if self.broken:
            raise OSError("the disk is full")
        self.saving += 1
        await self.gate.wait()
        self.saving -= 1
        self.saves += 1
        self.kept[service, group] = data

    async def load(self, service: str, group: int) -> bytes | None:
        return self.kept.get((service, group))

    async def delete(self, service: str, group: int) -> None:
        self.kept.pop((service, group), None)


@pytest.mark.parametrize(
    "snapshot",
    [Snapshot(0, (), b""), Snapshot(LARGEST, (1, LARGEST), b"state"), Snapshot(5, (7,), b"\0" * 9)],
)
def test_there_and_back(snapshot: Snapshot) -> None:
    assert unpack(pack(snapshot)) == snapshot


def test_junk_is_no_snapshot() -> None:
    good = pack(Snapshot(5, (1, 2), b"state"))
    with pytest.raises(DomiError, match="0 bytes that are no snapshot"):
        unpack(b"")
    with pytest.raises(DomiError, match="no snapshot"):
        unpack(b"x" * 100)
    for cut in range(len(good)):
        with pytest.raises(DomiError, match=r"no snapshot|it was cut or changed"):
            unpack(good[:cut])
    with pytest.raises(DomiError, match=f"{len(good) + 1} bytes whose head says {len(good)}"):
        unpack(good + b"x")
    with pytest.raises(DomiError, match="a snapshot of version 2: this library reads version 1"):
        unpack(good[:4] + b"\2" + good[5:])


async def test_a_group_is_restored_with_its_members(registry_url: str) -> None:
    async with gateway(registry_url) as one:
        async with zone(registry_url, Room) as rooms:
            await connected(one)
            first, second = await joined(one, 1, 2)
            one.say(first, 1, SAY, b"hello")
            await until(lambda: one.got(second, SAID))
            snapshot = await rooms.group(1).snapshot()
        stranger = Ids(1000).next()
        found = unpack(snapshot)
        assert found.group == 1
        assert found.members == tuple(sorted((first, second)))
        await until(lambda: one.lost == [1] and not one.members[1])
        async with zone(registry_url) as other:
            with_stranger = pack(found._replace(members=(*found.members, stranger)))
            room = Room.restore(with_stranger, other)
            await room.ready()
            assert room.said == [(first, b"hello")]
            # Whose gateway is not there leaves.
            await until(lambda: room.users == {first, second} == one.members[1])
            await connected(one)
            await one.opened(1)
            room.broadcast(SAID, b"again")
            await until(lambda: one.got(second, SAID) == [b"hello", b"again"])
            assert other.users == 2
            with pytest.raises(DomiError, match="no snapshot"):
                Room.restore(b"junk", other)


async def test_a_snapshot_is_made_between_handlers(registry_url: str) -> None:
    async with zone(registry_url, Room) as rooms, gateway(registry_url) as one:
        await connected(one)
        (user,) = await joined(one, 1)
        room = rooms.group(1)
        assert isinstance(room, Room)
        within: list[bytes] = []

        @room.handle(60)
        async def look(message: object) -> None:
            within.append(await room.snapshot())

        one.say(user, 1, WAIT)
        await until(lambda: room.said)
        made = asyncio.ensure_future(room.snapshot())
        one.say(user, 1, SAY, b"behind the snapshot")
        await until(lambda: len(room._mailbox))
        assert not made.done()
        room.gate.set()
        state = unpack(await made).state
        assert b"waited" in state
        assert b"behind" not in state
        await until(lambda: one.got(user, SAID))
        one.say(user, 1, 60)
        await until(lambda: within)
        assert b"behind the snapshot" in unpack(within[0]).state


async def test_what_is_disposed_of_is_saved_and_comes_again(registry_url: str) -> None:
    store = Kept()
    async with (
        zone(registry_url, Room, snapshots=store, empty_timeout=0.02) as rooms,
        gateway(registry_url) as one,
    ):
        await connected(one)
        (user,) = await joined(one, 1)
        one.say(user, 1, SAY, b"remember")
        one.member(ToZone.LEAVE, user, 1)
        await until(lambda: 1 not in rooms.groups and ("room", 1) in store.kept)
        await joined(one, 1)
        room = rooms.group(1)
        assert isinstance(room, Room)
        assert room.said == [(user, b"remember")]
        assert user not in room


async def test_what_has_changed_is_saved_every_interval(registry_url: str) -> None:
    store = Kept()
    async with (
        zone(registry_url, Room, snapshots=store, snapshot_interval=0.02) as rooms,
        gateway(registry_url) as one,
    ):
        await connected(one)
        (user,) = await joined(one, 1)
        await joined(one, 2)
        room = rooms.group(1)
        assert isinstance(room, Room)
        one.say(user, 1, WAIT)
        await until(lambda: room.said)
        one.say(user, 2, SAY, b"beside one whose handler waits")
        await until(lambda: b"beside" in store.kept.get(("room", 2), b""))
        room.gate.set()
        await until(lambda: b"waited" in store.kept.get(("room", 1), b""))
        saves = store.saves
        await asyncio.sleep(0.1)
        assert store.saves == saves


async def test_what_has_changed_is_saved_when_the_zone_closes(registry_url: str) -> None:
    store = Kept()
    async with gateway(registry_url) as one:
        async with zone(registry_url, Room, snapshots=store):
            await connected(one)
            (user,) = await joined(one, 1)
            one.say(user, 1, SAY, b"to the end")
            await until(lambda: one.got(user, SAID))
            assert not store.kept
        assert b"to the end" in store.kept["room", 1]


async def test_a_group_that_is_lost_is_not_saved(registry_url: str) -> None:
    """Nor is what its handler does afterwards: its new owner's snapshot is there."""
    store = Kept()
    async with (
        zone(registry_url, Room, snapshots=store, snapshot_interval=0.02) as rooms,
        gateway(registry_url) as one,
    ):
        await connected(one)
        users = {id: (await joined(one, id))[0] for id in (1, 2)}
        first, second = rooms.group(1), rooms.group(2)
        assert isinstance(first, Room)
        assert isinstance(second, Room)
        for id, user in users.items():
            one.say(user, id, WAIT)
        await until(lambda: first.said and second.said)
        saving = [asyncio.ensure_future(rooms._saver.save(room)) for room in (first, second)]
        await until(lambda: first._mailbox._holds and second._mailbox._holds)
        store.kept.clear()
        packed: list[str] = []

        def save() -> bytes:
            packed.append("by the zone that has lost it")
            return b""

        first.save = save  # type: ignore[method-assign]
        rooms._lose(first)
        first.gate.set()
        second.gate.set()
        await asyncio.gather(*saving)
        await until(lambda: b"waited" in store.kept.get(("room", 2), b""))
        assert not packed
        assert ("room", 1) not in store.kept
        assert first not in rooms._saver._changed


async def test_a_group_that_is_lost_while_it_waits_for_its_turn_is_not_saved(
    registry_url: str,
) -> None:
    store = Kept()
    store.gate.clear()
    async with zone(registry_url, Room, snapshots=store) as rooms, gateway(registry_url) as one:
        await connected(one)
        for id in range(17):
            await joined(one, id)
        saving = [asyncio.ensure_future(rooms._saver.save(rooms.group(id))) for id in range(17)]
        await until(lambda: store.saving == 16)
        rooms._lose(rooms.group(16))
        store.gate.set()
        await asyncio.gather(*saving)
        assert sorted(store.kept) == [("room", id) for id in range(16)]


class Fussy(Room):
    def load(self, state: bytes) -> None:
        raise LookupError("not mine")


async def test_a_group_by_hand_that_cannot_be_loaded(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Kept()
    await store.save("room", 666, pack(Snapshot(666, (), b"[]")))
    rooms = Zone(Node("room", registry=registry_url), snapshots=store)
    async with Node("room", registry=registry_url) as other, gateway(registry_url) as one:
        # As if it were moving, which is waited for.
        marker = await other.cluster.names(f"handovers.{kind_of('room')}").claim("666")
        group = Fussy(666, rooms)
        starting = asyncio.ensure_future(rooms.start())
        await connected(one)
        one.tell(rooms.node.id, wire.group(ToZone.OPEN, 666))
        await until(lambda: rooms._openings._waiting[666])
        await marker.release()
        with pytest.raises(LookupError, match="not mine"):
            await group.ready()
        await starting
        await until(lambda: one.kinds(ToGateway.CLOSED))
        assert one.closed == [(Refusal.FAILED, NOWHERE)]
        assert "group 666 cannot be opened" in caplog.text
        await rooms.close()


async def test_a_store_that_fails_costs_no_state(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Kept()
    async with (
        zone(registry_url, Room, snapshots=store, empty_timeout=0.02) as rooms,
        gateway(registry_url) as one,
    ):
        await connected(one)
        (user,) = await joined(one, 1)
        store.broken = True
        one.say(user, 1, SAY, b"remember")
        one.member(ToZone.LEAVE, user, 1)
        await until(lambda: rooms.node.counters().get("group_save_errors", 0) > 1)
        assert 1 in rooms.groups
        assert "cannot be saved" in caplog.text
        store.broken = False
        await until(lambda: 1 not in rooms.groups)
        # And what cannot be read is not begun anew.
        store.kept["room", 1] = b"junk"
        one.open(1, rooms.node.id)
        await until(lambda: one.closed)
        assert one.closed[0][0] == Refusal.FAILED


async def test_sqlite(tmp_path: Path) -> None:
    path = tmp_path / "groups.db"
    store, other = SqliteSnapshots(path), SqliteSnapshots(path)
    assert isinstance(store, SnapshotStore)
    try:
        assert await store.load("room", 1) is None
        await store.save("room", LARGEST, b"1")
        await store.save("room", LARGEST, b"2")
        await store.save("hall", LARGEST, b"3")
        assert await other.load("room", LARGEST) == b"2"
        await other.delete("room", LARGEST)
        await other.delete("room", LARGEST)
        assert await store.load("room", LARGEST) is None
        assert await store.load("hall", LARGEST) == b"3"
        await asyncio.gather(
            *[each.save("room", n, b"%d" % n) for n in range(50) for each in (store, other)]
        )
        assert await store.load("room", 49) == b"49"
    finally:
        store.close()
        other.close()
        store.close()
    with pytest.raises(DomiError, match=re.escape(f"the snapshots in {path} were closed")):
        await store.load("room", 1)
    assert [each.name for each in tmp_path.iterdir()] == ["groups.db"]


PROGRAM = """
import sys
from domi_fast import Node, run
from domi_fast.stateful import SqliteSnapshots, Zone
from tests.stateful.rooms import Room

node = Node("room", registry=sys.argv[1], lease_ttl=0.5)
run(Zone(node, Room, snapshots=SqliteSnapshots(sys.argv[2]), snapshot_interval=0.05))
"""


async def test_a_killed_zone_loses_what_was_not_in_a_snapshot_alone(
    sqlite_url: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "groups.db")
    store = SqliteSnapshots(path)
    command = [sys.executable, "-c", PROGRAM, sqlite_url, path]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            async with gateway(sqlite_url) as one:
                await connected(one)
                (user,) = await joined(one, 1)
                one.say(user, 1, SAY, b"remember")

                async def is_saved() -> bool:
                    return b"remember" in (await store.load("room", 1) or b"")

                while not await is_saved():  # noqa: ASYNC110 - nobody tells of it
                    await asyncio.sleep(0.01)
                place = one.ways[1].zone
                process.send_signal(signal.SIGKILL)
                await until(lambda: place not in one.node.peers, 10)
                one.states.clear()
                one.ways.pop(1)
                one.members.pop(1)
                node = {"lease_ttl": 0.5}
                async with zone(sqlite_url, Room, snapshots=store, node=node) as rooms:
                    await connected(one)
                    one.say(user, 1, JOIN)
                    await until(lambda: len(one.kinds(ToGateway.JOIN)) == 2, 15)
                    room = rooms.group(1)
                    assert isinstance(room, Room)
                    assert room.said == [(user, b"remember")]
                    assert room.users == {user}
        finally:
            process.kill()
            store.close()


async def test_a_group_moves_when_it_is_not_being_saved(registry_url: str) -> None:
    """Or what the old zone saves would overwrite what the new one has saved meanwhile."""
    store = Kept()
    settings: dict[str, Any] = {"snapshots": store, "snapshot_interval": 0.02}
    async with (
        zone(registry_url, Room, **settings) as a,
        zone(registry_url, Room, **settings) as b,
        gateway(registry_url) as one,
    ):
        await connected(one, zones=2)
        store.gate.clear()
        await one.opened(1, a.node.id)
        (user,) = await joined(one, 1)
        await until(lambda: store.saving)
        moving = asyncio.ensure_future(a.hand_over(1, b.node.id))
        await asyncio.sleep(0.1)
        assert not moving.done()
        assert 1 in a.groups
        store.gate.set()
        await moving
        one.say(user, 1, SAY, b"there")
        await until(lambda: b"there" in store.kept["room", 1])


async def test_a_group_that_moves_is_not_saved(registry_url: str) -> None:
    store = Kept()
    async with (
        zone(registry_url, Room, snapshots=store, snapshot_interval=0.02) as a,
        gateway(registry_url) as one,
        Node("room", registry=registry_url) as slow,
    ):
        gate = asyncio.Event()

        @slow.subscribe(LibraryChannel.ZONE)
        async def answer(context: Context) -> None:
            if context.is_request:
                await gate.wait()
                context.reply(b"not today")

        await connected(one)
        await joined(one, 1)
        await until(lambda: store.saves == 1)
        await until(lambda: LibraryChannel.ZONE in a.node.peers[slow.id].channels)
        moving = asyncio.ensure_future(a.hand_over(1, slow.id))
        # In the same turn of the loop: it has changed, and begins to move.
        a._note_changed(a.group(1))
        await asyncio.sleep(0.1)
        assert store.saves == 1
        gate.set()
        with pytest.raises(DomiError, match="not today"):
            await moving
        await until(lambda: store.saves == 2)
