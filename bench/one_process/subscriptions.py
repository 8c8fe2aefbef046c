"""A node that subscribes to more and more channels, and the memory that it has for them."""

from __future__ import annotations

import argparse
from typing import Any

from bench.two_process.commands import pin, run, serve
from bench.two_process.memory import memory
from domi_fast import Context, Node
from domi_fast.channels import USER_FIRST, USER_LAST

MOST = USER_LAST - USER_FIRST + 1


def handler(context: Context) -> None:
    raise RuntimeError("nobody sends to this node")


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    async with Node("many", registry="memory://subscriptions", channel_limit=MOST) as node:
        subscribed = 0

        async def grow(to: int) -> dict[str, Any]:
            """Subscribe to that many channels in all, by one handler; the memory after that."""
            nonlocal subscribed
            for number in range(subscribed, to):
                node.subscribe(USER_FIRST + number, handler)
            subscribed = to
            if node.subscribers(USER_FIRST + to - 1) != [node.id]:
                raise RuntimeError(f"the last of {to} channels has no subscriber")
            return await memory()

        await serve({"grow": grow})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", type=int)
    run(main(parser.parse_args()))
