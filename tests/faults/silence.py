"""Peers whose packets are dropped: when they are lost, and when they are lost for nothing.

Runs in a network namespace of its own, whose firewall it sets, and prints what it saw as JSON:

    unshare -n sh -c 'ip link set lo up && exec python -m tests.faults.silence cut --pairs 50'
    unshare -n sh -c 'ip link set lo up && exec python -m tests.faults.silence noise --seconds 600'
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import time
from collections import Counter
from typing import Any

from domi_fast import DomiError, Node
from domi_fast.events import Event, Events
from tests.support import session

LAN: dict[str, Any] = {"heartbeat_interval": 0.5, "heartbeat_timeout": 2.5}
DETECTORS: dict[str, dict[str, Any]] = {
    "timeout-2.5": LAN,
    "phi-8-2.5": {**LAN, "phi_threshold": 8},
    "timeout-6": {"heartbeat_interval": 1.0, "heartbeat_timeout": 6.0},
}
QUICK = list(DETECTORS)[:2]


def firewall(*rules: str) -> None:
    text = "\n".join(["*filter", *rules, "COMMIT", ""])
    subprocess.run(["iptables-restore", "-w", "--noflush"], input=text, text=True, check=True)


@contextlib.asynccontextmanager
async def pair(name: str, settings: dict[str, Any]) -> Any:
    url = f"memory://{name}"
    async with (
        Node("a", registry=url, **settings) as a,
        Node("b", registry=url, **settings) as b,
    ):
        b.subscribe(50, lambda ctx: ctx.reply(ctx.data))
        await a.wait_subscribed(50, timeout=10)
        yield a, b


def ports_between(a: Node, b: Node) -> tuple[int, int]:
    with socket.socket(fileno=os.dup(session(a, b.id).descriptor)) as sock:
        return sock.getsockname()[1], sock.getpeername()[1]


async def of_both(kind: str, both: list[Events], patience: float) -> list[Event]:
    """The next event of this kind that each of them has."""

    async def next_of(events: Events) -> Event:
        async for event in events:
            if event.kind == kind:
                return event
        raise AssertionError(f"the node was closed, and nobody has {kind}")

    return await asyncio.wait_for(asyncio.gather(*map(next_of, both)), patience)


async def cut(name: str, detector: str, patience: float) -> list[float]:
    """Seconds from the cut until each side has lost the other; then they find each other again."""
    async with pair(name, DETECTORS[detector]) as (a, b):
        both = [a.events(), b.events()]
        await asyncio.sleep(random.uniform(0.0, 2.0))
        one, other = ports_between(a, b)
        begun = time.monotonic()
        firewall(
            f"-A INPUT -p tcp --sport {one} --dport {other} -j DROP",
            f"-A INPUT -p tcp --sport {other} --dport {one} -j DROP",
        )
        gone = await of_both("left", both, patience)
        first, second = sorted(gone, key=lambda event: event.at)
        assert "silent" in first.reason, gone
        # Who was first dials at once, which may be what the other hears next of it.
        assert "silent" in second.reason or second.reason == "replaced by a newer session", gone
        await of_both("joined", both, patience)
        assert await a.request(50, b"again", timeout=5) == b"again"
        return [event.at - begun for event in gone]


async def cut_all(pairs: int, patience: float) -> dict[str, Any]:
    detectors = [QUICK[number % len(QUICK)] for number in range(pairs)]
    took = await asyncio.gather(
        *[cut(f"pair{number}", which, patience) for number, which in enumerate(detectors)]
    )
    report: dict[str, Any] = {}
    for detector in QUICK:
        seconds = [
            max(both) for which, both in zip(detectors, took, strict=True) if which == detector
        ]
        report[detector] = {
            "lost": len(seconds),
            "median": round(statistics.median(seconds), 3),
            "longest": round(max(seconds), 3),
        }
    return report


async def noise(name: str, detector: str, seconds: float, lost: Counter[str]) -> Counter[str]:
    """How requests ended meanwhile; who was lost is added to the other counter."""
    outcomes: Counter[str] = Counter()
    async with pair(name, DETECTORS[detector]) as (a, b):

        async def watch(events: Events) -> None:
            async for event in events:
                lost[detector] += event.kind == "left"

        watching = [asyncio.ensure_future(watch(node.events())) for node in (a, b)]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                await a.request(50, b"x", timeout=30)
                outcomes["answer"] += 1
            except DomiError as error:
                outcomes[type(error).__name__] += 1
            await asyncio.sleep(1.0)
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
    return outcomes


async def noise_for_all(pairs: int, seconds: float, share: float) -> dict[str, Any]:
    lost: Counter[str] = Counter(dict.fromkeys(DETECTORS, 0))
    outcomes: Counter[str] = Counter()

    async def drop() -> None:
        await asyncio.sleep(2.0)
        firewall(f"-A INPUT -m statistic --mode random --probability {share} -j DROP")
        await asyncio.sleep(seconds)
        firewall("-F INPUT")

    dropping = asyncio.ensure_future(drop())
    for found in await asyncio.gather(
        *[
            noise(f"{detector}.{number}", detector, seconds + 2, lost)
            for detector in DETECTORS
            for number in range(pairs)
        ]
    ):
        outcomes += found
    await dropping
    return {"false alarms": dict(lost), "requests": dict(outcomes), "pairs": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["cut", "noise"])
    parser.add_argument("--pairs", type=int, default=4, help="of nodes, for each detector of noise")
    parser.add_argument("--seconds", type=float, default=600.0, help="of noise")
    parser.add_argument("--share", type=float, default=0.1, help="of packets that noise drops")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds for each step of cut")
    given = parser.parse_args()
    report = (
        cut_all(given.pairs, given.patience)
        if given.what == "cut"
        else noise_for_all(given.pairs, given.seconds, given.share)
    )
    print(json.dumps(asyncio.run(report), indent=2))


if __name__ == "__main__":
    main()
