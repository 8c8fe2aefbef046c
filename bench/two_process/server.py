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
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from bench.two_process.channels import (
    COUNTS,
    ECHO,
    ECHO_LISTS,
    PING,
    PING_LISTS,
    PONG_DATA,
    SINK,
)
from bench.two_process.commands import pin, run, serve
from domi_fast import Context, Node, Serial

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
    """One node, its handlers, and what the driver may ask of it.

    :param endpoint: where the handlers are subscribed: the node itself, or a Serial of it.
    """

    def __init__(self, node: Node, endpoint: Node | Serial | None = None) -> None:
        self.node = node
        endpoint = endpoint or node
        reply_many = endpoint.reply_many
        count = size = 0
        last = b""

        def ping(context: Context) -> None:
            context.reply(PONG_DATA)

        def echo(context: Context) -> None:
            context.reply(context.data)

        def ping_lists(contexts: list[Context]) -> None:
            reply_many(contexts, PONG_DATA)

        def echo_lists(contexts: list[Context]) -> None:
            reply_many(contexts, [context.data for context in contexts])

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

        endpoint.subscribe(PING, ping)
        endpoint.subscribe(ECHO, echo)
        endpoint.subscribe(PING_LISTS, ping_lists, batch=True)
        endpoint.subscribe(ECHO_LISTS, echo_lists, batch=True)
        endpoint.subscribe(SINK, sink)
        endpoint.subscribe(COUNTS, counts)

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
    node = Node("server", registry=given.registry, unix_path=given.unix, busy_poll=given.busy_poll)
    serial = Serial(node) if given.serial else None
    server = Server(node, serial)
    async with node, serial or nullcontext():
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
    parser.add_argument("--serial", action="store_true", help="handlers and verbs of a Serial")
    parser.add_argument("--busy-poll", type=float, default=0.0, metavar="SECONDS")
    run(main(parser.parse_args()))
