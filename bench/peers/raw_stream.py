"""The anchor of one-way throughput: two blocking sockets and two loops in C that do nothing else.

With large messages nearly all of the time is the kernel's, which copies them in and out
(``raw_stream.c`` beside this file).
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from bench.peers.c_program import Program, cpu

__all__ = ["measure"]


BLOCK = 1 << 20


def measure(
    cpu_server: int | None, cpu_client: int | None, size: int, block: int = BLOCK
) -> dict[str, Any]:
    """Sends ``size`` bytes over TCP on the loopback address, from one process to another, in
    messages of ``block`` bytes.

    :param cpu_server: the CPU that the receiver is pinned to, or None; ``cpu_client`` the sender's.
    :returns: ``bytes_per_s``, until the receiver has said that it has everything.
    """
    how_much = ["--size", str(size), "--block", str(block)]
    with Program("raw_stream", "--receiver", *how_much, *cpu(cpu_server)) as receiver:
        where = ["--port", str(receiver.answer()["port"])]
        with Program("raw_stream", "--sender", *where, *how_much, *cpu(cpu_client)) as sender:
            return sender.answer()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers.raw_stream", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--cpu-server", type=int, metavar="N", help="pin the receiver to this CPU")
    parser.add_argument("--cpu-client", type=int, metavar="N", help="pin the sender to this CPU")
    parser.add_argument("--size", type=int, default=512 << 20, help="bytes to send")
    parser.add_argument("--block", type=int, default=BLOCK, help="bytes of each message")
    given = parser.parse_args()
    print(json.dumps(measure(given.cpu_server, given.cpu_client, given.size, given.block)))


if __name__ == "__main__":
    main()
