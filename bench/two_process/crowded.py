"""The two ends of ``crowd``: a node that strangers come to, and who joins it beside them."""

from __future__ import annotations

import argparse
import logging
import resource
import time
from typing import Any

from bench.two_process.commands import percentiles, pin, run, serve
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
    """Again and again: from nothing until the other is there."""

    async def nodes(count: int) -> dict[str, Any]:
        taken = []
        for _ in range(count):
            node = Node("newcomer", registry=given.registry, secret=SECRET)
            began = time.perf_counter_ns()
            try:
                await node.start()
                await node.wait_peers(1, WAIT)
                taken.append(time.perf_counter_ns() - began)
            finally:
                await node.close()
        return percentiles(taken)

    async def guests(count: int) -> dict[str, Any]:
        taken = []
        for _ in range(count):
            began = time.perf_counter_ns()
            guest = await connect(given.url, secret=SECRET, timeout=WAIT)
            taken.append(time.perf_counter_ns() - began)
            await guest.close()
        return percentiles(taken)

    await serve({"nodes": nodes, "guests": guests})


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    await (join if given.url else stay)(given)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", required=True)
    parser.add_argument("--cpu", type=int)
    parser.add_argument("--url", help="of the node that strangers come to, for who joins it")
    run(main(parser.parse_args()))
