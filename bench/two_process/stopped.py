"""The two ends of ``stopped``: one node that publishes, and those that take it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import struct
import time
from typing import Any

from bench.two_process.channels import FEED
from bench.two_process.commands import CALM, percentiles, pin, run, serve
from domi_fast import Context, Node

SUBSCRIBERS = 3
SIZE = 1_000
HEAD = struct.Struct("<QQ?")  # when it was to be sent, its number, and whether it counts
WAIT = 60.0
# What may wait in the publisher for one who lives: that, and the sockets' buffers, are full.
BEHIND = 256 << 10
# The same where each is sent when it is due: nobody who lives is to miss one, whatever holds it up.
FAR_BEHIND = 8 << 20


async def publish(given: argparse.Namespace) -> None:
    logging.getLogger("domi_fast").setLevel(logging.CRITICAL)  # it warns of who is stopped
    node = Node(
        "publisher",
        registry=given.registry,
        when_full=given.when_full,
        on_error=lambda error, frame: None,
        **CALM,
    )

    async def feed(live: list[int], warm_up: float, seconds: float, rate: float) -> dict[str, Any]:
        """Publish so long; how many counted, and how many one of the others did not get.

        :param rate: a second, each when it is due; 0: as fast as the living take it.
        """
        peers = [node.peers[machine] for machine in live]
        padding = bytes(SIZE - HEAD.size)
        most = FAR_BEHIND if rate else BEHIND
        clock = time.monotonic_ns
        number = counted = reached = 0
        dropped = sum(node.drops().values())
        began = clock()
        begun = began + int(warm_up * 1e9)
        end = begun + int(seconds * 1e9)
        while (now := clock()) < end or not counted:
            due = began + int(number * 1e9 / rate) if rate else now
            if due <= now:
                reached += node.publish(FEED, HEAD.pack(due, number, due >= begun) + padding)
                number += 1
                counted += due >= begun
                if number % 32:
                    continue
            await asyncio.sleep(0)
            # Nobody tells of so much room.
            while any(peer.queued > most for peer in peers):  # noqa: ASYNC110
                await asyncio.sleep(0)
        dropped = sum(node.drops().values()) - dropped
        return {
            "counted": counted,
            "rate": number / ((clock() - began) * 1e-9),
            "missed": number * SUBSCRIBERS - reached + dropped,
        }

    async def recovered() -> dict[str, Any]:
        """Wait until all are there, and nothing waits for any of them."""
        end = time.monotonic() + WAIT
        await node.wait_subscribed(FEED, SUBSCRIBERS, timeout=WAIT)
        while any(peer.queued for peer in node.peers.values()):
            if time.monotonic() > end:
                raise RuntimeError(f"messages still wait after {WAIT:g} s")
            await asyncio.sleep(0.01)
        return {}

    async with node:
        await node.wait_subscribed(FEED, SUBSCRIBERS, timeout=WAIT)
        await serve({"feed": feed, "recovered": recovered})


async def take(given: argparse.Namespace) -> None:
    taken: list[int] = []
    last = -1
    wrong = 0

    def arrived(context: Context) -> None:
        nonlocal last, wrong
        sent, number, counts = HEAD.unpack_from(context.data)
        if counts:
            taken.append(time.monotonic_ns() - sent)
        wrong += number != last + 1 and number != 0
        last = number

    async def latencies(count: int) -> dict[str, Any]:
        """Of so many, which may not all have come; none is missing or out of order."""
        end = time.monotonic() + WAIT
        while len(taken) < count and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        if len(taken) != count or wrong:
            raise RuntimeError(f"{len(taken)} of {count} came, {wrong} out of order")
        found = percentiles(taken)
        taken.clear()
        return found

    async def forget() -> dict[str, Any]:
        nonlocal wrong
        taken.clear()
        wrong = 0
        return {}

    node = Node(given.name, registry=given.registry, **CALM)
    node.subscribe(FEED, arrived)
    async with node:
        await serve({"latencies": latencies, "forget": forget}, id=node.id)


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    await (publish if given.when_full else take)(given)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", required=True)
    parser.add_argument("--cpu", type=int)
    parser.add_argument("--name", default="subscriber")
    parser.add_argument("--when-full", help="the publisher's policy; without it one subscribes")
    run(main(parser.parse_args()))
