"""One server of the demonstration: a handler for each of its channels.

Started by examples/demo/main.py, three times: python examples/demo/main.py
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import threading
import time

import uvloop

from domi_fast import AlreadyReplied, Context, DomiError, Master, Node
from examples.demo.common import END, Channel, Payloads, number_of, to_json

WRONG_EVERY = 7  # --break answer


class Tally:
    """What came on one channel: how much, in order, intact?"""

    def __init__(self, node: Node, payloads: Payloads, pause: float = 0.0) -> None:
        self.node = node
        self.payloads = payloads
        self.pause = pause
        self.clear()

    def clear(self) -> None:
        self.count = 0
        self.sum = 0
        self.last = -1
        self.disordered = 0
        self.damaged = 0

    def __call__(self, ctx: Context) -> None:
        data = ctx.data
        if data == END:
            self.report(ctx)
            return
        number = number_of(data)
        self.count += 1
        self.sum += number
        self.disordered += number <= self.last
        self.damaged += data[:32] != self.payloads[number]
        self.last = number
        if self.pause:
            time.sleep(self.pause)

    def report(self, ctx: Context) -> None:
        facts = to_json(
            server=self.node.id,
            channel=ctx.channel,
            count=self.count,
            sum=self.sum,
            disordered=self.disordered,
            damaged=self.damaged,
        )
        self.clear()
        self.node.notify(Channel.REPORT, facts, to=ctx.sender)


class Server:
    """The handlers. ``broken`` is how this server misbehaves, for the self-test, or empty."""

    def __init__(self, node: Node, stage: int, seed: int, broken: str) -> None:
        self.node = node
        self.broken = broken
        self.echoed = 0
        payloads = Payloads(seed)
        subscribe = node.subscribe
        subscribe(Channel.ECHO, self.echo)
        subscribe(Channel.ECHO_LATER, self.echo_later)
        subscribe(Channel.ECHO_THREAD, self.echo_thread)
        subscribe(Channel.INFO, self.info)
        subscribe(Channel.NOTIFIED, Tally(node, payloads))
        subscribe(Channel.PUBLISHED, Tally(node, payloads))
        subscribe(Channel.BULK, Tally(node, payloads, pause=0.001))
        subscribe(Channel.STREAM, self.stream)
        subscribe(Channel.REFUSE, self.refuse)
        subscribe(Channel.RAISE, self.fail)
        subscribe(Channel.TWICE, self.twice)
        subscribe(Channel.SLOW, self.slow)
        subscribe(Channel.DEADLINE, self.deadline)
        subscribe(Channel.LEAVE, self.leave)
        subscribe(stage, self.stage)

    def answer(self, data: bytes) -> bytes:
        return self.node.id.to_bytes(2, "little") + data[::-1]

    def echo(self, ctx: Context) -> None:
        if self.broken:
            self.misbehave(ctx)
        else:
            ctx.reply(self.answer(ctx.data))

    async def echo_later(self, ctx: Context) -> None:
        await asyncio.sleep(0)
        ctx.reply(self.answer(ctx.data))

    def echo_thread(self, ctx: Context) -> None:
        # In earnest one would keep the thread; a reply may come from any.
        threading.Thread(target=ctx.reply, args=(self.answer(ctx.data),)).start()

    def info(self, ctx: Context) -> None:
        config = self.node.config
        facts = {
            "name": config.name,
            "pid": os.getpid(),
            "port": self.node.port,
            "path": config.unix_path,
        }
        if ctx.data:
            facts["subscribed"] = bool(self.node.subscribers(json.loads(ctx.data)["channel"]))
        ctx.reply(to_json(**facts))

    async def stream(self, ctx: Context) -> None:
        wanted, payloads = json.loads(ctx.data), Payloads(0)
        for number in range(wanted):
            if number % 256 == 0:
                await self.node.drained(ctx.sender)
                await asyncio.sleep(0)
            self.node.notify(Channel.FEED, payloads[number], to=ctx.sender)

    def refuse(self, ctx: Context) -> None:
        ctx.error("not today")

    def fail(self, ctx: Context) -> None:
        raise LookupError(ctx.data.decode())

    def twice(self, ctx: Context) -> None:
        ctx.reply(b"once")
        try:
            ctx.reply(b"twice")
        except AlreadyReplied as error:
            self.node.notify(Channel.REPORT, type(error).__name__.encode(), to=ctx.sender)

    async def slow(self, ctx: Context) -> None:
        await asyncio.sleep(0.5)
        with contextlib.suppress(DomiError):  # the client may have gone
            ctx.reply(b"too late")

    def deadline(self, ctx: Context) -> None:
        left = None if ctx.deadline is None else ctx.deadline - time.monotonic()
        ctx.reply(json.dumps(left).encode())

    def leave(self, ctx: Context) -> None:
        self.node.unsubscribe(Channel.LEAVE)

    def stage(self, ctx: Context) -> None:
        # Every stage leaves its mark: the client sees that each was there, in order.
        ctx.next(ctx.data + bytes((ctx.channel - Channel.STAGE_1 + 1,)))

    def misbehave(self, ctx: Context) -> None:
        self.echoed += 1
        wrong = self.echoed % WRONG_EVERY == 0
        if wrong and self.broken == "crash":
            print("the server crashes, as --break crash asks", file=sys.stderr, flush=True)
            os._exit(70)
        if wrong and self.broken == "hang":
            time.sleep(3600)
        ctx.reply(self.answer(ctx.data) if not wrong else self.answer(ctx.data[:-5] + b"wrong"))


class Leash:
    """Ends the server when the program that started it has gone: its end of a pipe closes then."""

    def __init__(self, master: Master) -> None:
        self.master = master

    async def start(self) -> None:
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), self.master.stop)

    async def close(self) -> None:
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--registry", required=True)
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--unix-path")
    parser.add_argument("--broken", default="")
    options = parser.parse_args()

    node = Node(options.name, registry=options.registry, unix_path=options.unix_path)
    Server(node, options.stage, options.seed, options.broken)
    master = Master()
    master.add(Leash(master))
    master.add(node)
    uvloop.run(master.wait())


if __name__ == "__main__":
    main()
