"""A gateway and a zone on one node, which they live and end with."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest

from domi_fast import Node
from domi_fast.gateway import Gateway
from domi_fast.stateful import Zone
from tests.gateway.clients import connected
from tests.rooms.groups import GONE, JOIN, OTHERS, SAID, Ledger
from tests.rooms.member import Member
from tests.rooms.parts import GENEROUS, SERVICE, gateway
from tests.support import ROOT, environment, until

PROGRAM = """
import sys
from domi_fast import Node, run
from domi_fast.gateway import Gateway
from domi_fast.stateful import Zone
from tests.rooms.groups import Ledger

class Speaker:
    async def start(self):
        print(gate.port, gate.tcp_port, flush=True)

    async def close(self):
        pass

node = Node("room", registry=sys.argv[1])
gate, rooms = Gateway(node, tcp_port=0), Zone(node, Ledger)
parts = {"node": node, "gateway": gate, "zone": rooms}
run(*[parts[name] for name in sys.argv[2].split()], Speaker())
print("ended", rooms.state, gate.state, node.state, flush=True)
"""


@pytest.mark.parametrize(
    "order", ["gateway zone", "zone gateway", "node gateway zone", "node zone gateway"]
)
async def test_a_program_that_is_told_to_end(sqlite_url: str, order: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, sqlite_url, order],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment(),
        text=True,
    )
    try:
        assert process.stdout is not None
        line = await asyncio.to_thread(process.stdout.readline)
        ports = SimpleNamespace(port=int(line.split()[0]), tcp_port=int(line.split()[1]))
        async with contextlib.AsyncExitStack() as stack:
            enter = stack.enter_async_context
            members = [
                await enter(Member(ports, carrier, 1, expects_loss=True))
                for carrier in ("tcp", "websocket") * 2
            ]
            for member in members:
                member.talk(0.01)
            await until(lambda: all(len(member.serials) > 20 for member in members))
            begun = time.monotonic()
            process.send_signal(signal.SIGTERM)
            output, errors = await asyncio.to_thread(process.communicate, None, 10)
            took = time.monotonic() - begun
            assert process.returncode == 0, errors
            assert output.split() == ["ended", "closed", "closed", "closed"]
            assert errors == ""
            assert took < 5.0
            for member in members:
                await until(lambda member=member: member.closed is not None)
                assert member.closed is not None
                assert member.closed.code == 1001, member.closed
                assert member.faults == []
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@contextlib.asynccontextmanager
async def one_node(url: str) -> AsyncIterator[tuple[Node, Gateway, Zone]]:
    node = Node(SERVICE, registry=url)
    async with node, Gateway(node, **GENEROUS) as gate, Zone(node, Ledger) as rooms:
        yield node, gate, rooms


async def test_messages_stay_within_the_node(registry_url: str) -> None:
    async with one_node(registry_url) as (_, gate, rooms):
        async with contextlib.AsyncExitStack() as stack:
            members = [
                await stack.enter_async_context(Member(gate, carrier, 1))
                for carrier in ("tcp", "websocket") * 2
            ]
            for member in members:
                member.talk(0.005)
            await until(lambda: all(len(member.serials) > 100 for member in members))
            for member in members:
                await member.hush()
            room = rooms.group(1)
            assert isinstance(room, Ledger)
            await until(lambda: all(room.turns.get(m.user) == m.said for m in members))
            await until(lambda: all(m.serials[-1] == room.said - 1 for m in members))
            assert room.faults == []
            assert [m.faults for m in members] == [[]] * 4
            # Another gateway's clients are in the same group.
            async with gateway(registry_url) as other, connected(other, "tcp") as client:
                await client.hello()
                await client.write(1, JOIN)
                await client.expect(JOIN)
                await client.write(1, OTHERS, b"from elsewhere")
                for member in members:
                    await until(lambda member=member: b"from elsewhere" in member.heard(OTHERS))


async def test_draining_waits_for_users_up_to_its_deadline(registry_url: str) -> None:
    async with one_node(registry_url) as (node, gate, rooms):
        member = Member(gate, "tcp", 1, expects_loss=True)
        async with member:
            begun = time.monotonic()
            draining = asyncio.ensure_future(node.drain(1.0))
            await until(lambda: rooms.state == "retiring" and gate.state == "draining")
            member.say()
            await until(lambda: member.serials == [0])  # it is served meanwhile
            finished = await asyncio.wait_for(draining, 5)
            took = time.monotonic() - begun
            assert finished is False
            assert 0.9 < took < 3.0
            await until(lambda: member.closed is not None)
            assert member.closed is not None
            assert member.closed.code == 1001
        assert node.state == gate.state == rooms.state == "closed"


async def test_draining_ends_with_the_last_user(registry_url: str) -> None:
    async with one_node(registry_url) as (node, gate, rooms):
        async with connected(gate, "tcp") as client, connected(gate, "websocket") as second:
            for each in (client, second):
                await each.hello()
                await each.write(1, JOIN)
                await each.expect(JOIN)
            draining = asyncio.ensure_future(node.drain(30.0))
            await until(lambda: rooms.state == "retiring" and gate.state == "draining")
            async with connected(gate, "tcp") as third:
                closed = await third.closed()
                assert closed.code in (1001, 1006, 1013)
            await client.send(6)
            assert await second.expect(GONE) == client.user.to_bytes(8, "little")
            rooms.group(1).broadcast(SAID, b"still here")
            assert await second.expect(SAID) == b"still here"
            assert not draining.done()
            await second.close()
            assert await asyncio.wait_for(draining, 5) is True
        assert node.state == "closed"
