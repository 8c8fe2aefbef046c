"""A fuzz target: the handshake of a node, over a socket, and the first messages behind it.

An input is a byte of switches (whether the node has a secret, whether each frame of the input is
sealed into a valid one, whether it begins with the magic), and what a dialler says: pieces, each
behind its size. The node takes them as from any other connection. Nothing may raise, and the
session, its descriptor and its handshake are gone when the dialler is.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
import sys
from typing import Any

import atheris

with atheris.instrument_imports(
    include=["domi_fast.authentication", "domi_fast.handshake", "domi_fast.mesh"]
):
    from domi_fast import Context, Node
from tests import reference

SECRET = b"the secret of the fuzzed"
PIECES = 6
# Turns of the loop within which what was said has been dealt with: the registry that some offers
# are looked up in is in this process.
TURNS = 40


class Errors(logging.Handler):
    """What is logged as an error is one, and ends the run."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record)


class Stage:
    """A loop, and on it a node without a secret and one with it."""

    def __init__(self) -> None:
        self.loop = asyncio.SelectorEventLoop()
        self.errors = Errors()
        self.problems: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.problems.append(context))
        log = logging.getLogger("domi_fast")
        log.propagate = False
        log.setLevel(logging.ERROR)
        log.addHandler(self.errors)
        self.nodes = [self.node("memory://open", None), self.node("memory://guarded", SECRET)]

    def node(self, url: str, secret: bytes | None) -> Any:
        node = Node("fuzzed", registry=url, secret=secret, on_error=lambda error, frame: None)
        node.subscribe(50, answer)
        self.loop.run_until_complete(node.start())
        return node

    def turn(self) -> None:
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()

    def run(self, data: bytes) -> None:
        switches = data[0]
        node = self.nodes[switches & 1]
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        ours.setblocking(False)
        descriptor = theirs.detach()
        known = set(node._mesh._sessions)
        self.loop.call_soon(node._mesh._accepted, descriptor, "the fuzzer")
        self.turn()
        [session] = node._mesh._sessions - known
        try:
            if switches & 2:
                ours.send(reference.magic())
            for piece in pieces(data[1:], bool(switches & 4)):
                ours.send(piece)
                self.turn()
                self.turn()
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has refused what came before
        ours.close()
        for _ in range(TURNS):
            if session.closed and session not in node._mesh._sessions:
                break
            self.turn()
        assert session.closed, session.reason
        assert node._mesh._sessions == known
        assert not node.peers, node.peers
        assert not self.problems, self.problems
        assert not self.errors.found, [each.getMessage() for each in self.errors.found]


def answer(ctx: Context) -> None:
    if ctx.is_request:
        ctx.reply(ctx.data)


def pieces(data: bytes, sealed: bool) -> list[bytes]:
    """Each behind its size: as it is; or channel and size of the extend, and what a frame holds."""
    found: list[bytes] = []
    while len(data) > 2 and len(found) < PIECES:
        (size,) = struct.unpack_from("<H", data)
        piece, data = data[2 : 2 + size], data[2 + size :]
        if sealed and len(piece) >= 3:
            channel, extend = struct.unpack_from("<HB", piece)
            end = max(3, len(piece) - extend)
            piece = reference.encode(channel, piece[3:end], piece[end:])
        found.append(piece)
    return found


def same(size: int) -> bytes:
    return bytes(range(size))


if __name__ == "__main__":
    stage = Stage()
    os.urandom = same

    def target(data: bytes) -> None:
        if data:
            stage.run(data)

    # The command by which libFuzzer runs this again, in a shell, when it merges.
    again = f"{sys.executable} -m tests.fuzz.sessions"
    atheris.Setup([again, *sys.argv[1:]], target)
    atheris.Fuzz()
