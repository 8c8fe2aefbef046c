"""Processes are killed while they register: the registry stays whole and nobody is cheated.

Run as a program, this file is a nursery: it forks one child after the other from a process that has
everything imported, and kills each a random time after it began to register. Each child appends to
a log what it was given and when it began to give it back; the test judges from the log. All times
are CLOCK_MONOTONIC, which the processes share.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from domi_fast.registry import LeaseLost, NoKeyFree, Registry
from domi_fast.registry.sqlite import SqliteRegistry

KILLS = 4000 if os.environ.get("DOMI_SOAK") == "1" else 200
NURSERIES = 4
TTL = 0.4
LONGEST_LIFE = 0.040  # or what three registrations take, where that is longer
KEYS = [f"id/{i}" for i in range(64)]


def test_kill_9_at_any_point_of_registration(tmp_path: Path) -> None:
    path = str(tmp_path / "registry.sqlite")
    records = run_nurseries(path, tmp_path / "log", KILLS)
    # One that had no processor for as long as its lease has lost it before it died: that others
    # took its keys is judged by the end of the lease alone.
    deaths = {
        r["pid"]: r["at"] if r["lived"] < TTL / 2 else 0.0 for r in records if r["event"] == "death"
    }
    holds = [r for r in records if r["event"] == "hold"]
    returns = {r["claim"]: r["at"] for r in records if r["event"] == "return"}
    assert len(deaths) == KILLS
    assert len(holds) > KILLS / 4, "the children died too early for this to show anything"
    unreturned = sum(hold["claim"] not in returns for hold in holds)
    print(f"{len(holds)} holds, {unreturned} cut short")
    assert unreturned
    check_holds(holds, returns, deaths)

    asyncio.run(asyncio.wait_for(check_all_are_free(path), 30))
    check_file(path)


def test_kill_9_while_the_file_is_made(tmp_path: Path) -> None:
    kills = KILLS // 2
    pattern = str(tmp_path / "registry-{}.sqlite")
    run_nurseries(pattern, tmp_path / "log", kills)
    paths = [pattern.format(n) for n in range(kills // NURSERIES)]

    async def main() -> None:
        for start in range(0, len(paths), 25):
            await asyncio.gather(*map(check_all_are_free, paths[start : start + 25]))

    asyncio.run(asyncio.wait_for(main(), 120))
    for path in paths:
        check_file(path)


def run_nurseries(path: str, log: Path, kills: int) -> list[dict[str, Any]]:
    """What the log says after so many kills; a path with ``{}`` is a file of its own each round."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    nurseries = [
        subprocess.Popen(
            [sys.executable, __file__, path, str(log), str(kills // NURSERIES), str(seed + n)]
        )
        for n in range(NURSERIES)
    ]
    try:
        assert [nursery.wait(KILLS) for nursery in nurseries] == [0] * NURSERIES
    finally:
        for nursery in nurseries:
            nursery.kill()
            nursery.wait()
    return [json.loads(line) for line in log.read_text().splitlines()]


def check_file(path: str) -> None:
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        # Those who held nothing may have a lease left, but none that would not end by itself.
        latest = time.monotonic_ns() + int(TTL * 1e9)
        assert db.execute("SELECT * FROM lease WHERE expires > ?", (latest,)).fetchall() == []
        orphans = "SELECT * FROM waiter WHERE lease NOT IN (SELECT id FROM lease)"
        assert db.execute(orphans).fetchall() == []
    db.close()


def check_holds(
    holds: list[dict[str, Any]], returns: dict[str, float], deaths: dict[int, float]
) -> None:
    """No key had two living holders at once; a dead one's lease was waited for; epochs grew."""
    by_key = defaultdict(list)
    for hold in holds:
        by_key[hold["key"]].append(hold)
    for key, history in by_key.items():
        history.sort(key=lambda hold: hold["at"])
        for one, two in pairwise(history):
            assert one["epoch"] < two["epoch"], (key, one, two)
            given_back = returns.get(one["claim"])
            if given_back is None:
                # Killed while it held the key: others had to wait for the end of its lease.
                assert deaths[one["pid"]] < two["at"], (key, one, two)
                assert one["valid_until"] <= two["at"], (key, one, two)
            else:
                assert given_back <= two["at"], (key, one, two)


async def check_all_are_free(path: str) -> None:
    """Once the leases of the dead are over, every key can be had."""
    registry = SqliteRegistry(path)
    await registry.open()
    try:
        watch = registry.watch("", since=(snapshot := await registry.list("")).cursor)
        left = {entry.key for entry in snapshot.entries}
        while left:
            event = await asyncio.wait_for(watch.__anext__(), TTL + 1)
            left.discard(getattr(event, "key", ""))
        lease = await registry.grant(10.0)  # who judges may be kept waiting himself
        lock = await registry.acquire("lock", lease)
        await lock.release()
        claims = [await registry.claim(KEYS, b"", lease) for _ in KEYS]
        assert [claim.key for claim in claims] == KEYS
    finally:
        await registry.close()


# ---------------------------------------------------------------------------- the nursery


def nursery(path: str, log: str, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    longest = max(LONGEST_LIFE, 3 * time_of_one(f"{log}-{os.getpid()}"))
    for n in range(kills):
        ready, begun = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(path.format(n), out, begun)
        os.close(begun)
        # Empty if the child ended before it began, which is then found out below.
        assert os.read(ready, 1) == b"!"
        began = time.monotonic()
        os.close(ready)
        time.sleep(chance.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        died = time.monotonic()
        record(out, event="death", pid=pid, at=died, lived=died - began)
        assert os.WIFSIGNALED(status), f"a child failed by itself: {status}"


def time_of_one(path: str) -> float:
    """Seconds that a child takes to open a registry of its own and to hold a key there."""
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            asyncio.run(hold_one(path))
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    return time.monotonic() - began


async def hold_one(path: str) -> None:
    registry = SqliteRegistry(path)
    await registry.open()
    await registry.claim(KEYS, b"", await registry.grant(TTL))


def child(path: str, out: int, begun: int) -> NoReturn:
    try:
        asyncio.run(register_for_ever(path, out, begun))
    finally:
        os._exit(1)


async def register_for_ever(path: str, out: int, begun: int) -> None:
    os.write(begun, b"!")
    while True:
        registry = SqliteRegistry(path)
        await registry.open()
        lease = await registry.grant(TTL)
        # The keys of the dead come free with time, and so does a lock.
        with suppress(NoKeyFree, LeaseLost, asyncio.TimeoutError):
            for _ in range(3):
                await register_once(registry, lease, out)
            lock = await asyncio.wait_for(registry.acquire("lock", lease), 0.005)
            await register_once(registry, lease, out)
            await lock.release()
        await registry.close()


async def register_once(registry: Registry, lease: Any, out: int) -> None:
    pid = os.getpid()
    claim = await registry.claim(KEYS, str(pid).encode(), lease)
    name = f"{pid} {claim.epoch}"
    record(
        out,
        event="hold",
        pid=pid,
        at=time.monotonic(),
        key=claim.key,
        epoch=claim.epoch,
        claim=name,
        valid_until=lease.valid_until,
    )
    await registry.list("id/")
    await claim.update(b"ready")
    entry = await registry.get(claim.key)
    if time.monotonic() < lease.valid_until:
        assert entry is not None
        assert entry.epoch == claim.epoch
    record(out, event="return", pid=pid, at=time.monotonic(), claim=name)
    await claim.release()


def record(out: int, **facts: object) -> None:
    # One write with O_APPEND: lines of several processes do not mix.
    os.write(out, json.dumps(facts).encode() + b"\n")


if __name__ == "__main__":
    nursery(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
