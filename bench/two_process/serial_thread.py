"""A node whose serial thread can be held up, while the node's other handlers answer on its loop."""

from __future__ import annotations

import argparse
import time

from bench.two_process.channels import HOLD, HOLD_SECONDS
from bench.two_process.commands import pin, run, serve
from bench.two_process.server import Server
from domi_fast import Context, Node, Serial


def wait() -> None:
    time.sleep(HOLD_SECONDS)


def compute() -> None:
    number = 0
    end = time.perf_counter() + HOLD_SECONDS
    while time.perf_counter() < end:
        number += 1


WAYS = {b"wait": wait, b"compute": compute}


def hold(context: Context) -> None:
    WAYS[context.data]()
    context.reply(context.data)


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    node = Node("server", registry=given.registry)
    Server(node)
    serial = Serial(node, thread=True)
    serial.subscribe(HOLD, hold)
    async with node, serial:
        await serve({}, id=node.id)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", required=True)
    parser.add_argument("--cpu", type=int)
    run(main(parser.parse_args()))
