"""What valid peers say, mutated, a connection each: a node answers its own, and stays level.

A million connections in ``make soak``, some thousands otherwise. The node has a process of its own,
and so has each of those who send; who belongs there asks from this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from domi_fast import Client, Node, connect
from tests.conftest import LOOPS, SOAK
from tests.fuzz.connections import ECHO, SECRET
from tests.support import ROOT, environment

SANITIZE = os.environ.get("DOMI_SANITIZE") == "1"
COUNT = 500_000 if SOAK else 1_500
# Until the memory of the process is what it needs: everything has been seen by then.
WARM_UP = COUNT // 3
SENDERS = 3
# Bytes that the memory may grow by, however many connections come after that.
LEVEL = 1 << 20
# Seconds within which each question is answered, and the nodes say how they are.
PATIENCE = 20.0
# Looks at the nodes in a row: a dial under way is met by about one in twenty.
AT_REST = 20


class Program:
    """A part of tests/fuzz/connections.py, which says JSON lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, *arguments: object) -> Program:
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.fuzz.connections",
                *map(str, arguments),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                cwd=ROOT,
                env=environment(),
            )
        )

    async def says(self, timeout: float | None = PATIENCE) -> Any:
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), timeout)
        assert line, f"it ended: {await self.process.wait()}"
        return json.loads(line)

    async def look(self) -> dict[str, Any]:
        """How the nodes are."""
        assert self.process.returncode is None
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        found: dict[str, Any] = await self.says()
        return found

    async def end(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return await asyncio.wait_for(self.process.wait(), PATIENCE)

    async def reap(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@contextlib.asynccontextmanager
async def program(*arguments: object) -> AsyncIterator[Program]:
    running = await Program.start(*arguments)
    try:
        yield running
    finally:
        await running.reap()


async def send(targets: list[Any], seed: int, count: int) -> dict[str, Any]:
    """So many conversations, from several processes at once; how they ended."""
    ends: Counter[str] = Counter()
    seconds = slowest = 0.0
    async with contextlib.AsyncExitStack() as stack:
        senders = [
            await stack.enter_async_context(
                program("send", json.dumps(targets), seed + number, count // SENDERS)
            )
            for number in range(SENDERS)
        ]
        for sender in senders:
            said = await sender.says(None)
            ends.update(said["ends"])
            seconds = max(seconds, said["seconds"])
            slowest = max(slowest, said["longest"])
    return {"ends": dict(ends), "seconds": seconds, "slowest end": slowest}


class Legitimate:
    """Those who belong there, and ask without a pause."""

    def __init__(self) -> None:
        self.answered: Counter[str] = Counter()
        self.longest = 0.0
        self.tasks: list[asyncio.Task[None]] = []

    def ask(self, name: str, who: Node | Client, to: int) -> None:
        self.tasks.append(asyncio.ensure_future(self.keep_asking(name, who, to)))

    async def keep_asking(self, name: str, who: Node | Client, to: int) -> None:
        while True:
            begun = time.monotonic()
            data = b"%d" % self.answered[name]
            assert await who.request(ECHO, data, PATIENCE, to=to) == data
            self.answered[name] += 1
            self.longest = max(self.longest, time.monotonic() - begun)
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Raises what any of them has met."""
        for task in self.tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self.tasks, return_exceptions=True):
            assert isinstance(outcome, asyncio.CancelledError), repr(outcome)


async def settled(server: Program, **wanted: int) -> dict[str, Any]:
    """How the nodes are once they have so many of each."""
    end = time.monotonic() + PATIENCE
    while True:
        seen = await server.look()
        if {name: seen[name] for name in wanted} == wanted:
            return seen
        assert time.monotonic() < end, f"{wanted} were wanted: {seen}"
        await asyncio.sleep(0.05)


async def at_rest(server: Program) -> int:
    """The descriptors of the nodes between two dials of those who do not answer: the least seen."""
    seen: list[int] = [(await server.look())["descriptors"] for _ in range(AT_REST)]
    return min(seen)


async def attack(url: str, loop: str, seed: int) -> dict[str, Any]:
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(program("serve", url, loop))
        targets = await server.says()
        # Those that were claimed by hand do not answer, and are not waited for.
        common: dict[str, Any] = {"start_timeout": 0.1}
        settings = {"open": common, "guarded": {**common, "secret": SECRET}}
        peers: list[tuple[str, Node | Client, int]] = []
        entered = await stack.enter_async_context(contextlib.AsyncExitStack())
        for target in targets:
            name, address = target["name"], f"tcp://127.0.0.1:{target['port']}"
            node = Node("legitimate", registry=f"{url}-{name}", **settings[name])
            await entered.enter_async_context(node)
            guest = await connect(address, secret=settings[name].get("secret"))
            entered.push_async_callback(guest.close)
            await node.wait_subscribed(ECHO, timeout=PATIENCE)
            peers += [(f"node {name}", node, target["id"]), (f"guest {name}", guest, target["id"])]
        await settled(server, sessions=4, peers=2, guests=2)
        descriptors = await at_rest(server)
        legitimate = Legitimate()
        for peer in peers:
            legitimate.ask(*peer)
        await send(targets, seed, WARM_UP)
        before = await settled(server, sessions=4, guests=2, peers=2)
        answered = dict(legitimate.answered)
        sent = await send(targets, seed + SENDERS, COUNT - WARM_UP)
        after = await settled(server, sessions=4, guests=2, peers=2, descriptors=descriptors)
        for name, count in answered.items():
            assert legitimate.answered[name] > count > 0
        await legitimate.stop()
        await entered.aclose()
        last = await settled(server, sessions=0, guests=0, peers=0)
        assert await server.end() == 0
    return {
        **sent,
        "answered": dict(legitimate.answered),
        "longest": legitimate.longest,
        "grown": after["rss"] - before["rss"],
        "rss": after["rss"],
        "errors": last["errors"],
        "raised": last["raised"],
        "counters": last["counters"],
    }


@pytest.mark.parametrize("loop", LOOPS)
def test_mutated_conversations(
    loop: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = asyncio.run(attack(f"sqlite://{tmp_path}/registry.db", loop, 1))
    ends = seen["ends"]
    count = sum(ends.values())
    with capsys.disabled():
        print(
            f"\n{count} mutated connections on {loop}, {count / seen['seconds']:.0f} a second: "
            f"{seen}"
        )
    assert count == (COUNT - WARM_UP) // SENDERS * SENDERS
    assert seen["errors"] == []
    # Each kind of node has refused some, and taken others in.
    for counters in seen["counters"].values():
        assert counters["protocol_errors"] > COUNT // 20
        assert counters["frames_in"] > COUNT // 20
    assert seen["counters"]["guarded"]["refused_auth"] > COUNT // 100
    # A sanitizer keeps what was freed for a while.
    if not SANITIZE:
        assert seen["grown"] < LEVEL
