"""Nodes that are members of a cluster, and do nothing but that."""

from __future__ import annotations

import argparse
import os
from typing import Any

from bench.two_process.channels import QUIET
from bench.two_process.commands import CALM, open_many_files, pin, run, serve
from domi_fast import Context, Node

WAIT = 300.0
# Hundreds in one process: what each does once a second by default would keep it busy.
SETTINGS: dict[str, Any] = {
    **CALM,
    "lease_ttl": 60.0,
    "memory_interval": 60.0,
    "start_timeout": WAIT,
}


def never(context: Context) -> None:
    raise RuntimeError("nobody sends to an idle node")


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    open_many_files()
    nodes: list[Node] = []

    async def start_more(count: int) -> dict[str, Any]:
        """So many more, one after the other."""
        for _ in range(count):
            node = Node(f"idle-{len(nodes)}", registry=given.registry, **SETTINGS)
            node.subscribe(QUIET, never)
            nodes.append(node)
            await node.start()
        return {}

    async def peers(count: int) -> dict[str, Any]:
        """Wait until each of them has so many peers, and no more."""
        for node in nodes:
            await node.wait_peers(count, WAIT)
        return {}

    await serve({"start": start_more, "peers": peers})
    # To take leave of each other, tens of thousands of sessions one by one, would take long.
    os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", required=True)
    parser.add_argument("--cpu", type=int)
    run(main(parser.parse_args()))
