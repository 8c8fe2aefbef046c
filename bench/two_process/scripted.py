"""Peers of bare sockets, which say what docs/protocol.md has of a node, and are idle from then on.

Each holds a machine id in the registry, and dials the nodes that it is told of; it answers their
heartbeats. To a node there is no difference, and a process holds a thousand of them with ease.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.two_process.channels import QUIET
from bench.two_process.commands import open_many_files, pin, run, serve
from domi_fast.registry import Lease, NoKeyFree, Registry, open_registry
from tests import reference

CLUSTER = "default"
HIGHEST = 1023
LEASE = 60.0
WAIT = 30.0
AT_A_TIME = 16  # handshakes: a listener's backlog is finite

__all__ = ["Member", "Members", "Session"]


@dataclass(frozen=True)
class Member:
    """What a peer says of itself."""

    machine: int
    offer: reference.Offer


class Members:
    """Machine ids that this process holds, from the highest down: nodes take the lowest.

    Nobody listens where the registry says: a node that dials is refused, and is dialled itself.

    :param registry: an open one.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._free = list(range(HIGHEST + 1))
        self._lease: Lease | None = None
        self._nobody = socket.socket()
        self._nobody.bind(("127.0.0.1", 0))

    async def register(self) -> Member:
        """One more."""
        if self._lease is None:
            self._lease = await self._registry.grant(LEASE)
        instance = os.urandom(16)
        value = json.dumps(
            {
                "name": "scripted",
                "version": "0",
                "host": "127.0.0.1",
                "port": self._nobody.getsockname()[1],
                "unix_path": None,
                "mark": reference.mark(instance).hex(),
                "machine": "",
            }
        ).encode()
        while True:
            machine = self._free.pop()
            key = f"domi/{CLUSTER}/nodes/{machine:04d}"
            try:
                claim = await self._registry.claim([key], value, self._lease)
            except NoKeyFree:
                continue
            offer = reference.Offer("scripted", "0", CLUSTER, claim.epoch, instance)
            return Member(machine, offer)


@dataclass
class Session:
    """A peer's end of its session with a node.

    :ivar lost: why it is over, if it is.
    """

    sock: socket.socket
    lost: str = ""
    _decoder: reference.Decoder = field(default_factory=reference.Decoder)
    _waiting: dict[int, asyncio.Future[None]] = field(default_factory=dict)

    @classmethod
    async def dial(cls, port: int, member: Member, channels: Sequence[int]) -> Session:
        """Dial the node there; returns when it has said all that it says of itself.

        Raises ConnectionError when it refuses.
        """
        loop = asyncio.get_running_loop()
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.sock_connect(sock, ("127.0.0.1", port))
        session = cls(sock)
        # MEMORY comes behind the first list of subscriptions, and is the last of it.
        for channel in (reference.WELCOME, reference.MEMORY):
            session._waiting[channel] = loop.create_future()
        loop.add_reader(sock.fileno(), session._readable)
        sock.send(reference.hello(member.machine, member.offer))
        await asyncio.wait_for(session._waiting[reference.WELCOME], WAIT)
        sock.send(reference.subscriptions(reference.ALL, channels))
        await asyncio.wait_for(session._waiting[reference.MEMORY], WAIT)
        return session

    @property
    def pending(self) -> int:
        """Bytes of a frame that has not come as a whole."""
        return self._decoder.pending

    def _readable(self) -> None:
        try:
            data = self.sock.recv(65536)
        except OSError as error:
            self._end(str(error))
            return
        if not data:
            self._end("the node has closed the connection")
        for frame in self._decoder.feed(data):
            if frame.channel == reference.HEARTBEAT:
                self.sock.send(reference.encode(reference.HEARTBEAT_REPLY))
            elif frame.channel == reference.EXIT:
                self._end(f"the node says goodbye: {frame.data.decode()}")
            elif frame.channel in self._waiting and not self._waiting[frame.channel].done():
                self._waiting[frame.channel].set_result(None)

    def _end(self, reason: str) -> None:
        if not self.lost:
            self.lost = reason
            asyncio.get_running_loop().remove_reader(self.sock.fileno())
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(ConnectionError(reason))


async def join(
    members: Members, ports: Sequence[int], count: int, channels: Sequence[int]
) -> list[Session]:
    """So many more peers, each with a session with each of these nodes."""
    sessions: list[Session] = []
    for first in range(0, count, AT_A_TIME):
        some = [await members.register() for _ in range(min(AT_A_TIME, count - first))]
        dialling = [Session.dial(port, member, channels) for member in some for port in ports]
        sessions += await asyncio.gather(*dialling)
    return sessions


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    most = open_many_files()
    sessions: list[Session] = []
    registry = open_registry(given.registry)
    await registry.open()
    members = Members(registry)

    async def join_more(ports: list[int], count: int) -> dict[str, Any]:
        sessions.extend(await join(members, ports, count, [QUIET]))
        return await lost()

    async def lost() -> dict[str, Any]:
        """Why sessions are over that should not be."""
        return {"lost": [session.lost for session in sessions if session.lost]}

    try:
        await serve({"join": join_more, "lost": lost}, files=most)
    finally:
        await registry.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", required=True)
    parser.add_argument("--cpu", type=int)
    run(main(parser.parse_args()))
