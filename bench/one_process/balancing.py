"""Nodes in one process: four that answer, one of them slowly, and what guards cost a message."""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

from bench.two_process.commands import percentiles, pin, run, serve
from domi_fast import Context, Node
from domi_fast.limiter import RateLimit

WORK, SINK = 50, 51
SLOW = 0.02
DATA = b"ping"
BATCH = 256  # messages of a turn of the loop
NO_LIMIT = RateLimit(rate=1e12, size=1e12)


async def latencies(policy: str, count: int, concurrency: int) -> dict[str, Any]:
    """Awaited requests to four nodes, of which one takes 20 ms for each."""

    async def slowly(context: Context) -> None:
        await asyncio.sleep(SLOW)
        context.reply(DATA)

    registry = f"memory://{policy}"
    servers = [Node(f"server{number}", registry=registry) for number in range(4)]
    for server in servers[1:]:
        server.subscribe(WORK, lambda context: context.reply(DATA))
    servers[0].subscribe(WORK, slowly)
    taken: list[int] = []

    async def ask(node: Node, number: int) -> None:
        for _ in range(number):
            then = time.perf_counter_ns()
            await node.request(WORK, DATA)
            taken.append(time.perf_counter_ns() - then)

    await asyncio.gather(*[server.start() for server in servers])
    async with Node("client", registry=registry, balance=policy) as node:
        await node.wait_subscribed(WORK, 4, timeout=10)
        for number in (count // 10, count):
            taken.clear()
            each = max(1, number // concurrency)
            await asyncio.gather(*[ask(node, each) for _ in range(concurrency)])
    await asyncio.gather(*[server.close() for server in servers])
    return percentiles(taken)


async def sending(guard: str, guarded: bool, count: int) -> dict[str, Any]:
    """Nanoseconds that a ``notify`` to a given node takes its sender, with a guard or without it.

    To a given node, because its circuit is looked at then; of those who take turns, one whose
    circuit is open is none.
    """
    settings: dict[str, Any] = {}
    if guard == "limits" and guarded:
        settings = {"rate_limit": NO_LIMIT, "peer_rate_limit": NO_LIMIT}
    elif guard == "breaker" and not guarded:
        settings = {"breaker": None}
    registry = f"memory://{guard}-{guarded}"
    async with (
        Node("server", registry=registry) as server,
        Node("client", registry=registry, **settings) as node,
    ):
        server.subscribe(SINK, lambda contexts: None, batch=True)
        await node.wait_subscribed(SINK, timeout=10)
        notify, to = node.notify, server.id
        batches = max(1, count // BATCH)
        taken = 0
        for _ in range(batches):
            then = time.perf_counter_ns()
            for _ in range(BATCH):
                notify(SINK, DATA, to=to)
            taken += time.perf_counter_ns() - then
            await node.drained(to)
            await asyncio.sleep(0)
    return {"ns": taken / (batches * BATCH)}


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    await serve({"latencies": latencies, "sending": sending})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", type=int)
    run(main(parser.parse_args()))
