"""aiohttp at both ends: requests by HTTP over connections kept alive, the rest by a WebSocket."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import aiohttp
from aiohttp import web

from bench.peers import loads, program
from bench.two_process.channels import PING_DATA
from bench.two_process.commands import check, serve
from bench.two_process.memory import memory

Take = Callable[[web.WebSocketResponse, aiohttp.WSMessage], Awaitable[None]]


async def unary(request: web.Request) -> web.Response:
    return web.Response(body=await request.read())


async def talk(request: web.Request, take: Take) -> web.WebSocketResponse:
    socket = web.WebSocketResponse(max_msg_size=0, compress=False)
    await socket.prepare(request)
    async for message in socket:
        await take(socket, message)
    return socket


async def echo(request: web.Request) -> web.WebSocketResponse:
    async def take(socket: web.WebSocketResponse, message: aiohttp.WSMessage) -> None:
        await socket.send_bytes(message.data)

    return await talk(request, take)


async def sink(request: web.Request) -> web.WebSocketResponse:
    """Counts until a text asks for what has come."""
    tally = loads.Tally()

    async def take(socket: web.WebSocketResponse, message: aiohttp.WSMessage) -> None:
        if message.type == aiohttp.WSMsgType.BINARY:
            tally.add(message.data)
        else:
            await socket.send_bytes(tally.told())

    return await talk(request, take)


async def server(given: argparse.Namespace) -> None:
    application = web.Application()
    application.router.add_post("/unary", unary)
    application.router.add_get("/echo", echo)
    application.router.add_get("/sink", sink)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    port = runner.addresses[0][1]
    await serve({"memory": memory}, address=f"http://127.0.0.1:{port}")
    await runner.cleanup()


def new_session() -> aiohttp.ClientSession:
    """As many connections as there are requests at a time, and no cookies."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar()
    )


async def web_socket(session: aiohttp.ClientSession, url: str) -> Any:
    return await session.ws_connect(url, max_msg_size=0, compress=0)


async def client(given: argparse.Namespace) -> None:
    async with new_session() as session:
        echoing = await web_socket(session, f"{given.address}/echo")
        sinking = await web_socket(session, f"{given.address}/sink")
        url = f"{given.address}/unary"

        async def ask(data: bytes) -> bytes:
            async with session.post(url, data=data) as response:
                return await response.read()

        async def counted() -> bytes:
            await sinking.send_str("counted")
            told: bytes = await sinking.receive_bytes()
            return told

        stream = loads.Stream(sinking.send_bytes, counted)
        await serve(
            {
                **loads.asking(ask),
                "calls": partial(loads.calls, echoing.send_bytes, echoing.receive_bytes),
                "notifies": partial(loads.notifies, lambda: stream),
            }
        )


async def connections(given: argparse.Namespace) -> None:
    """Opens as many WebSockets as it is told to, and leaves them idle."""
    opened: list[Any] = []
    async with new_session() as session:

        async def open_more(count: int) -> dict[str, Any]:
            for _ in range(count):
                socket = await web_socket(session, f"{given.address}/echo")
                await socket.send_bytes(PING_DATA)
                check(await socket.receive_bytes() == PING_DATA, "a wrong answer")
                opened.append(socket)
            return {"open": sum(not socket.closed for socket in opened)}

        await serve({"open": open_more})


if __name__ == "__main__":
    program.main(__doc__, server=server, client=client, connections=connections)
