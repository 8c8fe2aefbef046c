"""The six hottest paths of a message, each done 1,024 times in one process and on one thread.

All sockets are UNIX sockets: what was written is there at once, so that nothing depends on when the
kernel comes to it. Batches have a fixed size, and each is over before the next one begins.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.child import BenchError
from bench.two_process.channels import PING, PING_DATA, PONG, SINK
from domi_fast import Context, LibraryChannel, Node, Serial, encode_frame

OPERATIONS = 1024
BATCH = 64
MESSAGE = b"sixteen bytes!!!"
ANSWER = b"pong"
MAGIC = struct.pack("<I", 2299)
MACHINE = 1000
WAIT = 60.0
# Nothing of a node's own comes round while it is counted.
CALM: dict[str, Any] = {
    "heartbeat_interval": 600.0,
    "heartbeat_timeout": 1800.0,
    "lease_ttl": 600.0,
    "memory_interval": 600.0,
    "handshake_timeout": WAIT,
    "start_timeout": WAIT,
}

__all__ = ["OPERATIONS", "PATHS", "HotPath", "Work"]


@dataclass(frozen=True)
class Work:
    """What is counted, and whether it was done.

    :ivar run: does it ``OPERATIONS`` times.
    :ivar check: raises :class:`BenchError` unless each of them had its effect once, with the right
        content; not counted.
    """

    run: Callable[[], Awaitable[None]]
    check: Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class HotPath:
    """:ivar prepared: makes all that it needs, in a folder for its sockets."""

    name: str
    title: str
    prepared: Callable[[Path], AbstractAsyncContextManager[Work]]


class Tally:
    """What has arrived: ``wanted`` messages that all have the content ``data``."""

    def __init__(self, wanted: int, data: bytes) -> None:
        self.arrived = self.wrong = 0
        self._wanted = wanted
        self._data = data
        self._batch = asyncio.Event()

    def take(self, context: Context) -> None:
        self.arrived += 1
        self.wrong += context.data != self._data
        if self.arrived % BATCH == 0:
            self._batch.set()

    async def batch(self) -> None:
        """Wait for the end of a batch."""
        await self._batch.wait()
        self._batch.clear()

    async def check(self) -> None:
        if self.arrived != self._wanted or self.wrong:
            raise BenchError(f"{self.arrived} of {self._wanted} came, {self.wrong} of them wrong")
        self.arrived = 0


def calm_node(folder: Path, name: str) -> Node:
    return Node(name, registry="memory://guard", unix_path=str(folder / name), **CALM)


# ---------------------------------------------------------------------------------------- sending


class Receivers:
    """Subscribers that read when they are told to, which is not while the sending is counted."""

    def __init__(self, nodes: list[Node], sender: int) -> None:
        self._tally = Tally(OPERATIONS * len(nodes), MESSAGE)
        self._sessions = []
        for node in nodes:
            session = node._router.session(sender)
            assert session is not None
            asyncio.get_running_loop().remove_reader(session.descriptor)
            node.subscribe(SINK, self._tally.take)
            self._sessions.append(session)

    async def check(self) -> None:
        """Read all that was sent."""
        for session in self._sessions:
            before = -1
            while session.frames_in != before:
                before = session.frames_in
                session.readable()
                await asyncio.sleep(0)
        await self._tally.check()


@asynccontextmanager
async def sending(folder: Path, count: int) -> AsyncIterator[tuple[Node, Receivers]]:
    """A node, and so many that subscribe to SINK and have it for a peer."""
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(calm_node(folder, f"receiver-{number}"))
            for number in range(count)
        ]
        node = await stack.enter_async_context(calm_node(folder, "sender"))
        for each in (*nodes, node):
            await each.wait_peers(count, timeout=WAIT)
        receivers = Receivers(nodes, node.id)
        await node.wait_subscribed(SINK, count, timeout=WAIT)
        yield node, receivers


@asynccontextmanager
async def notify(folder: Path) -> AsyncIterator[Work]:
    async with sending(folder, 1) as (node, receivers):

        async def run() -> None:
            for _ in range(OPERATIONS // BATCH):
                for _ in range(BATCH):
                    node.notify(SINK, MESSAGE)
                await asyncio.sleep(0)

        yield Work(run, receivers.check)


@asynccontextmanager
async def publish(folder: Path) -> AsyncIterator[Work]:
    async with sending(folder, 10) as (node, receivers):

        async def run() -> None:
            for _ in range(OPERATIONS // BATCH):
                for _ in range(BATCH):
                    node.publish(SINK, MESSAGE)
                await asyncio.sleep(0)

        yield Work(run, receivers.check)


# -------------------------------------------------------------------------------------- receiving


@asynccontextmanager
async def dispatch(folder: Path) -> AsyncIterator[Work]:
    tally = Tally(OPERATIONS, MESSAGE)
    async with calm_node(folder, "node") as node:
        node.subscribe(SINK, tally.take)
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(folder / "node"))
            name = encode_frame(LibraryChannel.NODE_NAME, struct.pack("<H", MACHINE))
            peer.sendall(MAGIC + name)
            await node.wait_peers(1, timeout=WAIT)
            frames = encode_frame(SINK, MESSAGE) * BATCH

            async def run() -> None:
                for _ in range(OPERATIONS // BATCH):
                    peer.sendall(frames)
                    await tally.batch()

            yield Work(run, tally.check)


# ---------------------------------------------------------------------------------- there and back


@asynccontextmanager
async def pair(folder: Path) -> AsyncIterator[tuple[Node, Node]]:
    """A server and its client."""
    async with calm_node(folder, "server") as server, calm_node(folder, "client") as client:
        await client.wait_peers(1, timeout=WAIT)
        yield server, client


@asynccontextmanager
async def request(folder: Path) -> AsyncIterator[Work]:
    async with pair(folder) as (server, client):
        right = 0

        async def run() -> None:
            nonlocal right
            for _ in range(OPERATIONS):
                right += await client.request(PING, PING_DATA) == ANSWER

        async def check() -> None:
            nonlocal right
            if right != OPERATIONS:
                raise BenchError(f"{right} of {OPERATIONS} answers were right")
            right = 0

        server.subscribe(PING, lambda context: context.reply(ANSWER))
        await client.wait_subscribed(PING, timeout=WAIT)
        yield Work(run, check)


async def calling(asking: Node | Serial, answering: Node | Serial, client: Node) -> Work:
    """``call``, its handler, ``reply`` and its handler, a batch at a time."""
    tally = Tally(OPERATIONS, ANSWER)

    async def run() -> None:
        for _ in range(OPERATIONS // BATCH):
            for _ in range(BATCH):
                asking.call(PING, PING_DATA, PONG)
            await tally.batch()

    answering.subscribe(PING, lambda context: context.reply(ANSWER))
    asking.subscribe(PONG, tally.take)
    await client.wait_subscribed(PING, timeout=WAIT)
    return Work(run, tally.check)


@asynccontextmanager
async def call_reply(folder: Path) -> AsyncIterator[Work]:
    async with pair(folder) as (server, client):
        yield await calling(client, server, client)


@asynccontextmanager
async def serial(folder: Path) -> AsyncIterator[Work]:
    async with (
        pair(folder) as (server, client),
        Serial(server) as answering,
        Serial(client) as asking,
    ):
        yield await calling(asking, answering, client)


PATHS = {
    path.name: path
    for path in (
        HotPath("notify", "notify to a peer, until the kernel has it", notify),
        HotPath("dispatch", "a frame from the kernel to its handler", dispatch),
        HotPath("request", "awaited request and its answer, both ends", request),
        HotPath("call-reply", "call and reply, a handler at each end", call_reply),
        HotPath("publish", "publish to 10 peers, until the kernel has it", publish),
        HotPath("serial", "call and reply, a Serial at each end", serial),
    )
}
