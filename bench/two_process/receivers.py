"""Receivers of what is published, or sent in a loop: sockets that are read, checked and counted.

The same program for both, so that what it costs is in both figures alike.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
from typing import Any

from bench.two_process.channels import FEED
from bench.two_process.commands import open_many_files, pin, run, serve
from bench.two_process.scripted import Members, join
from domi_fast.registry import open_registry

MOST = 65536  # bytes that are read at a time


class Counted:
    """What comes on each socket: the same frame again and again.

    On the first socket it is said when each has got so many, and whether all was right.
    """

    def __init__(self, socks: list[socket.socket]) -> None:
        self._socks = socks
        self._got = [0] * len(socks)
        self._left = self._total = 0
        self._size = 1
        self._stream = b""
        self._wrong = 0  # for ever: what comes when nothing is expected is wrong, too
        self._words = (b"", b"")

    def expect(self, frame: bytes, frames: int, right: bytes, wrong: bytes) -> None:
        """From now on: so many of this frame, then the word for it, and so on."""
        self._size = len(frame)
        self._stream = frame * (MOST // len(frame) + 2)
        self._left = self._total = len(frame) * frames * len(self._socks)
        self._got = [0] * len(self._socks)
        self._words = (right, wrong)

    def readable(self, number: int) -> None:
        """Take what has come on that socket."""
        data = self._socks[number].recv(MOST)
        at = self._got[number] % self._size
        self._got[number] += len(data)
        self._left -= len(data)
        if not data:
            asyncio.get_running_loop().remove_reader(self._socks[number].fileno())
        if not data or not self._stream.startswith(data, at):
            self._wrong += 1
        if self._left <= 0 or not data:
            self._say()

    def _say(self) -> None:
        self._wrong += self._left != 0 or len(set(self._got)) != 1
        self._left = self._total
        self._got = [0] * len(self._socks)
        self._socks[0].send(self._words[bool(self._wrong)])


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    most = open_many_files()
    loop = asyncio.get_running_loop()
    registry = open_registry(given.registry)
    await registry.open()
    receivers: list[Counted] = []

    def count(socks: list[socket.socket]) -> dict[str, Any]:
        counted = Counted(socks)
        receivers.append(counted)
        for number, sock in enumerate(socks):
            # In the place of what read the handshake, if there was one.
            loop.add_reader(sock.fileno(), counted.readable, number)
        return {"open": len(socks)}

    async def subscribe(port: int, count_of: int) -> dict[str, Any]:
        """So many peers of the node there, which subscribe to FEED."""
        sessions = await join(Members(registry), [port], count_of, [FEED])
        if any(session.lost or session.pending for session in sessions):
            raise RuntimeError("the node has not come to the end of what it says first")
        return count([session.sock for session in sessions])

    async def connect(port: int, count_of: int) -> dict[str, Any]:
        """So many connections to who sends in a loop there."""
        socks = []
        for _ in range(count_of):
            sock = socket.socket()
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(sock, ("127.0.0.1", port))
            socks.append(sock)
        return count(socks)

    async def expect(frame: str, frames: int, right: str, wrong: str) -> dict[str, Any]:
        """The frame and both words are in hex."""
        (counted,) = receivers
        words = bytes.fromhex(right), bytes.fromhex(wrong)
        counted.expect(bytes.fromhex(frame), frames, *words)
        return {}

    try:
        await serve({"subscribe": subscribe, "connect": connect, "expect": expect}, files=most)
    finally:
        await registry.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", required=True)
    parser.add_argument("--cpu", type=int)
    run(main(parser.parse_args()))
