"""A crowd of strangers: connections that begin a handshake and say no more.

Its argument is a JSON object: ``port``, ``source`` (the address that they come from) and ``count``
(how many there are at a time). It prints ``{"full": true}`` once so many have been opened, replaces
what is closed until its standard input ends, and prints then how many there were, for how many
seconds the longest was open, and how many this process waited for a processor.
"""

from __future__ import annotations

import errno
import json
import os
import selectors
import socket
import struct
import sys
import time

from bench.processor import kept_waiting
from tests import reference

HALF = reference.magic() + reference.encode(
    reference.AUTH, reference.auth_hello(1, 65535, 65535, bytes(32), "")
)


def stranger(port: int, source: str) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
    sock.bind((source, 0))
    sock.setblocking(False)
    # Closed with RST, it leaves no port behind that has to wait.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    error = sock.connect_ex(("127.0.0.1", port))
    assert error in (0, errno.EINPROGRESS), os.strerror(error)
    return sock


def crowd(port: int, source: str, count: int) -> dict[str, float]:
    poll = selectors.EpollSelector()
    poll.register(sys.stdin, selectors.EVENT_READ)
    since: dict[socket.socket, float] = {}
    opened = 0
    longest = 0.0
    full = ended = False
    while since or not ended:
        while not ended and len(since) < count:
            sock = stranger(port, source)
            poll.register(sock, selectors.EVENT_WRITE)
            since[sock] = 0.0
            opened += 1
            if opened % 64 == 0:
                break
        if opened >= count and not full:
            full = True
            print(json.dumps({"full": True}), flush=True)
        for key, events in poll.select(0.0 if len(since) < count else 0.01):
            if key.fileobj is sys.stdin:
                ended = True
                poll.unregister(sys.stdin)
                continue
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            if events & selectors.EVENT_WRITE:
                try:
                    sock.send(HALF)
                    since[sock] = time.monotonic()
                    poll.modify(sock, selectors.EVENT_READ)
                    continue
                except OSError:
                    since[sock] = time.monotonic()
            try:
                while sock.recv(4096):
                    pass
            except BlockingIOError:
                continue
            except OSError:
                pass  # closed with RST, which ends it as well
            longest = max(longest, time.monotonic() - since.pop(sock))
            poll.unregister(sock)
            sock.close()
    return {"opened": opened, "longest": longest, "waited": kept_waiting()}


if __name__ == "__main__":
    print(json.dumps(crowd(**json.loads(sys.argv[1]))), flush=True)
