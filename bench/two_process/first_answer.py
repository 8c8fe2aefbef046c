"""A program that starts, asks once and says so: the shortest way to a first answer."""

from __future__ import annotations

import sys

import uvloop

from bench.two_process.channels import PING, PING_DATA
from domi_fast import Node


async def main(registry: str) -> None:
    async with Node("newcomer", registry=registry) as node:
        answer = await node.request(PING, PING_DATA)
        print("right" if answer == PING_DATA else "wrong", flush=True)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
