"""Two nodes in one process, which talk over a socket all the same: no scheduler between them."""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any, cast

from bench.two_process.channels import ECHO, PING, PONG_DATA
from bench.two_process.client import Client
from bench.two_process.commands import percentiles, pin, run, serve
from domi_fast import Node

FRAME = b"\x0c\0\0\0\0\0\x32\0ping"


class EchoServer(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio's.
        self._write = cast(asyncio.Transport, transport).write

    def data_received(self, data: bytes) -> None:
        self._write(data)


class EchoClient(asyncio.Protocol):
    """Sends a frame, and the next when it has come back."""

    def __init__(self, count: int) -> None:
        self.taken: list[int] = []
        self.done = asyncio.get_running_loop().create_future()
        self._count = count

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._write = cast(asyncio.Transport, transport).write
        self._then = time.perf_counter_ns()
        self._write(FRAME)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter_ns()
        self.taken.append(now - self._then)
        if data != FRAME:
            self.done.set_exception(RuntimeError(f"the echo of {FRAME!r} was {data!r}"))
        elif len(self.taken) == self._count:
            self.done.set_result(None)
        else:
            self._then = now
            self._write(FRAME)


async def echoes(warm_up: int, count: int) -> dict[str, Any]:
    """The anchor: the same between two protocols of asyncio, in the same loop."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(EchoServer, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        transport, client = await loop.create_connection(
            lambda: EchoClient(warm_up + count), "127.0.0.1", port
        )
        await asyncio.wait_for(client.done, 60.0)
        transport.close()
    finally:
        server.close()
        await server.wait_closed()
    return {**percentiles(client.taken[warm_up:])}


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    registry = "memory://bench"
    async with Node("server", registry=registry) as server:
        server.subscribe(PING, lambda context: context.reply(PONG_DATA))
        server.subscribe(ECHO, lambda context: context.reply(context.data))
        async with Node("client", registry=registry) as node:
            client = Client(node)
            await client.meet()
            await serve(
                {"round_trips": client.round_trips, "calls": client.calls, "echoes": echoes}
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", type=int)
    run(main(parser.parse_args()))
