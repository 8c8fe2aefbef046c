"""The cluster that the command is tried on: a process of four nodes. Its argument is the registry.

alpha has admin pages, beta has them behind a token, and the two named twin have none. Whoever asks
channel NEWS is told at once; what comes then is three messages on channel 60, once somebody
subscribes to it.
"""

from __future__ import annotations

import asyncio
import functools
import json
import sys

import uvloop

from domi_fast import Context, Node

ECHO, FAIL, SLOW, BYTES, KEEP, KEPT, NEWS, NOBODY = range(50, 58)
NEWS_CHANNEL = 60
TOKEN = "the-token-of-the-node-beta"
RAW = b"\xff\x00\x1b[31m"
MESSAGES = [b"one", RAW, b"two\nlines"]


async def main(url: str) -> None:
    alpha, beta, *_ = nodes = [
        Node(
            "alpha",
            version="1.5",
            registry=url,
            http_port=0,
            unix_path=sys.argv[2],
            drain_timeout=0.1,
        ),
        Node("beta", registry=url, http_port=0, admin_token=TOKEN),
        *(Node("twin", registry=url) for _ in range(2)),
    ]
    kept: list[str] = []

    @alpha.subscribe(ECHO)
    @beta.subscribe(ECHO)
    def echo(ctx: Context) -> None:
        ctx.reply(ctx.data)

    @alpha.subscribe(FAIL)
    def fail(ctx: Context) -> None:
        raise LookupError("of this test\x1b[31m")

    @alpha.subscribe(SLOW)
    async def slow(ctx: Context) -> None:
        await asyncio.Event().wait()

    @alpha.subscribe(BYTES)
    def send_bytes(ctx: Context) -> None:
        ctx.reply(RAW)

    def keep(ctx: Context, name: str) -> None:
        kept.append(f"{name} {ctx.data.hex()}")

    for node in (alpha, beta):
        node.subscribe(KEEP, functools.partial(keep, name=node.config.name))

    @alpha.subscribe(KEPT)
    def say_kept(ctx: Context) -> None:
        ctx.reply(json.dumps(kept).encode())
        kept.clear()

    @alpha.subscribe(NEWS)
    async def send_news(ctx: Context) -> None:
        await alpha.wait_subscribed(NEWS_CHANNEL)
        for data in MESSAGES:
            alpha.publish(NEWS_CHANNEL, data)
        ctx.reply(b"sent")

    for node in nodes:
        await node.start()
    await alpha.wait_subscribed(ECHO, 2)
    print(json.dumps([[node.id, node.port, node.http_port] for node in nodes]), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await asyncio.gather(*(node.close() for node in nodes))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
