"""A node with a gateway, as a program would have it, that says how it is."""

from __future__ import annotations

import argparse
import gc
import json
import logging
from typing import Any

from bench.two_process.commands import open_many_files, pin, run, serve
from bench.two_process.memory import resident
from domi_fast import Node
from domi_fast.gateway import Gateway


async def main(given: argparse.Namespace) -> None:
    pin(given.cpu)
    open_many_files()
    logging.getLogger("domi_fast").setLevel(logging.CRITICAL)  # it tells of clients that are cut
    settings = json.loads(given.settings)

    async def state() -> dict[str, Any]:
        gc.collect()
        return {
            "clients": gateway.clients,
            "resident": resident(),
            "cut": gateway.node.counters().get("clients_slow", 0),
        }

    async with (
        Node("gate", registry=given.registry) as node,
        Gateway(node, service="room", **settings) as gateway,
    ):
        await serve({"state": state}, port=gateway.port)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", required=True)
    parser.add_argument("--cpu", type=int)
    parser.add_argument("--settings", default="{}", help="of the gateway, but for the defaults")
    run(main(parser.parse_args()))
