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
    cpu_server: int | None,
    cpu_client: int | None,
    size: int,
    block: int = BLOCK,
    *,
    fixed: bool = False,
) -> dict[str, Any]:
    """Sends ``size`` bytes over TCP on the loopback address, from one process to another, in
    messages of ``block`` bytes.

    :param cpu_server: the CPU that the receiver is pinned to, or None; ``cpu_client`` the sender's.
    :param fixed: whether all are received into the same memory, and not each into its own.
    :returns: ``bytes_per_s``, until the receiver has said that it has everything.
    """
    how_much = ["--size", str(size), "--block", str(block)]
    receiving = ["--receiver", *["--fixed"][:fixed], *how_much, *cpu(cpu_server)]
    with Program("raw_stream", *receiving) as receiver:
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
    parser.add_argument("--fixed", action="store_true", help="receive into the same memory")
    given = parser.parse_args()
    cpus = given.cpu_server, given.cpu_client
    print(json.dumps(measure(*cpus, given.size, given.block, fixed=given.fixed)))


if __name__ == "__main__":
    main()
