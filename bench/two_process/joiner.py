"""A node that comes and goes: what it takes it to be connected with all of a cluster."""

from __future__ import annotations

import argparse
import time
from typing import Any

from bench.two_process.commands import CALM, open_many_files, pin, run, serve
from domi_fast import Node

WAIT = 60.0


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    open_many_files()

    async def join(peers: int) -> dict[str, Any]:
        """From nothing until all of them are peers."""
        node = Node("joiner", registry=given.registry, start_timeout=WAIT, **CALM)
        began = time.perf_counter_ns()
        try:
            await node.start()
            await node.wait_peers(peers, WAIT)
            return {"taken_ns": time.perf_counter_ns() - began}
        finally:
            await node.close()

    await serve({"join": join})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", required=True)
    parser.add_argument("--cpu", type=int)
    run(main(parser.parse_args()))
