"""pyzmq for coroutines: a ROUTER that sends back what its DEALERs send, by ``zmq.asyncio``."""

from __future__ import annotations

import argparse
import asyncio
import itertools
from contextlib import suppress
from typing import Any

import zmq
import zmq.asyncio

from bench.peers import loads, program
from bench.two_process.channels import PING_DATA
from bench.two_process.commands import check, serve
from bench.two_process.memory import memory


async def server(given: argparse.Namespace) -> None:
    context = zmq.asyncio.Context()
    context.setsockopt(zmq.LINGER, 0)
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.BACKLOG, 1024)
    port = router.bind_to_random_port("tcp://127.0.0.1")

    async def echo() -> None:
        while True:
            await router.send_multipart(await router.recv_multipart())

    echoing = asyncio.ensure_future(echo())
    try:
        await serve({"memory": memory}, address=f"tcp://127.0.0.1:{port}")
    finally:
        echoing.cancel()
        with suppress(asyncio.CancelledError):
            await echoing
        context.destroy()


class Numbered:
    """Requests that carry a number, by which the answer finds who waits for it."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket
        self._numbers = itertools.count()
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self._loop = asyncio.get_running_loop()

    async def ask(self, data: bytes) -> bytes:
        key = next(self._numbers).to_bytes(8, "little")
        future: asyncio.Future[bytes] = self._loop.create_future()
        self._waiting[key] = future
        await self._socket.send_multipart([key, data])
        return await future

    async def read(self) -> None:
        while True:
            key, data = await self._socket.recv_multipart()
            self._waiting.pop(key).set_result(data)


async def client(given: argparse.Namespace) -> None:
    context = zmq.asyncio.Context()
    context.setsockopt(zmq.LINGER, 0)
    lone, many = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    for socket in (lone, many):
        socket.connect(given.address)

    async def ask_alone(data: bytes) -> bytes:
        await lone.send(data)
        answer: bytes = await lone.recv()
        return answer

    numbered = Numbered(many)
    reading = asyncio.ensure_future(numbered.read())
    try:
        await serve(loads.asking(numbered.ask, ask_alone))
    finally:
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading
        context.destroy()


async def connections(given: argparse.Namespace) -> None:
    """Opens as many as it is told to, and leaves them idle once each has had an answer."""
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 10_000)
    context.setsockopt(zmq.LINGER, 0)
    opened: list[zmq.Socket] = []

    async def open_more(count: int) -> dict[str, Any]:
        for _ in range(count):
            socket = context.socket(zmq.DEALER)
            socket.setsockopt(zmq.RCVTIMEO, int(loads.PATIENCE * 1000))
            socket.connect(given.address)
            socket.send(PING_DATA)
            check(socket.recv() == PING_DATA, "a wrong answer")
            opened.append(socket)
        return {"open": len(opened)}

    try:
        await serve({"open": open_more})
    finally:
        context.destroy()


if __name__ == "__main__":
    program.main(__doc__, server=server, client=client, connections=connections)
