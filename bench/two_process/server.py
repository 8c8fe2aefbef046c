"""The answering end of every benchmark of two processes: echo, sink, and its own memory."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import hashlib
import json
import os
import resource
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.two_process.channels import COUNTS, ECHO, PING, PONG_DATA, SINK
from bench.two_process.commands import pin, run, serve
from domi_fast import Context, Node

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes of this process that are in memory, by the second number of ``statm``."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def trim() -> None:
    """Have unreferenced cycles freed and free memory given back to the system."""
    gc.collect()
    with suppress(AttributeError):  # not the GNU libc
        ctypes.CDLL(None).malloc_trim(0)


class Server:
    """One node, its handlers, and what the driver may ask of it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        count = size = 0
        last = b""

        def ping(context: Context) -> None:
            context.reply(PONG_DATA)

        def echo(context: Context) -> None:
            context.reply(context.data)

        def sink(context: Context) -> None:
            nonlocal count, size, last
            last = context.data
            count += 1
            size += len(last)

        def counts(context: Context) -> None:
            nonlocal count, size
            found = {"count": count, "size": size, "last": hashlib.sha256(last).hexdigest()}
            count = size = 0
            context.reply(json.dumps(found).encode())

        node.subscribe(PING, ping)
        node.subscribe(ECHO, echo)
        node.subscribe(SINK, sink)
        node.subscribe(COUNTS, counts)

    async def counters(self) -> dict[str, Any]:
        """The node's counters, and the processor time that this process has had."""
        return {**self.node.counters(), "cpu_s": time.process_time()}

    async def memory(self) -> dict[str, Any]:
        """Resident bytes as they are, and once all that is free has been given back."""
        as_is = resident()
        trim()
        # Dispatch leftovers of the loop's last turns belong to the past, not to the sessions.
        await asyncio.sleep(0.05)
        trim()
        return {"rss": as_is, "rss_trimmed": resident()}


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    node = Node("server", registry=given.registry, unix_path=given.unix)
    server = Server(node)
    async with node:
        await serve(
            {"counters": server.counters, "memory": server.memory},
            id=node.id,
            port=node.port,
            files=most,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", required=True)
    parser.add_argument("--cpu", type=int)
    parser.add_argument("--unix")
    run(main(parser.parse_args()))
