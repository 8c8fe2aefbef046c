"""A process that holds names, for tests.faults.test_names to kill or to stop.

Arguments: the registry URL, seconds of the lease, how many names, the loop's kind. It writes a line
once it holds them, and one for each that it loses; it ends with its standard input.
"""

from __future__ import annotations

import asyncio
import os
import sys

import uvloop

from domi_fast import Name, Node


async def watch(name: Name) -> None:
    await name.lost.wait()
    print(f"lost {name.name}", flush=True)


async def main(url: str, lease: str, count: str, loop: str) -> None:
    asyncio.get_running_loop().add_reader(0, lambda: os._exit(0))
    async with Node("holder", registry=url, lease_ttl=float(lease), start_timeout=0.0) as node:
        names = node.cluster.names("held")
        found = [await names.claim(f"n{number}", b"v") for number in range(int(count))]
        print("held", flush=True)
        await asyncio.gather(*(watch(name) for name in found))
        await asyncio.Event().wait()


if __name__ == "__main__":
    (uvloop.run if sys.argv[-1] == "uvloop" else asyncio.run)(main(*sys.argv[1:]))  # type: ignore[operator]
