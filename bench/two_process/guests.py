"""Opens sessions with a node and leaves them idle: what they cost is the node's affair."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from bench.two_process.commands import CALM, open_many_files, pin, run, serve
from domi_fast import Client, connect


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    most = open_many_files()
    guests: list[Client] = []

    async def open_more(count: int) -> dict[str, Any]:
        # A few at a time: a listener's backlog is finite.
        for first in range(0, count, 20):
            some = range(first, min(first + 20, count))
            guests.extend(await asyncio.gather(*[connect(given.url, **CALM) for _ in some]))
        return {"open": sum(guest.connected for guest in guests)}

    try:
        await serve({"open": open_more}, files=most)
    finally:
        await asyncio.gather(*[guest.close() for guest in guests])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--cpu", type=int)
    run(main(parser.parse_args()))
