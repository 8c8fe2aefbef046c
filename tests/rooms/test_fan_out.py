"""What a group says to all costs one message for each gateway, whoever is at it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from domi_fast.gateway import Gateway
from domi_fast.stateful import Zone
from tests.gateway.clients import Client, connected
from tests.rooms.groups import JOIN, OTHERS, SAID
from tests.rooms.parts import acquainted, gateway, zone
from tests.support import session, until

GROUP_ID = 666
CARRIERS = ("tcp", "websocket")
# No heartbeats while frames are counted.
QUIET = {"heartbeat_interval": 60.0, "heartbeat_timeout": 180.0}


def frames_out(rooms: Zone, gates: list[Gateway]) -> dict[Gateway, int]:
    """Frames that the zone's node has sent on its session with each gateway's."""
    return {gate: session(rooms.node, gate.node.id).frames_out for gate in gates}


class Counted:
    """Counts what goes to each gateway.

    :ivar mesh: frames of the last count on all sessions of the zone's node together.
    """

    def __init__(self, rooms: Zone, gates: list[Gateway]) -> None:
        self._rooms = rooms
        self._gates = gates
        self.mesh = 0

    def of(self, work: Callable[[], None]) -> list[int]:
        """What ``work`` sends: the loop has no turn in between, and the zone's clock neither."""
        before = frames_out(self._rooms, self._gates)
        sent = sum(s.frames_out for s in self._rooms.node._router.sessions())
        work()
        after = frames_out(self._rooms, self._gates)
        self.mesh = sum(s.frames_out for s in self._rooms.node._router.sessions()) - sent
        return [after[gate] - before[gate] for gate in self._gates]


async def test_a_broadcast_is_one_mesh_frame_for_each_gateway_with_members(
    registry_url: str,
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        rooms = await stack.enter_async_context(zone(registry_url, node=QUIET))
        gates = [
            await stack.enter_async_context(gateway(registry_url, node=QUIET)) for _ in range(5)
        ]
        await acquainted(gates, [rooms])
        members: dict[Gateway, list[Client]] = {gate: [] for gate in gates}
        others: list[Client] = []
        for number, gate in enumerate(gates):
            for carrier in (*CARRIERS, *CARRIERS):
                # Nobody at the last gateway is a member.
                if gate is not gates[-1]:
                    client = await stack.enter_async_context(connected(gate, carrier))
                    await client.hello()
                    await client.write(GROUP_ID, JOIN)
                    await client.expect(JOIN)
                    members[gate].append(client)
                other = await stack.enter_async_context(connected(gate, carrier))
                await other.hello()
                others.append(other)
            assert len(members[gate]) == (0 if number == 4 else 4)
        room = rooms.group(GROUP_ID)
        assert room.gateways == {gate.node.id for gate in gates[:-1]}
        assert len(room) == 16

        counted = Counted(rooms, gates)
        word = b"x" * 64
        assert counted.of(lambda: room.broadcast(SAID, word)) == [1, 1, 1, 1, 0]
        assert counted.mesh == 4
        left_out = members[gates[0]][0]
        sent = counted.of(lambda: room.broadcast(OTHERS, word, exclude=left_out.user))
        assert sent == [1, 1, 1, 1, 0]
        assert counted.mesh == 4
        # A gateway all of whose members are left out gets none.
        nobody = [client.user for client in members[gates[1]]]
        sent = counted.of(lambda: room.broadcast(OTHERS, b"2", exclude=nobody))
        assert sent == [1, 0, 1, 1, 0]

        room.broadcast(JOIN, b"end")
        for gate, clients in members.items():
            for client in clients:
                assert await client.expect(SAID) == word
                if client is not left_out:
                    assert await client.expect(OTHERS) == word
                if gate is not gates[1]:
                    assert await client.expect(OTHERS) == b"2"
                assert await client.expect(JOIN) == b"end"
        # Each frame was encoded once: what is kept for all of a gateway's members is one object,
        # and what its WebSockets were given, too.
        for gate, clients in members.items():
            kept = [gate._sessions.get(client.user).kept[-1] for client in clients]
            assert len({id(frame) for frame in kept}) == (1 if clients else 0)
        for other in others:
            # Nothing has come before.
            await other.send(7, b"ping")
            assert await other.expect(7) == b"pong"


async def test_what_websockets_are_given_is_made_once(registry_url: str) -> None:
    async with (
        zone(registry_url) as rooms,
        gateway(registry_url) as gate,
        contextlib.AsyncExitStack() as stack,
    ):
        await acquainted([gate], [rooms])
        clients = []
        for carrier in (*CARRIERS, *CARRIERS):
            client = await stack.enter_async_context(connected(gate, carrier))
            await client.hello()
            await client.write(1, JOIN)
            await client.expect(JOIN)
            clients.append(client)
        written: list[bytes] = []
        for client in clients:
            session_: Any = gate._sessions.get(client.user)

            def write(data: bytes, real: Any = session_.write) -> None:
                written.append(data)
                real(data)

            session_.write = write
        rooms.group(1).broadcast(SAID, b"once")
        await until(lambda: len(written) == 4)
        assert len({id(data) for data in written}) == 2  # as it is, and as a WebSocket's message
        for client in clients:
            assert await client.expect(SAID) == b"once"
