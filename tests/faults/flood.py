"""A process that publishes without a pause, or takes what is published: for test_slow_subscriber.

Its first argument is its part. It says what it has done in JSON lines, and goes on at each line of
its standard input.
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
from typing import Any

import uvloop

from domi_fast import Context, Node
from domi_fast.metrics import rss

CHANNEL = 50
SIZE = 1_000
# What may wait for who reads, so that the memory of the publisher is that of who does not.
BEHIND = 256 << 10


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


async def told() -> None:
    await asyncio.to_thread(sys.stdin.readline)


async def publish(settings: dict[str, Any], count: int) -> None:
    """Twice so many messages to two subscribers, one of which may be stopped the second time."""
    async with Node("publisher", on_error=lambda error, frame: None, **settings) as node:
        await node.wait_subscribed(CHANNEL, 2, 10)
        slow = next(peer for peer in node.peers.values() if peer.name == "slow")
        live = next(peer for peer in node.peers.values() if peer.name == "live")
        say(slow=slow.id)
        number = offered = 0
        for _ in range(2):
            before = most = rss()
            for _ in range(count):
                offered += slow.id in node.subscribers(CHANNEL)
                node.publish(CHANNEL, struct.pack("<Q", number) + bytes(SIZE - 8))
                number += 1
                while live.queued > BEHIND:  # noqa: ASYNC110 - nobody tells of so much room
                    await asyncio.sleep(0)
                if number % 100 == 0:
                    await asyncio.sleep(0)
                    most = max(most, rss())
            say(grown=most - before)
            await told()
        for session in node._router.sessions():
            await session.drained(everything=True)
        dropped = sum(count for (peer, _), count in node.drops().items() if peer == slow.id)
        others = sum(count for (peer, _), count in node.drops().items() if peer != slow.id)
        say(sent=number, offered=offered, dropped=dropped, others=others)
        await told()


async def take(settings: dict[str, Any], name: str) -> None:
    """Count what comes, and whether it comes in order."""
    received, last, ordered = 0, -1, True

    def handler(ctx: Context) -> None:
        nonlocal received, last, ordered
        (number,) = struct.unpack_from("<Q", ctx.data)
        received += 1
        ordered = ordered and number > last
        last = number

    async with Node(name, **settings) as node:
        node.subscribe(CHANNEL, handler)
        say(id=node.id)
        while True:
            await told()
            before = -1
            while before != received:  # what is on its way has come when no more comes
                before = received
                await asyncio.sleep(0.2)
            say(received=received, last=last, ordered=ordered)


if __name__ == "__main__":
    part, given = sys.argv[1], json.loads(sys.argv[2])
    work = publish(given, int(sys.argv[3])) if part == "publisher" else take(given, part)
    uvloop.run(work)
