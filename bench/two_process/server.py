"""The answering end of every benchmark of two processes: echo, sink, and its own memory."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from bench.peers.loads import Tally
from bench.two_process.channels import (
    BULK,
    COUNTS,
    PING,
    PING_LISTS,
    SINK,
)
from bench.two_process.commands import RUNNERS, open_many_files, pin, run, serve
from bench.two_process.memory import memory
from domi_fast import Context, Node, Serial

LONG_WAIT = 300.0


def tallying(tally: Tally) -> Callable[[Context], None]:
    """A handler that counts what comes, and answers who asks with the tally."""

    def handle(context: Context) -> None:
        if context.is_request:
            context.reply(tally.told())
        else:
            tally.add(context.data)

    return handle


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
            context.reply(context.data)

        def ping_lists(contexts: list[Context]) -> None:
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
        endpoint.subscribe(PING_LISTS, ping_lists, batch=True)
        endpoint.subscribe(SINK, sink)
        endpoint.subscribe(COUNTS, counts)
        for channel in BULK:
            endpoint.subscribe(channel, tallying(Tally()))

    async def counters(self) -> dict[str, Any]:
        """The node's counters, and the processor time that this process has had."""
        return {**self.node.counters(), "cpu_s": time.process_time()}

    async def peers(self, count: int) -> dict[str, Any]:
        """Wait until there are so many peers, and no more."""
        await self.node.wait_peers(count, LONG_WAIT)
        return {}


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    most = open_many_files()
    node = Node(
        "server",
        registry=given.registry,
        unix_path=given.unix,
        busy_poll=given.busy_poll,
        sessions_per_peer=given.lanes,
    )
    serial = Serial(node) if given.serial else None
    server = Server(node, serial)
    async with node, serial or nullcontext():
        await serve(
            {"counters": server.counters, "peers": server.peers, "memory": memory},
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
    parser.add_argument("--lanes", type=int, default=1, help="sessions with the client")
    parser.add_argument("--loop", choices=RUNNERS, default="uvloop")
    given = parser.parse_args()
    run(main(given), given.loop)
