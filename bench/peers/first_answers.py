"""Programs that start, ask a server once and say so; each imports no more than that takes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

PING_DATA = b"ping"


def uvloop(address: str) -> bytes:
    import asyncio
    import json

    import uvloop

    async def main() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", json.loads(address)["echo"])
        writer.write(PING_DATA)
        return await reader.readexactly(len(PING_DATA))

    return uvloop.run(main())


def pyzmq_asyncio(address: str) -> bytes:
    """Blocking: for one question no loop is needed."""
    import zmq

    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(address)
        socket.send(PING_DATA)
        answer: bytes = socket.recv()
        return answer


def nats(address: str) -> bytes:
    import nats
    import uvloop

    async def main() -> bytes:
        connection = await nats.connect(address)
        message = await connection.request("echo", PING_DATA, timeout=10.0)
        answer: bytes = message.data
        return answer

    return uvloop.run(main())


def grpc(address: str) -> bytes:
    import asyncio

    from grpc import aio

    async def main() -> bytes:
        channel = aio.insecure_channel(address)
        answer: bytes = await channel.unary_unary("/bench.Peer/unary")(PING_DATA)
        return answer

    return asyncio.run(main())


def aiohttp(address: str) -> bytes:
    import aiohttp
    import uvloop

    async def main() -> bytes:
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{address}/unary", data=PING_DATA) as response,
        ):
            return await response.read()

    return uvloop.run(main())


def ray(address: str) -> bytes:
    from bench.peers import ray_cluster

    joined = ray_cluster.join(address=address)
    answer: bytes = joined.get(joined.get_actor("echo").echo.remote(PING_DATA))
    return answer


PROGRAMS: dict[str, Callable[[Any], bytes]] = {
    "uvloop": uvloop,
    "pyzmq-asyncio": pyzmq_asyncio,
    "nats": nats,
    "grpc": grpc,
    "aiohttp": aiohttp,
    "ray": ray,
}


if __name__ == "__main__":
    print("right" if PROGRAMS[sys.argv[1]](sys.argv[2]) == PING_DATA else "wrong", flush=True)
