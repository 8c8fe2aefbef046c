"""Nodes whose registry's disk is full: what they do meanwhile, and once there is room.

Takes a folder on a small disk of its own, for how many seconds the disk is full, and whether what
the registry's log has is taken away from it before (1) or not (0); prints what it saw as JSON:

    unshare -m sh -c 'mount -t tmpfs -o size=256k none /mnt &&
        exec python -m tests.faults.full_disk /mnt 4 0'
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from domi_fast import DomiError, Node
from tests.support import until

LEASE = 1.0
# Nodes that join while it is full, one after the other; each is written of several times.
JOINS = 40


def fill(path: Path) -> None:
    """Take all the room there is."""
    with path.open("wb", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


def truncate_log(path: Path) -> None:
    db = sqlite3.connect(path, isolation_level=None, timeout=5)
    while db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
        pass  # a node was just reading
    db.close()


async def refusal(settings: dict[str, Any]) -> str:
    """What a node is told that may not join; empty if it may, and goes again."""
    try:
        async with Node("late", **settings):
            return ""
    except DomiError as error:
        return f"{type(error).__name__}: {error}"


async def main(folder: Path, seconds: float, harsh: bool) -> dict[str, Any]:
    url = f"sqlite://{folder}/registry.db"
    settings: dict[str, Any] = {"registry": url, "lease_ttl": LEASE}
    lost: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    async with Node("a", **settings) as a, Node("b", **settings) as b:
        b.subscribe(50, lambda ctx: ctx.reply(ctx.data))
        await a.wait_subscribed(50, timeout=10)
        ids = [a.id, b.id]

        async def watch(events: Any) -> None:
            async for event in events:
                if event.kind == "left" and event.name != "late":
                    lost[event.reason] += 1

        watching = [asyncio.ensure_future(watch(node.events())) for node in (a, b)]
        if harsh:
            truncate_log(folder / "registry.db")
        fill(folder / "fill")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                outcomes[(await a.request(50, b"answer", timeout=1.0)).decode()] += 1
            except DomiError as error:
                outcomes[type(error).__name__] += 1
            await asyncio.sleep(0.01)
        refused = [said for _ in range(JOINS) if (said := await refusal(settings))]
        left = os.statvfs(folder).f_bavail
        held = a._mesh._members.valid and b._mesh._members.valid

        (folder / "fill").unlink()
        begun = time.monotonic()
        await until(lambda: a._mesh._members.valid and b._mesh._members.valid, timeout=20)
        valid = time.monotonic() - begun
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        async with Node("c", **settings) as c:
            await c.wait_peers(2, 10)
            healed = time.monotonic() - begun
        return {
            "requests": dict(outcomes),
            "lost": dict(lost),
            "held": held,
            "refused": refused,
            "blocks left": left,
            "valid": round(valid, 3),
            "healed": round(healed, 3),
            "ids kept": ids == [a.id, b.id],
        }


if __name__ == "__main__":
    seen = asyncio.run(main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "1"))
    print(json.dumps(seen, indent=2))
