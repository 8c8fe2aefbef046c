"""Two nodes in one process, which talk over a socket all the same: no scheduler between them."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from bench.peers.uvloop_protocol import EchoClient, EchoServer
from bench.two_process.channels import PING
from bench.two_process.client import Client
from bench.two_process.commands import percentiles, pin, run, serve
from domi_fast import Node


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
        server.subscribe(PING, lambda context: context.reply(context.data))
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
