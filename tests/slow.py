"""Peers that read nothing until they are asked to, and what fills the queues for them."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Iterator

from domi_fast import Node, Overloaded, Request
from tests.support import RawPeer, session

LIMIT = 256 << 10
SIZE = 10_000
SENT = 1_000


@contextlib.asynccontextmanager
async def stuck(node: Node, machine: int = 700) -> AsyncIterator[RawPeer]:
    """A peer that reads nothing until it is asked to."""
    raw = await RawPeer.plain(node, machine, receive_buffer=4096)
    try:
        yield raw
    finally:
        raw.close()


@contextlib.contextmanager
def deaf(node: Node, peer: Node) -> Iterator[None]:
    """The node reads nothing of the peer meanwhile."""
    its, loop = session(node, peer.id), asyncio.get_running_loop()
    loop.remove_reader(its.descriptor)
    yield
    if not its.closed:
        loop.add_reader(its.descriptor, its.readable)


def numbered(number: int, size: int = SIZE) -> bytes:
    return struct.pack("<I", number) + bytes(size - 4)


def number_of(data: bytes) -> int:
    return int(struct.unpack("<I", data[:4])[0])


async def send(node: Node, count: int = SENT, channel: int = 50, **to: int) -> None:
    for number in range(count):
        node.notify(channel, numbered(number), **(to or {"to": 700}))
        if number % 10 == 0:
            await asyncio.sleep(0)


async def fill(node: Node, machine: int, channel: int = 50) -> tuple[int, Overloaded]:
    """Send until there is no room, letting the loop go on; how many, and what was said then."""
    sent = 0
    try:
        while True:
            node.notify(channel, numbered(sent), to=machine)
            sent += 1
            await asyncio.sleep(0)
    except Overloaded as error:
        return sent, error


def ask(node: Node, channel: int, size: int, **to: int) -> tuple[list[Request], Overloaded]:
    """Requests until no more may wait, and what was said then."""
    asked: list[Request] = []
    try:
        while True:
            asked.append(node.request(channel, bytes(size), **to))
    except Overloaded as error:
        return asked, error


async def read(raw: RawPeer, count: int, channel: int = 50) -> list[int]:
    return [number_of((await raw.frame_on(channel)).data) for _ in range(count)]
