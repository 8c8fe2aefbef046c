"""A process that leads whenever it can, for tests.faults.test_leadership to kill or to stop.

Arguments: the registry URL, ``elect`` or ``lock``, seconds of the lease, the log, the loop's kind.
Every few milliseconds while it leads it appends to the log that it still believes to: the time at
which it began to ask, and what it was told. All times are CLOCK_MONOTONIC, which the processes of a
machine share. It ends with its standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time

import uvloop

from domi_fast import Leadership, LeadershipLost, Node

NAME = "post"
BEAT = 0.005


def record(out: int, event: str, leadership: Leadership, **facts: object) -> None:
    facts |= {"event": event, "pid": os.getpid(), "token": leadership.token}
    facts.setdefault("at", time.monotonic())
    facts["valid_until"] = leadership.valid_until
    # One write with O_APPEND: lines of several processes do not mix.
    os.write(out, json.dumps(facts).encode() + b"\n")


async def lead(out: int, leadership: Leadership) -> None:
    record(out, "began", leadership)
    try:
        while True:
            at = time.monotonic()
            leadership.check()
            record(out, "believed", leadership, at=at)
            await asyncio.sleep(BEAT)
    finally:
        at = time.monotonic()
        record(out, "lost", leadership, at=at, refused=is_over(leadership))


def is_over(leadership: Leadership) -> bool:
    try:
        leadership.check()
    except LeadershipLost:
        return True
    return False


async def contend(node: Node, kind: str, out: int) -> None:
    while True:
        with contextlib.suppress(LeadershipLost):
            async with getattr(node.cluster, kind)(NAME) as leadership:
                await lead(out, leadership)


async def main(url: str, kind: str, lease: str, log: str, loop: str) -> None:
    asyncio.get_running_loop().add_reader(0, lambda: os._exit(0))
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    # Those that were killed are registered for a while, and need not be waited for.
    async with Node("contender", registry=url, lease_ttl=float(lease), start_timeout=0.0) as node:
        await contend(node, kind, out)


if __name__ == "__main__":
    (uvloop.run if sys.argv[-1] == "uvloop" else asyncio.run)(main(*sys.argv[1:]))  # type: ignore[operator]
