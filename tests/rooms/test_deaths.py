"""What members see when a zone or a gateway dies, or when those two lose each other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from domi_fast import Node
from domi_fast.gateway import Gateway
from domi_fast.stateful import SqliteSnapshots
from domi_fast.stateful.snapshots import unpack
from tests.gateway.clients import connected
from tests.rooms.groups import AWAY, GONE, JOIN, OTHERS, Seats
from tests.rooms.member import Member
from tests.rooms.parts import GENEROUS, SERVICE, acquainted, gateway, ledger, zone
from tests.servers import Etcd
from tests.support import Worker, session, until

GROUP_ID = 42
# Seconds of the lease, and until a dead node's id is free behind it (docs/registries.md).
LEASES = {"sqlite": (1.0, 0.1), "etcd": (2.0, 2.5)}


@pytest.fixture(params=["sqlite", pytest.param("etcd", marks=[pytest.mark.external])])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The name of a registry, and its URL."""
    name = str(request.param)
    if name == "sqlite":
        yield name, f"sqlite://{tmp_path}/registry.db"
        return
    server = Etcd(tmp_path)
    server.start()
    yield name, server.url
    server.kill()


@contextlib.asynccontextmanager
async def process(loop_kind: str, command: str, **arguments: Any) -> AsyncIterator[Any]:
    """A process with a zone or a gateway, and what it says of that."""
    worker = Worker(loop_kind, "tests.rooms.worker")
    try:
        yield worker, await worker.ask_later(command, **arguments)
    finally:
        worker.reap()


async def said_in(store: SqliteSnapshots) -> int | None:
    """How much the group has said, as it is stored."""
    data = await store.load(SERVICE, GROUP_ID)
    return None if data is None else int(json.loads(unpack(data).state)[0])


async def test_a_zone_is_killed(
    backend: tuple[str, str], tmp_path: Path, loop_kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, url = backend
    lease, late = LEASES[name]
    node = {"lease_ttl": lease}
    file = str(tmp_path / "snapshots.db")
    store = SqliteSnapshots(file)
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        stack.callback(store.close)
        gates = [await enter(gateway(url, node=node)) for _ in range(2)]
        worker, machine = await enter(
            process(loop_kind, "zone", url=url, file=file, node=node, snapshot_interval=1.0)
        )
        for gate in gates:
            await until(lambda gate=gate: gate.zones.has(machine))
        members = [
            await enter(Member(gate, carrier, GROUP_ID, expects_loss=True))
            for gate in gates
            for carrier in ("tcp", "websocket")
        ]
        other_store = SqliteSnapshots(file)
        stack.callback(other_store.close)
        rooms = await enter(zone(url, node=node, snapshots=other_store))
        await acquainted(gates, [rooms])
        for _ in range(5):
            members[0].say()
        stored: int | None = None
        while stored != 5:
            stored = await said_in(store)
        for _ in range(3):
            members[1].say()
        await until(lambda: all(member.serials == list(range(8)) for member in members))
        assert await said_in(store) == 5
        worker.kill(signal.SIGKILL)
        killed = time.monotonic()
        for member in members:
            await asyncio.wait_for(member.lost.wait(), 2)
        told = time.monotonic() - killed
        await asyncio.gather(*[member.join_again() for member in members])
        back = time.monotonic() - killed
        with capsys.disabled():
            print(f" {name}: told after {told:.2f} s, back after {back:.2f} s", end="")
        assert told < 2.0
        assert back < lease + late + 2.0
        room = ledger(rooms, GROUP_ID)
        assert room.said == 5
        assert room.turns == {members[0].user: 5}
        assert room.users == {member.user for member in members}
        # It is the old state that they go on with; what was said behind it is gone.
        members[0].say()
        await until(lambda: all(member.serials == [5] for member in members))
        for member in members:
            assert len(member.heard(10)) == 1
            assert not member.faults
            assert not member.heard(9)


async def test_a_gateway_is_killed(sqlite_url: str, loop_kind: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        rooms = await enter(zone(sqlite_url))
        gate = await enter(gateway(sqlite_url))
        worker, ports = await enter(process(loop_kind, "generous", url=sqlite_url, node={}))
        await acquainted([gate], [rooms])
        await until(lambda: ports["machine"] in rooms.node.peers)
        other = SimpleNamespace(**ports)
        staying = [await enter(Member(gate, each, GROUP_ID)) for each in ("tcp", "websocket")]
        going = [await enter(Member(other, each, GROUP_ID)) for each in ("tcp", "websocket", "tcp")]
        room = ledger(rooms, GROUP_ID)
        assert len(room) == 5
        assert room.gateways == {gate.node.id, ports["machine"]}
        for member in (*staying, *going):
            member.talk(0.02)
        await until(lambda: all(len(member.serials) > 20 for member in (*staying, *going)))
        worker.kill(signal.SIGKILL)
        await until(lambda: len(room) == 2)
        assert room.users == {member.user for member in staying}
        assert room.gateways == {gate.node.id}
        before = [len(member.serials) for member in staying]
        await until(
            lambda: all(len(m.serials) > b + 20 for m, b in zip(staying, before, strict=True))
        )
        for member in going:
            await member.hush()
        gone = sorted(member.user.to_bytes(8, "little") for member in going)
        for member in staying:
            await member.hush()
            await until(lambda member=member: sorted(member.heard(GONE)) == gone)
            assert not member.heard(AWAY)
            assert member.faults == []
            assert member.resumptions == 0
        assert room.faults == []


async def test_a_gateway_closes_while_its_node_goes_on(registry_url: str) -> None:
    """Handlers that say so to all, those of the closing gateway among them, do not fail."""
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        rooms = await enter(zone(registry_url, Seats))
        staying = await enter(gateway(registry_url))
        node = await enter(Node("gateway", registry=registry_url))
        closing = Gateway(node, **GENEROUS)
        await closing.start()
        stack.push_async_callback(closing.close)
        await acquainted([staying, closing], [rooms])
        clients = []
        for gate in (staying, closing, closing, closing, closing):
            client = await enter(connected(gate, "tcp"))
            await client.hello()
            await client.write(GROUP_ID, JOIN)
            await client.expect(JOIN)
            clients.append(client)
        room = rooms.group(GROUP_ID)
        assert isinstance(room, Seats)
        await closing.close()
        going = [client.user for client in clients[1:]]
        for user in going:
            assert await clients[0].expect(GONE) == user.to_bytes(8, "little")
        await until(lambda: room.seats == {clients[0].user})
        assert rooms.node.counters().get("group_handler_errors", 0) == 0


async def all_hear(members: list[Member], event: int, data: bytes) -> None:
    for member in members:
        await until(lambda member=member: data in member.heard(event))


async def have_heard(members: list[Member], event: int, times: int) -> None:
    for member in members:
        await until(lambda member=member: len(member.heard(event)) == times)


async def all_join_again(members: list[Member]) -> None:
    for member in members:
        await asyncio.wait_for(member.lost.wait(), 5)
    await asyncio.gather(*[member.join_again() for member in members])


@pytest.mark.parametrize("who", ["the zone's node", "the gateway's node"])
async def test_the_session_of_a_gateway_and_a_zone_is_closed(registry_url: str, who: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        rooms = await enter(zone(registry_url))
        cut, whole = [await enter(gateway(registry_url)) for _ in range(2)]
        await acquainted([cut, whole], [rooms])
        staying = [await enter(Member(whole, each, GROUP_ID)) for each in ("tcp", "websocket")]
        losing = [
            await enter(Member(cut, each, GROUP_ID, expects_loss=True))
            for each in ("tcp", "websocket")
        ]
        room = ledger(rooms, GROUP_ID)
        for nth in range(1, 11):
            ends = (rooms.node, cut.node) if who == "the zone's node" else (cut.node, rooms.node)
            session(ends[0], ends[1].id).close("a test cuts it")
            for member in losing:
                await asyncio.wait_for(member.lost.wait(), 5)
            await until(lambda: room.users == {member.user for member in staying})
            assert not any(route.members for route in cut._routes._routes.values())
            for member in losing:
                assert len(member.heard(10)) == nth
            await all_join_again(losing)
            await until(lambda: len(room) == 4)
            await have_heard(staying, GONE, 2 * nth)
            # Once for each, on both sides of the cut.
            staying[0].write(OTHERS, b"%d" % nth)
            losing[0].write(OTHERS, b"from the other side %d" % nth)
            await all_hear([*losing, staying[1]], OTHERS, b"%d" % nth)
        for member in (*staying, *losing):
            assert member.faults == []
            assert not member.heard(9)
            words = member.heard(OTHERS)
            assert len(words) == len(set(words))
        for member in losing[1:]:
            assert len(member.heard(OTHERS)) == 20


async def test_a_gateway_that_hangs_is_lost_by_the_zone(sqlite_url: str, loop_kind: str) -> None:
    """As when a cable is pulled: the zone knows first, and the gateway when it is there again."""
    node = {"heartbeat_interval": 0.2, "heartbeat_timeout": 0.6, "lease_ttl": 10.0}
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        rooms = await enter(zone(sqlite_url, node=node))
        gate = await enter(gateway(sqlite_url, node=node))
        worker, ports = await enter(process(loop_kind, "generous", url=sqlite_url, node=node))
        await acquainted([gate], [rooms])
        await until(lambda: ports["machine"] in rooms.node.peers)
        other = SimpleNamespace(**ports)
        staying = await enter(Member(gate, "tcp", GROUP_ID))
        losing = [
            await enter(Member(other, each, GROUP_ID, expects_loss=True))
            for each in ("tcp", "websocket")
        ]
        room = ledger(rooms, GROUP_ID)
        for nth in range(1, 4):
            worker.kill(signal.SIGSTOP)
            losing[0].write(OTHERS, b"lost %d" % nth)
            staying.write(OTHERS, b"missed %d" % nth)
            await until(lambda: room.users == {staying.user})
            await have_heard([staying], GONE, 2 * nth)
            await asyncio.sleep(0.3)
            worker.kill(signal.SIGCONT)
            await all_join_again(losing)
            await until(lambda: len(room) == 3)
            staying.write(OTHERS, b"again %d" % nth)
            await all_hear(losing, OTHERS, b"again %d" % nth)
        for member in (staying, *losing):
            assert member.faults == []
            words = member.heard(OTHERS)
            assert len(words) == len(set(words))
