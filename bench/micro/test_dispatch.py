"""Frames of a socket, read, taken apart and given to a handler, as plain Python would do it."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from domi_fast import Context, LibraryChannel, Node, encode_frame

DATA = b"sixteen bytes!!!"
SINK = 50
HEADER = struct.Struct("<IHH")
MAGIC = struct.pack("<I", 2299)
MACHINE = 1000
AT_ONCE = 400  # what a session reads in one piece
RECEIVED = 65_536


@pytest.fixture
def node(loop: Any) -> Iterator[Node]:
    node = Node("dispatching", registry="memory://dispatching")
    loop.run_until_complete(node.start())
    yield node
    loop.run_until_complete(node.close())


@pytest.fixture
def peer(loop: Any, node: Node) -> Iterator[socket.socket]:
    """A bare socket that the node has for a peer."""
    with socket.create_connection(("127.0.0.1", node.port)) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        name = encode_frame(LibraryChannel.NODE_NAME, struct.pack("<H", MACHINE))
        peer.sendall(MAGIC + name)
        loop.run_until_complete(node.wait_peers(1, timeout=5))
        yield peer


def test_dispatch_frames(
    measure: Any, items: int, loop: Any, node: Node, peer: socket.socket
) -> None:
    """Both send what they read, hundreds at a time. Of ours nobody asks for the data, and no bytes
    are made of them.
    """
    session = node._router.session(MACHINE)
    assert session is not None
    frames = encode_frame(SINK, DATA) * AT_ONCE
    times = items // AT_ONCE

    def nothing(context: Context) -> None:
        pass

    node.subscribe(SINK, nothing)

    def work() -> None:
        for _ in range(times):
            wanted = session.frames_in + AT_ONCE
            peer.sendall(frames)
            session.readable()
            # Another process had this one's processor, and the session's slice of time was up.
            while session.frames_in < wanted:
                loop.run_until_complete(asyncio.sleep(0))

    sending, receiving = socket.socketpair()
    handlers = {SINK: lambda data: None}
    unpack = HEADER.unpack_from

    def anchor() -> None:
        for _ in range(times):
            sending.sendall(frames)
            stream = receiving.recv(RECEIVED)
            position = 0
            while position < len(stream):
                length, extend_size, channel = unpack(stream, position)
                end = position + length
                handlers[channel](stream[position + 8 : end - extend_size])
                position = end

    got: list[bytes] = []
    with sending, receiving:
        measure(work, anchor, times * AT_ONCE)
        handlers[SINK] = got.append
        anchor()
    node.unsubscribe(SINK)
    node.subscribe(SINK, lambda context: got.append(context.data))
    work()
    assert got == 2 * times * AT_ONCE * [DATA]
