"""A node with a zone, whose one group broadcasts when it is told to; and who stops reading.

The client that has stopped is here because its group is what hears first that it was cut.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import struct
import time
from contextlib import suppress
from typing import Any

from bench.gateway.wire import (
    GROUP,
    JOIN,
    JOINED,
    JOINING,
    NEWS,
    STAMP,
    UPGRADE,
    WELCOMED,
    user_of,
)
from bench.two_process.commands import Command, check, pin, run, serve
from domi_fast import Node
from domi_fast.gateway import LibraryEvent
from domi_fast.stateful import Group, Message, Zone

WAIT = 60.0
SEGMENT = 1460  # bytes, as over Ethernet: what the kernel keeps for a client depends on it
SMALL = 4096


class Stopped:
    """A client that joins and then never reads, and comes again when its group hears of its end."""

    def __init__(self) -> None:
        self.port = 0
        self.user = 0
        self.joined = asyncio.Event()
        self.left = asyncio.Event()

    async def stay(self) -> None:
        """Be there all the time, until this is cancelled."""
        while True:
            with socket.socket() as sock:
                await self._join(sock)
                self.joined.set()
                await self.left.wait()

    async def _join(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
        # Its end is a reset, and the gateway hears of it at once.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", self.port))
        await loop.sock_sendall(sock, UPGRADE + JOINING)
        got = rest = b""
        while len(rest) < WELCOMED:
            more = await loop.sock_recv(sock, SMALL)
            check(bool(more), "the gateway has closed the connection")
            got += more
            rest = got.partition(b"\r\n\r\n")[2]
        self.user = user_of(rest)
        self.left.clear()


class Room(Group):
    """Takes in everybody who asks."""

    def __init__(self, id: int, zone: Zone, stopped: Stopped) -> None:
        super().__init__(id, zone)
        self._stopped = stopped
        self.handle(JOIN, self._join)
        self.handle(LibraryEvent.AWAY, self._away)

    def _join(self, message: Message) -> None:
        self.add_user(message.user)
        message.reply(JOINED, b"")

    def _away(self, message: Message) -> None:
        if message.user == self._stopped.user:
            self._stopped.left.set()


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    logging.getLogger("domi_fast").setLevel(logging.CRITICAL)
    stopped = Stopped()
    staying: asyncio.Task[None] | None = None

    async def broadcast(count: int, size: int) -> dict[str, Any]:
        began = time.monotonic()
        group = zone.group(GROUP)
        for _ in range(count):
            group.broadcast(NEWS, bytes(size))
        return {"began": began, "members": len(group)}

    async def feed(rate: float, warm_up: int, count: int, size: int) -> dict[str, Any]:
        """So many that do not count and so many that do, each when it is due or at once after."""
        group = zone.group(GROUP)
        padding = bytes(size - STAMP.size)
        loop = asyncio.get_running_loop()
        began = loop.time()
        late = 0.0
        for number in range(warm_up + count):
            due = began + number / rate
            if (pause := due - loop.time()) > 0:
                await asyncio.sleep(pause)
            late = max(late, loop.time() - due)
            stamp = time.monotonic_ns() if number >= warm_up else 0
            group.broadcast(NEWS, padding + STAMP.pack(stamp))
        return {"rate": (warm_up + count) / (loop.time() - began), "late": late}

    async def stop_reading(port: int) -> dict[str, Any]:
        """From now on there is a client that does not read."""
        nonlocal staying
        stopped.port = port
        stopped.joined.clear()
        staying = asyncio.ensure_future(stopped.stay())
        coming = asyncio.ensure_future(stopped.joined.wait())
        await asyncio.wait([staying, coming], timeout=WAIT, return_when=asyncio.FIRST_COMPLETED)
        check(coming.done(), f"the client that is to stop reading has not joined: {staying!r}")
        return {}

    async def begone() -> dict[str, Any]:
        """No client is stopped any more."""
        assert staying is not None
        staying.cancel()
        with suppress(asyncio.CancelledError):
            await staying
        return {}

    async with (
        Node("room", registry=given.registry) as node,
        Zone(node, lambda id, zone: Room(id, zone, stopped)) as zone,
    ):
        commands: dict[str, Command] = {
            "broadcast": broadcast,
            "feed": feed,
            "stop_reading": stop_reading,
            "begone": begone,
        }
        await serve(commands)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", required=True)
    parser.add_argument("--cpu", type=int)
    run(main(parser.parse_args()))
