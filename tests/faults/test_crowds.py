"""Ten thousand strangers who begin a handshake and say no more."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import resource
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.processor import kept_waiting
from domi_fast import Client, Node, connect
from tests.support import ROOT, forget_records, slowness

SECRET = b"the secret of this test"
SLOW_BUILD = any(os.environ.get(f"DOMI_{name}") == "1" for name in ("DEBUG", "SANITIZE"))
COUNT = 1_000 if SLOW_BUILD else 10_000
SPARE = 1000
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


@pytest.fixture
def count() -> Iterator[int]:
    """How many come: fewer only where no process may have so many descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = COUNT + SPARE if hard == resource.RLIM_INFINITY else min(COUNT + SPARE, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    yield most - SPARE
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


class Crowd:
    """They come from one address. Who is closed is replaced until the end."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def said(self) -> dict[str, float]:
        assert self._process.stdout is not None
        found: dict[str, float] = json.loads(await self._process.stdout.readline())
        return found

    async def end(self) -> dict[str, float]:
        """Wait until the last of them is closed; ``opened``, ``longest`` and ``waited``."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return await self.said()


@asynccontextmanager
async def crowd(port: int, count: int, source: str = "127.0.0.2") -> AsyncIterator[Crowd]:
    """So many have come when the block begins."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.faults.crowd",
        json.dumps({"port": port, "source": source, "count": count}),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        there = Crowd(process)
        assert await there.said() == {"full": True}
        yield there
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_ten_thousand_strangers_are_gone_in_time(
    registry_url: str, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    """They cost little while they are there, and nothing afterwards; nor do they fill the log."""
    settings: dict[str, Any] = {"secret": SECRET, "registry": registry_url}
    for limit in ("handshakes_per_address", "session_limit", "sessions_per_address"):
        settings[limit] = 40_000
    async with Node("crowded", host="0.0.0.0", **settings) as node:
        gc.collect()
        before, waited = resident(), kept_waiting()
        async with crowd(node.port, count) as strangers:
            held = len(node._mesh._sessions)
            grown = resident() - before
            found = await strangers.end()
        assert held > count // 10
        if not SLOW_BUILD:  # whose memory has other things in it
            assert grown / held < 4096
        assert found["opened"] >= count
        # Who has no processor closes nothing, and sees nothing closed.
        waited = kept_waiting() - waited + found["waited"]
        assert found["longest"] - waited < 2.5 * slowness()
        assert not node._mesh._sessions
        assert node.counters()["protocol_errors"] == found["opened"]
        warned = [r for r in caplog.get_records("call") if r.levelno == logging.WARNING]
        assert 0 < len(warned) < count // 20


async def test_a_node_joins_beside_ten_thousand_strangers(registry_url: str, count: int) -> None:
    """Again and again, while one address comes with as many as it can."""
    settings: dict[str, Any] = {"secret": SECRET, "registry": registry_url}
    async with Node(
        "crowded", host="0.0.0.0", handshakes_per_address=count // 10, **settings
    ) as node:
        async with crowd(node.port, count) as strangers:
            for _ in range(5):
                began = time.monotonic()
                async with Node("late", **settings) as late:
                    await late.wait_peers(1, 5)
                    assert time.monotonic() - began < 1.0 * slowness()
            await strangers.end()
        assert node.counters()["refused_handshakes"] > count // 2


@pytest.fixture
def few() -> Iterator[int]:
    """Descriptors for this process, as many as a shell usually gives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield 1024
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_strangers_of_several_addresses_shut_nobody_out(registry_url: str, few: int) -> None:
    """Each has as many as one address may have; together, more than there is room for."""
    settings: dict[str, Any] = {"secret": SECRET, "registry": registry_url}
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(Node("crowded", host="0.0.0.0", **settings))
        held = await stack.enter_async_context(await guest(node))
        crowds = [
            await stack.enter_async_context(crowd(node.port, few // 4, f"127.0.0.{last}"))
            for last in range(2, 6)
        ]
        for number in range(3):
            async with await guest(node), Node(f"late{number}", **settings) as late:
                await late.wait_peers(1, 5)
        assert held.connected
        assert len(node._mesh._sessions) <= few * 3 // 4
        for strangers in crowds:
            await strangers.end()
        assert node.counters()["refused_handshakes"] > 0
        assert node.counters()["refused_sessions"] == 0


async def guest(node: Node) -> Client:
    return await connect(f"tcp://127.0.0.1:{node.port}", secret=SECRET)
