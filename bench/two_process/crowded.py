"""The two ends of ``crowd``: a node that strangers come to, and who joins it beside them."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

from bench.processor import kept_waiting
from bench.two_process.commands import open_many_files, percentiles, pin, run, serve
from domi_fast import Node, connect

SECRET = b"a secret of the benchmarks"
WAIT = 30.0


async def stay(given: argparse.Namespace) -> None:
    # It says the first of each kind of trouble, for people, and here that is not what is looked at.
    logging.getLogger("domi_fast").setLevel(logging.CRITICAL)
    async with Node("crowded", registry=given.registry, secret=SECRET) as node:

        async def counters() -> dict[str, Any]:
            """The node's counters, and how many connections it has, strangers' among them."""
            return {
                "refused_handshakes": 0,
                **node.counters(),
                "held": len(node._mesh._sessions),
                "cpu_s": time.process_time(),
            }

        await serve({"counters": counters}, port=node.port)


async def join(given: argparse.Namespace) -> None:
    """Again and again: from nothing until the other is there.

    Each has a processor that it shares with nobody who goes first but strangers to the benchmark:
    what they have kept either waiting is told apart.
    """

    async def timed(begin: Callable[[], Awaitable[Any]], taken: list[int], alone: list[int]) -> Any:
        waited = kept_waiting(os.getpid(), given.pid)
        began = time.perf_counter_ns()
        begun = await begin()
        taken.append(time.perf_counter_ns() - began)
        waited = kept_waiting(os.getpid(), given.pid) - waited
        alone.append(max(0, taken[-1] - int(waited * 1e9)))
        return begun

    async def nodes(count: int) -> dict[str, Any]:
        taken: list[int] = []
        alone: list[int] = []
        for _ in range(count):
            node = Node("newcomer", registry=given.registry, secret=SECRET)

            async def begin(node: Node = node) -> None:
                await node.start()
                await node.wait_peers(1, WAIT)

            try:
                await timed(begin, taken, alone)
            finally:
                await node.close()
        return {**percentiles(taken), "alone_p99_ns": percentiles(alone)["p99_ns"]}

    async def guests(count: int) -> dict[str, Any]:
        taken: list[int] = []
        alone: list[int] = []
        for _ in range(count):
            guest = await timed(
                lambda: connect(given.url, secret=SECRET, timeout=WAIT), taken, alone
            )
            await guest.close()
        return {**percentiles(taken), "alone_p99_ns": percentiles(alone)["p99_ns"]}

    await serve({"nodes": nodes, "guests": guests})


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    open_many_files()
    await (join if given.url else stay)(given)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", required=True)
    parser.add_argument("--cpu", type=int)
    parser.add_argument("--url", help="of the node that strangers come to, for who joins it")
    parser.add_argument("--pid", type=int, help="of that node's process")
    run(main(parser.parse_args()))
