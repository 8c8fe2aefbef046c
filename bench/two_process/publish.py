"""The two ends of ``publish``: one node that sends, and a process full of nodes that subscribe."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from typing import Any

from bench.two_process.channels import ALL_HERE, EXPECT, FEED
from bench.two_process.commands import CALM, open_many_files, pin, run, serve
from domi_fast import Context, Node

WAIT = 120.0


async def subscribe(given: argparse.Namespace) -> None:
    """Nodes that count together what is published, and say when all of it has come."""
    open_many_files()
    nodes = [
        Node(f"subscriber-{number}", registry=given.registry, **CALM)
        for number in range(given.count)
    ]
    each = [0] * given.count
    expected = wanted = 0
    content = b""
    wrong = 0

    def feed(number: int) -> Any:
        def arrived(context: Context) -> None:
            nonlocal expected, wrong
            each[number] += 1
            expected -= 1
            if expected <= 0:
                wrong += context.data != content or len(set(each)) != 1 or each[0] != wanted
                nodes[0].notify(ALL_HERE, b"wrong" if wrong or expected else b"right")

        return arrived

    def expect(context: Context) -> None:
        nonlocal expected, wanted, content, wrong
        wanted = int.from_bytes(context.data[:8], "little")
        content = context.data[8:]
        expected = wanted * given.count
        wrong = 0
        each[:] = [0] * given.count
        context.reply(b"")

    for number, node in enumerate(nodes):
        node.subscribe(FEED, feed(number))
    nodes[0].subscribe(EXPECT, expect)
    try:
        for node in nodes:
            await node.start()
        for node in nodes:
            await node.wait_peers(given.count, timeout=WAIT)  # the others, and the publisher
        await serve({})
    finally:
        await asyncio.gather(*[node.close() for node in nodes])


class Publisher:
    def __init__(self, node: Node, subscribers: int) -> None:
        self.node = node
        self.subscribers = subscribers
        self._arrived: asyncio.Future[bytes] | None = None
        node.subscribe(ALL_HERE, self._all_here)

    def _all_here(self, context: Context) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(context.data)

    async def measure(self, size: int, count: int) -> dict[str, Any]:
        """From the first message sent until the last subscriber has had the last of them."""
        await self.node.wait_subscribed(FEED, self.subscribers, timeout=WAIT)
        data = os.urandom(size)
        await self._send(data, max(1, count // 10))
        taken = await self._send(data, count)
        rate = count / taken
        return {"rate": rate * self.subscribers, "published_per_s": rate, "count": count}

    async def _send(self, data: bytes, count: int) -> float:
        await self.node.request(EXPECT, count.to_bytes(8, "little") + data)
        self._arrived = asyncio.get_running_loop().create_future()
        publish = self.node.publish
        reached = 0
        began = time.perf_counter()
        for number in range(count):
            reached += publish(FEED, data)
            if number % 32 == 31:
                await asyncio.sleep(0)
        word = await asyncio.wait_for(self._arrived, WAIT)
        taken = time.perf_counter() - began
        if word != b"right" or reached != count * self.subscribers:
            raise RuntimeError(f"{reached} of {count * self.subscribers} were sent; {word!r}")
        return taken


async def publish(given: argparse.Namespace) -> None:
    async with Node("publisher", registry=given.registry, **CALM) as node:
        await serve({"measure": Publisher(node, given.count).measure})


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    await (subscribe if given.role == "subscribers" else publish)(given)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("role", choices=("subscribers", "publisher"))
    parser.add_argument("--registry", required=True)
    parser.add_argument("--count", type=int, required=True, help="how many nodes subscribe")
    parser.add_argument("--cpu", type=int)
    run(main(parser.parse_args()))
