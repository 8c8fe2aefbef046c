"""A process that runs nodes for the tests: commands on stdin, results on stdout, JSON lines.

A command is ``[name, arguments]``, its result ``["ok", result]`` or ``["error", text]``, in the
order of the commands. Started by ``tests.support.Worker``; the loop's kind is its argument.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import resource
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import uvloop

from domi_fast import Context, DomiError, Node, NoSubscriber

ECHO = 50
STALL = 51
ABSORB = 52
WORK = 53


class Nodes:
    """The commands. Each is a coroutine method named as the command."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.got: Counter[tuple[int, int, str]] = Counter()
        self.kept: list[Context] = []
        self.task: asyncio.Task[Any] | None = None
        self.lost: list[tuple[int, int, float, str]] = []
        self.outcomes: Counter[str] = Counter()
        self.worked = 0
        self.hoarded: list[int] = []

    def node(self, machine: int) -> Any:
        return next(node for node in self.nodes if node.id == machine)

    # -------------------------------------------------------------------------------------- life

    async def start(self, count: int = 1, name: str = "worker", **settings: Any) -> list[int]:
        """Start so many nodes at once; their machine ids."""
        new = [Node(f"{name}{number}", **settings) for number in range(count)]
        for node in new:
            node.subscribe(ECHO, lambda ctx: ctx.reply(ctx.data))
            node.subscribe(STALL, self.stall)
            node.subscribe(ABSORB, lambda ctx: None)
            node.subscribe(WORK, self.work)
        self.nodes += new
        await asyncio.gather(*(node.start() for node in new))
        return [node.id for node in new]

    async def close(self) -> None:
        await asyncio.gather(*(node.close() for node in self.nodes))
        self.nodes.clear()

    def stall(self, ctx: Context) -> None:
        """Hold up the whole process for so many seconds."""
        seconds = float(ctx.data)
        time.sleep(seconds)
        if ctx.is_request:
            ctx.reply(b"")

    async def work(self, ctx: Context) -> None:
        await asyncio.sleep(0.001)
        self.worked += 1
        ctx.reply(ctx.data)

    async def handled(self) -> int:
        """Messages that ``work`` has answered."""
        return self.worked

    async def ids(self) -> list[int]:
        return [node.id for node in self.nodes]

    async def ports(self) -> list[int]:
        return [node.port for node in self.nodes]

    async def wait_ids(self, different_from: list[int], timeout: float = 10.0) -> list[int]:
        """The ids, once none of them is one of these."""
        await until(lambda: not {n.id for n in self.nodes} & set(different_from), timeout)
        return [node.id for node in self.nodes]

    # ---------------------------------------------------------------------------------- the mesh

    async def wait_peers(self, count: int, timeout: float = 10.0) -> float:
        """Wait until every node has exactly so many peers; the time when that was so."""
        await asyncio.gather(*(node.wait_peers(count, timeout) for node in self.nodes))
        return time.monotonic()

    async def sessions(self) -> dict[str, Any]:
        """By node: what is connected, at the level of sockets and at that of peers."""
        return {
            str(node.id): {
                "up": sorted(s.peer for s in node._router.sessions()),
                "all": sorted(s.peer for s in node._mesh._sessions if not s.closed),
                "peers": sorted(node.peers),
                "addresses": {str(m): peer.address for m, peer in node.peers.items()},
            }
            for node in self.nodes
        }

    async def opened(self) -> int:
        """Sessions that this process has lost so far, over all nodes."""
        return len(self.lost)

    async def watch_losses(self) -> None:
        """Note when each node loses a peer, and why."""
        for node in self.nodes:
            mesh: Any = node._mesh
            mesh.lost = self.noting(node, mesh.lost)

    def noting(self, node: Node, inner: Callable[[Any, bool], None]) -> Any:
        def lost(session: Any, was_up: bool) -> None:
            if was_up:
                self.lost.append((node.id, session.peer, time.monotonic(), session.reason))
            inner(session, was_up)

        return lost

    async def losses(self) -> list[tuple[int, int, float, str]]:
        return self.lost

    async def cut(self, count: int, seed: int) -> int:
        """Cut sessions at random, as a broken network does: their sockets, by the descriptor."""
        chance = random.Random(seed)
        alive = [s for node in self.nodes for s in node._router.sessions() if s.descriptor >= 0]
        for session in chance.sample(alive, min(count, len(alive))):
            sock = socket.socket(fileno=os.dup(session.descriptor))
            try:
                if chance.random() < 0.5:
                    sock.shutdown(socket.SHUT_RDWR)
                else:
                    sock.shutdown(chance.choice((socket.SHUT_RD, socket.SHUT_WR)))
            except OSError:
                pass  # the other end was cut a moment ago
            finally:
                sock.close()
        return min(count, len(alive))

    # ------------------------------------------------------------------------------------- verbs

    async def subscribe(self, machine: int, channel: int) -> float:
        """Count what arrives there; the time."""
        self.node(machine).subscribe(channel, self.counting(machine))
        return time.monotonic()

    def counting(self, machine: int) -> Callable[[Context], None]:
        def handler(ctx: Context) -> None:
            self.got[machine, ctx.sender, ctx.data.decode()] += 1
            if ctx.is_request:
                ctx.reply(b"%d" % machine)

        return handler

    async def use(self, channel: int, timeout: float = 5.0) -> float:
        """From every node one request there, as soon as it can be sent; when the last is done."""

        async def ask(node: Node) -> None:
            await node.wait_subscribed(channel, 1, timeout)
            await node.request(channel, b"use", timeout)

        await asyncio.gather(*(ask(node) for node in self.nodes))
        return time.monotonic()

    async def wait_subscribed(self, channel: int, count: int, timeout: float = 5.0) -> None:
        await asyncio.gather(*(n.wait_subscribed(channel, count, timeout) for n in self.nodes))

    async def publish(self, channel: int, text: str) -> list[int]:
        return [node.publish(channel, f"{text} {node.id}".encode()) for node in self.nodes]

    async def received(self) -> list[tuple[int, int, str, int]]:
        return [(*key, count) for key, count in self.got.items()]

    async def request(self, machine: int, channel: int, text: str, timeout: float = 5.0) -> str:
        return (await self.nodes[0].request(channel, text.encode(), timeout, to=machine)).decode()

    async def notify(self, machine: int, channel: int, text: str) -> None:
        self.nodes[0].notify(channel, text.encode(), to=machine)

    # -------------------------------------------------------------------------------------- load

    async def load(self, concurrency: int, channel: int = WORK) -> None:
        """Begin to ask without a pause, until ``finish``."""
        self.stop = asyncio.Event()
        self.task = asyncio.ensure_future(self.ask_on(concurrency, channel))

    async def ask_on(self, concurrency: int, channel: int) -> dict[str, Any]:
        outcomes = self.outcomes = Counter()
        lost_at: list[float] = []
        asked = 0
        node = self.nodes[0]

        async def ask() -> None:
            nonlocal asked
            while not self.stop.is_set():
                asked += 1
                data = b"%d" % asked
                try:
                    answer = await node.request(channel, data, 5.0)
                    outcomes["answer" if answer == data else "wrong"] += 1
                except NoSubscriber:
                    outcomes["NoSubscriber"] += 1
                    await asyncio.sleep(0.01)
                except DomiError as error:
                    outcomes[type(error).__name__] += 1
                    lost_at.append(time.monotonic())

        await asyncio.gather(*(ask() for _ in range(concurrency)))
        return {
            "asked": asked,
            "outcomes": outcomes,
            "lost_at": lost_at,
            "in_flight": node.counters()["in_flight"],
        }

    async def wait_answers(self, count: int, timeout: float = 20.0) -> None:
        """Wait until so many more requests of the load have been answered."""
        wanted = self.outcomes["answer"] + count
        await until(lambda: self.outcomes["answer"] >= wanted, timeout)

    async def leave_channel(self, channel: int) -> None:
        for node in self.nodes:
            node.unsubscribe(channel)

    async def finish(self) -> Any:
        self.stop.set()
        assert self.task is not None
        return await self.task

    async def flood(self, machine: int, channel: int = ABSORB, size: int = 8) -> None:
        """Send as much as the receiver takes, until this process ends."""
        node = self.nodes[0]
        data = bytes(size)

        async def send() -> None:
            while True:
                try:
                    for _ in range(5000):
                        node.notify(channel, data, to=machine)
                except DomiError:
                    await node.drained(machine)
                await asyncio.sleep(0)

        self.task = asyncio.ensure_future(send())

    # --------------------------------------------------------------------------------- one-offs

    async def burst_and_die(self, machine: int, channel: int, size: int, reset: bool) -> None:
        """Send so many bytes and be gone, with bytes of the receiver unread: RST after the data."""
        node = self.nodes[0]
        session = node._router.session(machine)
        if reset:
            sock = socket.socket(fileno=os.dup(session.descriptor))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        node.notify(channel, bytes(size), to=machine)
        os.kill(os.getpid(), 9)

    async def hoard(self, most: int) -> int:
        """Take all the descriptors that this process may have, which are so many from now on."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, soft), hard))
        with contextlib.suppress(OSError):
            while True:
                self.hoarded.append(os.open(os.devnull, os.O_RDONLY))
        return len(self.hoarded)

    async def let_go(self) -> float:
        """Give them back; the time when that was."""
        while self.hoarded:
            os.close(self.hoarded.pop())
        return time.monotonic()

    async def processor_time(self) -> float:
        return time.process_time()

    async def fork_and_stay(self) -> int:
        """Fork a child that does nothing for a while; its process id."""
        child = os.fork()
        if child == 0:
            null = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(null, number)
            time.sleep(60)
            os._exit(0)
        return child

    async def memory(self) -> int:
        """Resident bytes."""
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    async def guests(self) -> int:
        return len(self.nodes[0]._router.sessions())

    async def counters(self) -> list[dict[str, int]]:
        return [node.counters() for node in self.nodes]


async def until(condition: Callable[[], bool], timeout: float) -> None:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        await asyncio.sleep(0.005)


async def obey(commands: object) -> None:
    """Do what the test says, by the coroutine methods of this object, until the test is over."""
    loop = asyncio.get_running_loop()
    lines: asyncio.Queue[bytes] = asyncio.Queue()
    rest = b""

    def readable() -> None:
        nonlocal rest
        data = os.read(0, 1 << 16)
        if not data:
            os._exit(0)  # the test is over
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            lines.put_nowait(line)

    os.set_blocking(0, False)
    loop.add_reader(0, readable)
    while True:
        command, arguments = json.loads(await lines.get())
        try:
            result = ["ok", await getattr(commands, command)(**arguments)]
        except Exception as error:
            result = ["error", f"{type(error).__name__}: {error}"]
        os.write(1, json.dumps(result).encode() + b"\n")


def run(commands: type) -> None:
    """The program: its argument is the loop's kind."""

    async def main() -> None:
        await obey(commands())

    if sys.argv[1] == "uvloop":
        uvloop.run(main())
    else:
        asyncio.run(main())


if __name__ == "__main__":
    run(Nodes)
