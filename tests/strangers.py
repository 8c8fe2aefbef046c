"""Peers that are written by hand: a socket, and what docs/protocol.md says."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from domi_fast import Node
from domi_fast.registry import open_registry
from tests import reference
from tests.reference import Decoder, Offer

SECONDS = 10.0


class Stranger:
    """A connection that says what it likes, byte for byte."""

    def __init__(self, sock: socket.socket, *, magic: bool = False) -> None:
        self.sock = sock
        self.decoder = Decoder(magic=magic)
        self.ready: list[reference.Frame] = []
        self.heartbeats = 0
        self.memories = 0

    async def say(self, *parts: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, b"".join(parts))

    async def hear(self) -> reference.Frame:
        """The next frame that is not a heartbeat. Raises EOFError."""
        while not self.ready:
            raw = await asyncio.wait_for(
                asyncio.get_running_loop().sock_recv(self.sock, 65536), SECONDS
            )
            if not raw:
                raise EOFError
            for frame in self.decoder.feed(raw):
                if frame.channel == reference.HEARTBEAT:
                    self.heartbeats += 1
                elif frame.channel == reference.MEMORY:  # said whenever it has changed
                    self.memories += 1
                else:
                    self.ready.append(frame)
        return self.ready.pop(0)

    async def closed(self) -> list[reference.Frame]:
        """Wait until the node has closed the connection; what it said before that."""
        said = []
        try:
            while True:
                said.append(await self.hear())
        except (EOFError, ConnectionResetError, BrokenPipeError):
            return said

    async def settled(self) -> list[reference.Frame]:
        """Until the node has dealt with all that was said; what it said in the meantime."""
        said = []
        await self.say(reference.encode(reference.PING, b"ping"))
        while (frame := await self.hear()) != (reference.PONG, b"pong", b""):
            said.append(frame)
        return said


@asynccontextmanager
async def stranger(node: Node) -> AsyncIterator[Stranger]:
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", node.port))
        yield Stranger(sock)


@asynccontextmanager
async def plain(node: Node, machine: int = 7) -> AsyncIterator[Stranger]:
    """A session of the plain protocol."""
    async with stranger(node) as peer:
        await peer.say(reference.plain_hello(machine))
        await peer.settled()
        yield peer


@asynccontextmanager
async def registered(url: str, machine: int, port: int = 0) -> AsyncIterator[Offer]:
    """An entry of the registry, as a node makes it.

    :param port: where the node listens; 0: nobody can dial it.
    """
    registry = open_registry(url)
    await registry.open()
    instance = random.Random(machine).randbytes(16)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        value = {
            "name": "by-hand",
            "version": "0",
            "host": "127.0.0.1",
            "port": port or deaf.getsockname()[1],
            "unix_path": None,
            "mark": reference.mark(instance).hex(),
            "machine": "",
        }
        lease = await registry.grant(SECONDS)
        try:
            claim = await registry.claim(
                [f"domi/default/nodes/{machine:04d}"], json.dumps(value).encode(), lease
            )
            yield Offer("by-hand", epoch=claim.epoch, instance=instance)
        finally:
            await lease.revoke()
            await registry.close()


@asynccontextmanager
async def extended(
    node: Node, url: str, machine: int = 7, channels: tuple[int, ...] = ()
) -> AsyncIterator[Stranger]:
    """A session of the extended protocol, built from the page."""
    async with registered(url, machine) as offer, stranger(node) as peer:
        await peer.say(reference.hello(machine, offer))
        channel, data, extend = await peer.hear()
        assert (channel, extend) == (reference.WELCOME, b"")
        who, theirs = reference.decode_welcome(data)
        assert (who, theirs.name, theirs.cluster) == (node.id, node.config.name, "default")
        await peer.say(reference.subscriptions(reference.ALL, channels))
        frame = await peer.hear()
        assert (frame.channel, frame.extend) == (reference.SUBSCRIPTIONS, b"\0")
        assert frame.data == reference.channels(sorted(node._router.handlers()))
        await node._mesh.conditions.wait_for(lambda: machine in node.peers, SECONDS)
        assert node.peers[machine].channels == frozenset(channels)
        yield peer


@asynccontextmanager
async def guest(node: Node) -> AsyncIterator[Stranger]:
    """A guest, built from the page."""
    async with stranger(node) as peer:
        await peer.say(reference.guest_hello(Offer("guest", cluster="")))
        channel, data, _ = await peer.hear()
        assert channel == reference.WELCOME
        assert reference.decode_welcome(data)[0] == node.id
        await peer.say(reference.subscriptions(reference.ALL))
        yield peer
