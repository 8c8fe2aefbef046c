"""The two ends of ``publish``: a node that sends, and a process full of those that subscribe."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

from bench.two_process.channels import ALL_HERE, EXPECT, FEED, QUIET
from bench.two_process.commands import CALM, check, open_many_files, pin, run, serve
from domi_fast import Client, Context, Node, connect

WAIT = 120.0


class Counting:
    """What subscribers have had together, told when all of it has come.

    :param node: is told how much to expect, and says when it is there.
    """

    def __init__(self, node: Node, subscribers: int) -> None:
        self._node = node
        self._each = [0] * subscribers
        self._left = self._wanted = self._wrong = 0
        self._content = b""
        node.subscribe(EXPECT, self._expect)

    def _expect(self, context: Context) -> None:
        self._wanted = int.from_bytes(context.data[:8], "little")
        self._content = context.data[8:]
        self._left = self._wanted * len(self._each)
        self._wrong = 0
        self._each[:] = [0] * len(self._each)
        context.reply(b"")

    def feed(self, number: int) -> Callable[[Context], None]:
        """The handler of one of them."""
        each = self._each

        def arrived(context: Context) -> None:
            each[number] += 1
            self._left -= 1
            self._wrong += context.data != self._content
            if self._left <= 0:
                self._all_here()

        return arrived

    def _all_here(self) -> None:
        self._wrong += set(self._each) != {self._wanted}
        word = b"wrong" if self._wrong or self._left else b"right"
        self._node.notify(ALL_HERE, word)


async def subscribe(given: argparse.Namespace) -> None:
    """Nodes, or guests of the publisher, that subscribe; and a node that counts for all of them."""
    open_many_files()
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(Node("counting", registry=given.registry, **CALM))
        counting = Counting(node, given.count)
        subscribers: list[Node | Client] = []
        if given.url:
            # A few at a time: a listener's backlog is finite.
            for first in range(0, given.count, 20):
                some = range(first, min(first + 20, given.count))
                subscribers += await asyncio.gather(*[connect(given.url, **CALM) for _ in some])
        else:
            for number in range(given.count):
                subscriber = Node(f"subscriber-{number}", registry=given.registry, **CALM)
                await subscriber.start()
                subscribers.append(subscriber)
        for number, each in enumerate(subscribers):
            stack.push_async_callback(each.close)
            each.subscribe(FEED, counting.feed(number))
        for each in subscribers:
            if isinstance(each, Node):  # the others, the publisher, and who counts
                await each.wait_peers(given.count + 1, timeout=WAIT)
            else:  # behind its subscription
                await each.request(QUIET, b"", timeout=WAIT)
        await serve({})


class Publisher:
    """
    :param guests: whether the subscribers are its own, to whom it sends as one node to itself.
    """

    def __init__(self, node: Node, subscribers: int, guests: bool) -> None:
        self.node = node
        self.subscribers = subscribers
        self._nodes = 1 if guests else subscribers
        self._arrived: asyncio.Future[bytes] | None = None
        node.subscribe(QUIET, lambda context: context.reply(b""))
        node.subscribe(ALL_HERE, self._all_here)

    def _all_here(self, context: Context) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(context.data)

    async def measure(self, size: int, count: int) -> dict[str, Any]:
        """From the first message sent until the last subscriber has had the last of them."""
        await self.node.wait_subscribed(FEED, self._nodes, timeout=WAIT)
        data = os.urandom(size)
        await self._send(data, max(1, count // 10))
        taken = await self._send(data, count)
        rate = count / taken
        return {"rate": rate * self.subscribers}

    async def _send(self, data: bytes, count: int) -> float:
        await self.node.request(EXPECT, count.to_bytes(8, "little") + data)
        self._arrived = asyncio.get_running_loop().create_future()
        publish = self.node.publish
        reached = 0
        began = time.perf_counter()
        for number in range(count):
            reached += publish(FEED, data)
            if number % 256 == 255:
                await asyncio.sleep(0)
        word = await asyncio.wait_for(self._arrived, WAIT)
        taken = time.perf_counter() - began
        wanted = count * self._nodes
        check(word == b"right" and reached == wanted, f"{reached} of {wanted} sent; {word!r}")
        return taken


async def publish(given: argparse.Namespace) -> None:
    open_many_files()
    async with Node("publisher", registry=given.registry, **CALM) as node:
        work = Publisher(node, given.count, given.guests)
        await serve({"measure": work.measure}, port=node.port)


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    await (subscribe if given.role == "subscribers" else publish)(given)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("role", choices=("subscribers", "publisher"))
    parser.add_argument("--registry", required=True)
    parser.add_argument("--count", type=int, required=True, help="how many subscribe")
    parser.add_argument("--guests", action="store_true", help="they are guests of the publisher")
    parser.add_argument("--url", help="of the publisher, whose guests they are")
    parser.add_argument("--cpu", type=int)
    run(main(parser.parse_args()))
