"""Sends texts through the pipeline, and prints what comes out of it.

In one terminal:    python examples/pipeline/stages.py
In another:         python examples/pipeline/send.py "  some words "  "and a few more words"
"""

import argparse
import asyncio

from domi_fast import Node

STAGES = [60, 61, 62]  # strip, title, count
RESULT = 63


async def main() -> None:
    parser = argparse.ArgumentParser(
        description="Sends texts through the pipeline, and prints what comes out of it.",
        epilog="Before, in another terminal: python examples/pipeline/stages.py",
    )
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="what to send")
    texts = parser.parse_args().texts

    node = Node("sender")
    # Subscribed before the start, so that whoever has this node for a peer knows of it.
    async with node.watch_channel(RESULT) as results, node:
        print("waiting for the stages ...", flush=True)
        for stage in STAGES:
            await node.wait_subscribed(stage)
        for text in texts:
            # The sender names all stages at the start, and is itself the last of them.
            node.ventilator([*STAGES, RESULT], text.encode())
        for _ in texts:
            ctx = await anext(results)
            print(ctx.data.decode())


if __name__ == "__main__":
    asyncio.run(main())
