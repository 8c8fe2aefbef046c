"""An echo by a plain asyncio ``Protocol`` on uvloop: as little as Python can do with a socket.

It has no messages: whoever asks knows that all are of one size, and that answers keep their order.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import deque
from typing import Any, cast

from bench.peers import loads, program
from bench.two_process.channels import PING_DATA
from bench.two_process.commands import check, percentiles, serve
from bench.two_process.memory import memory

FRAME = b"\x0c\0\0\0\0\0\x32\0ping"
SIZE = len(PING_DATA)

__all__ = ["EchoClient", "EchoServer"]


class EchoServer(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio's.
        self._write = cast(asyncio.Transport, transport).write

    def data_received(self, data: bytes) -> None:
        self._write(data)


class EchoClient(asyncio.Protocol):
    """Sends a frame, and the next when it has come back, until so many or so long."""

    def __init__(self, count: int, seconds: float = 1e6) -> None:
        self.taken: list[int] = []
        self.done = asyncio.get_running_loop().create_future()
        self._count = count
        self._seconds = seconds

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._write = cast(asyncio.Transport, transport).write
        self._then = time.perf_counter_ns()
        self._end = self._then + int(self._seconds * 1e9)
        self._write(FRAME)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter_ns()
        self.taken.append(now - self._then)
        if data != FRAME:
            self.done.set_exception(RuntimeError(f"the echo of {FRAME!r} was {data!r}"))
        elif len(self.taken) == self._count or now > self._end:
            self.done.set_result(None)
        else:
            self._then = now
            self._write(FRAME)


class Asker(asyncio.Protocol):
    """Futures, in the order in which they were asked."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._asked: deque[asyncio.Future[bytes]] = deque()
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        whole = len(data) - len(data) % SIZE
        for start in range(0, whole, SIZE):
            self._asked.popleft().set_result(data[start : start + SIZE])
        self._rest = data[whole:]

    def ask(self, data: bytes) -> asyncio.Future[bytes]:
        future: asyncio.Future[bytes] = self._loop.create_future()
        self._asked.append(future)
        self._transport.write(data)
        return future


async def connect(address: str) -> Asker:
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    _, asker = await loop.create_connection(Asker, host, int(port))
    return asker


async def round_trips(address: str, seconds: float) -> dict[str, Any]:
    host, _, port = address.rpartition(":")

    async def some(seconds: float) -> list[int]:
        transport, client = await asyncio.get_running_loop().create_connection(
            lambda: EchoClient(1_000_000_000, seconds), host, int(port)
        )
        await asyncio.wait_for(client.done, loads.PATIENCE)
        transport.close()
        return client.taken

    await some(seconds * loads.WARM_UP)
    return percentiles(await some(seconds))


async def server(given: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(EchoServer, "127.0.0.1", 0, backlog=1024)
    port = listening.sockets[0].getsockname()[1]
    await serve({"memory": memory}, address=f"127.0.0.1:{port}")


async def client(given: argparse.Namespace) -> None:
    asker = await connect(given.address)

    async def trips(seconds: float) -> dict[str, Any]:
        return await round_trips(given.address, seconds)

    await serve({**loads.asking(asker.ask), "round_trips": trips})


async def connections(given: argparse.Namespace) -> None:
    """Opens as many as it is told to, and leaves them idle once each has had an answer."""
    opened: list[Asker] = []

    async def open_more(count: int) -> dict[str, Any]:
        for _ in range(count):
            asker = await connect(given.address)
            check(await asker.ask(PING_DATA) == PING_DATA, "a wrong answer")
            opened.append(asker)
        return {"open": len(opened)}

    await serve({"open": open_more})


if __name__ == "__main__":
    program.main(__doc__, server=server, client=client, connections=connections)
