"""The anchor of one-way throughput: two blocking sockets and two loops that do nothing else.

With large blocks nearly all of the time is the kernel's, which copies them in and out.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BLOCK = 1_048_576
TIMEOUT = struct.pack("ll", 60, 0)

__all__ = ["measure"]


def measure(cpu_server: int | None, cpu_client: int | None, size: int) -> dict[str, Any]:
    """Sends ``size`` bytes over TCP on the loopback address, from one process to another.

    :param cpu_server: the CPU that the receiver is pinned to, or None; ``cpu_client`` the sender's.
    :returns: ``bytes_per_s``, until the receiver has said that it has everything.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-m", "bench.peers.raw_stream", "--connect"]
        command += [str(listener.getsockname()[1]), "--size", str(size)]
        command += [] if cpu_client is None else ["--cpu", str(cpu_client)]
        # This process is the receiver, for as long as that takes.
        usable = os.sched_getaffinity(0)
        root = Path(__file__).resolve().parents[2]
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as sender:
            try:
                listener.settimeout(30.0)
                if cpu_server is not None:
                    os.sched_setaffinity(0, {cpu_server})
                connection, _ = listener.accept()
                with connection:
                    make_blocking(connection)
                    _receive(connection, size)
                    _receive(connection, size)
                printed, _ = sender.communicate(timeout=30.0)
            finally:
                os.sched_setaffinity(0, usable)
                if sender.poll() is None:
                    sender.kill()
    result: dict[str, Any] = json.loads(printed)
    return result


def make_blocking(connection: socket.socket) -> None:
    """With the kernel's timeout, which costs nothing; Python's own would poll before each call."""
    connection.settimeout(None)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, TIMEOUT)


def _receive(connection: socket.socket, size: int) -> None:
    buffer = bytearray(BLOCK)
    left = size
    while left:
        got = connection.recv_into(buffer, min(left, BLOCK))
        if not got:
            raise RuntimeError(f"the sender ended with {left} of {size} bytes to come")
        left -= got
    connection.sendall(b".")


def _send(connection: socket.socket, size: int) -> float:
    block = os.urandom(BLOCK)
    began = time.perf_counter()
    for _ in range(size // BLOCK):
        connection.sendall(block)
    connection.sendall(block[: size % BLOCK])
    if connection.recv(1) != b".":
        raise RuntimeError("the receiver did not confirm what it was sent")
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--connect", type=int, required=True, metavar="PORT")
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--cpu", type=int)
    given = parser.parse_args()
    if given.cpu is not None:
        os.sched_setaffinity(0, {given.cpu})
    with socket.create_connection(("127.0.0.1", given.connect), timeout=60.0) as connection:
        make_blocking(connection)
        _send(connection, given.size)  # a warm-up of the same size
        taken = _send(connection, given.size)
    print(json.dumps({"bytes_per_s": given.size / taken, "size": given.size}))


if __name__ == "__main__":
    main()
