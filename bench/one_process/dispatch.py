"""Frames from a socket to a handler that does nothing, beside the same calls from a loop in C."""

from __future__ import annotations

import argparse
import asyncio
import socket
import struct
import time
from typing import Any

from bench.peers import vectorcalls
from bench.two_process.channels import PING
from bench.two_process.commands import pin, run, serve
from domi_fast import Context, LibraryChannel, Node, encode_frame

MAGIC = struct.pack("<I", 2299)
MACHINE = 1000
MARK = PING + 1
FRAMES = 1000  # at once: what the kernel hands over in one piece, and a session in one slice


def nothing(context: Context) -> None:
    """The handler."""


class Dispatch:
    """A node, and a bare socket that is its peer."""

    def __init__(self, node: Node, peer: socket.socket) -> None:
        self._node = node
        self._peer = peer
        self._repeat = vectorcalls.load()

    async def compare(self, rounds: int) -> dict[str, Any]:
        """Seconds a frame, in pairs: the session's reading of 1,000 of them, and 1,000 calls."""
        session = self._node._router.session(MACHINE)
        assert session is not None
        kept: list[Context] = []
        caught_up = asyncio.Event()

        def mark(context: Context) -> None:
            kept.append(context)
            caught_up.set()

        async def catch_up() -> None:
            self._peer.sendall(encode_frame(MARK, b"ping"))
            await caught_up.wait()
            caught_up.clear()

        self._node.subscribe(MARK, mark)
        await catch_up()
        frames = encode_frame(PING, b"ping") * FRAMES
        ours: list[float] = []
        anchor: list[float] = []
        clock = time.perf_counter
        for _ in range(rounds):
            before = session.frames_in
            self._peer.sendall(frames)
            began = clock()
            session.readable()
            took = clock() - began
            # If not, another process had this one's processor, and the slice was up.
            whole = session.frames_in - before == FRAMES
            await catch_up()
            began = clock()
            self._repeat(nothing, kept[0], FRAMES)
            if whole:
                ours.append(took / FRAMES)
                anchor.append((clock() - began) / FRAMES)
            kept[1:] = []
        return {"ours": ours, "anchor": anchor}


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    async with Node("server", registry="memory://bench") as node:
        node.subscribe(PING, nothing)
        with socket.create_connection(("127.0.0.1", node.port)) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            name = encode_frame(LibraryChannel.NODE_NAME, struct.pack("<H", MACHINE))
            peer.sendall(MAGIC + name)
            await node.wait_peers(1, timeout=5)
            await serve({"compare": Dispatch(node, peer).compare})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", type=int)
    run(main(parser.parse_args()))
