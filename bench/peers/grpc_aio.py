"""grpc.aio without generated code: generic handlers, and messages that are bytes as they are."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc
import grpc.aio

from bench.peers import loads, program
from bench.two_process.channels import PING_DATA
from bench.two_process.commands import check, serve
from bench.two_process.memory import memory

SERVICE = "bench.Peer"
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.enable_http_proxy", 0)]


async def unary(request: bytes, context: Any) -> bytes:
    return request


async def echo(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    async for data in requests:
        yield data


async def sink(requests: AsyncIterator[bytes], context: Any) -> bytes:
    tally = loads.Tally()
    async for data in requests:
        tally.add(data)
    return tally.told()


async def server(given: argparse.Namespace) -> None:
    listening = grpc.aio.server(options=OPTIONS)
    handlers = {
        "unary": grpc.unary_unary_rpc_method_handler(unary),
        "echo": grpc.stream_stream_rpc_method_handler(echo),
        "sink": grpc.stream_unary_rpc_method_handler(sink),
    }
    generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
    listening.add_generic_rpc_handlers((generic,))
    port = listening.add_insecure_port("127.0.0.1:0")
    await listening.start()
    await serve({"memory": memory}, address=f"127.0.0.1:{port}")
    await listening.stop(None)


class Client:
    def __init__(self, channel: Any) -> None:
        self.unary = channel.unary_unary(f"/{SERVICE}/unary")
        self._echo = channel.stream_stream(f"/{SERVICE}/echo")
        self._sink = channel.stream_unary(f"/{SERVICE}/sink")

    async def calls(self, window: int, seconds: float) -> dict[str, Any]:
        """Over one stream both ways: a call of its own for each message would be far slower."""
        stream = self._echo()
        measured = await loads.calls(stream.write, stream.read, window, seconds)
        await stream.done_writing()
        check(await stream.read() is grpc.aio.EOF, "more came than was sent")
        return measured

    def begin(self) -> loads.Stream:
        stream = self._sink()

        async def counted() -> bytes:
            await stream.done_writing()
            told: bytes = await stream
            return told

        return loads.Stream(stream.write, counted)


async def client(given: argparse.Namespace) -> None:
    async with grpc.aio.insecure_channel(given.address, options=OPTIONS) as channel:
        work = Client(channel)
        await serve(
            {
                **loads.asking(work.unary),
                "calls": work.calls,
                "notifies": partial(loads.notifies, work.begin),
            }
        )


async def connections(given: argparse.Namespace) -> None:
    """Opens as many as it is told to, and leaves them idle once each has had an answer."""
    # Channels to the same address would otherwise share one connection.
    options = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    opened: list[Any] = []

    async def open_one() -> None:
        channel = grpc.aio.insecure_channel(given.address, options=options)
        opened.append(channel)
        answer = await channel.unary_unary(f"/{SERVICE}/unary")(PING_DATA)
        check(answer == PING_DATA, "a wrong answer")

    async def open_more(count: int) -> dict[str, Any]:
        for first in range(0, count, 20):
            await asyncio.gather(*[open_one() for _ in range(first, min(first + 20, count))])
        return {"open": len(opened)}

    await serve({"open": open_more})
    await asyncio.gather(*[channel.close() for channel in opened])


if __name__ == "__main__":
    program.main(__doc__, server=server, client=client, connections=connections)
