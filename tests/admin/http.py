"""Asking a node's admin pages from its own loop, without a client library in between."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


async def ask(
    port: int | None,
    path: str,
    method: str = "GET",
    *,
    host: str = "127.0.0.1",
    headers: dict[str, str] | None = None,
    body: bytes = b"",
) -> Answer:
    """One request on a connection of its own; ``Host`` is the address unless given."""
    assert port is not None
    said = {"Host": f"{host}:{port}", "Connection": "close", **(headers or {})}
    if body:
        said["Content-Length"] = str(len(body))
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {text}" for name, text in said.items())]
    return parse(await exchange(host, port, "\r\n".join([*lines, "", ""]).encode() + body))


async def exchange(host: str, port: int, data: bytes) -> bytes:
    """Send the bytes; all that comes until the connection is closed."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


def parse(data: bytes) -> Answer:
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:])
    return Answer(int(lines[0].split()[1]), headers, body.decode())
