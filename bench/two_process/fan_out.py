"""The publisher of ``fan-out``: a node with many subscribers, and the clock around its sends."""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

from bench.two_process.channels import ALL_HERE, FEED
from bench.two_process.commands import CALM, open_many_files, pin, run, serve
from domi_fast import Context, Node

WAIT = 120.0
A_TURN = 32  # messages that are published before the loop has its turn
# Of memory there is no news while bytes are counted.
SETTINGS: dict[str, Any] = {**CALM, "memory_interval": 3600.0}


class Publisher:
    """Publishes, and hears from the receivers that all has come."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._arrived: asyncio.Future[bytes] | None = None
        node.subscribe(ALL_HERE, self._all_here)

    def _all_here(self, context: Context) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(context.data)

    async def subscribed(self, count: int) -> dict[str, Any]:
        """Wait until so many subscribe."""
        await self.node.wait_subscribed(FEED, count, timeout=WAIT)
        return {}

    async def measure(self, data: str, warm_up: int, rounds: int, frames: int) -> dict[str, Any]:
        """Publish so often in each round, and wait until all have come.

        :param data: of each message, in hex.
        :returns: of each round the time until the kernel has everything, the turn of the loop that
            it ends with included, and that until all have come.
        """
        content = bytes.fromhex(data)
        sending, taken = [], []
        for number in range(-warm_up, rounds):
            sent, arrived = await self._round(content, frames)
            if number >= 0:
                sending.append(sent)
                taken.append(arrived)
        return {
            "sending_ns": sending,
            "taken_ns": taken,
            "subscribers": len(self.node.subscribers(FEED)),
        }

    async def _round(self, data: bytes, frames: int) -> tuple[int, int]:
        publish = self.node.publish
        clock = time.perf_counter_ns
        subscribers = len(self.node.subscribers(FEED))
        self._arrived = asyncio.get_running_loop().create_future()
        reached = 0
        began = clock()
        for number in range(frames):
            reached += publish(FEED, data)
            if number % A_TURN == A_TURN - 1:
                await asyncio.sleep(0)
        # What the node sends at the end of a turn goes before what is called in the next.
        await asyncio.sleep(0)
        sent = clock()
        if frames == 1 and any(peer.queued for peer in self.node.peers.values()):
            raise RuntimeError("the kernel has not taken all of it: it is not only the sending")
        word = await asyncio.wait_for(self._arrived, WAIT)
        arrived = clock()
        if word != b"right" or reached != frames * subscribers:
            raise RuntimeError(f"{reached} of {frames * subscribers} were sent; {word!r}")
        return sent - began, arrived - began


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    open_many_files()
    async with Node("publisher", registry=given.registry, **SETTINGS) as node:
        publisher = Publisher(node)
        await serve(
            {"subscribed": publisher.subscribed, "measure": publisher.measure}, port=node.port
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", required=True)
    parser.add_argument("--cpu", type=int)
    run(main(parser.parse_args()))
