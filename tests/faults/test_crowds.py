"""Ten thousand strangers who begin a handshake and say no more."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from domi_fast import Node
from tests.support import ROOT, forget_records, slowness

SECRET = b"the secret of this test"
COUNT = 10_000
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@asynccontextmanager
async def crowd(port: int, seconds: float) -> AsyncIterator[asyncio.subprocess.Process]:
    """All of them are there when the block begins."""
    arguments = {"port": port, "source": "127.0.0.2", "count": COUNT, "seconds": seconds}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.faults.crowd",
        json.dumps(arguments),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        assert process.stdout is not None
        assert json.loads(await process.stdout.readline()) == {"full": True}
        yield process
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def end_of(process: asyncio.subprocess.Process) -> dict[str, float]:
    assert process.stdout is not None
    found: dict[str, float] = json.loads(await process.stdout.readline())
    return found


async def test_ten_thousand_strangers_are_gone_in_time(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """They cost little while they are there, and nothing afterwards; nor do they fill the log."""
    settings: dict[str, Any] = {"secret": SECRET, "registry": registry_url}
    async with Node("crowded", host="0.0.0.0", handshakes_per_address=20_000, **settings) as node:
        gc.collect()
        before = resident()
        async with crowd(node.port, 0.0) as process:
            held = len(node._mesh._sessions)
            grown = resident() - before
            found = await end_of(process)
        assert held > COUNT // 2
        assert grown / held < 4096
        assert found["opened"] == COUNT
        assert found["longest"] < 2.5 * slowness()
        assert not node._mesh._sessions
        assert node.counters()["protocol_errors"] == COUNT
        warned = [r for r in caplog.get_records("call") if r.levelno == logging.WARNING]
        assert 0 < len(warned) < COUNT // 20


async def test_a_node_joins_beside_ten_thousand_strangers(registry_url: str) -> None:
    """Again and again, while one address comes with as many as it can."""
    settings: dict[str, Any] = {"secret": SECRET, "registry": registry_url}
    async with Node("crowded", host="0.0.0.0", **settings) as node:
        async with crowd(node.port, 2.0) as process:
            for _ in range(20):
                began = time.monotonic()
                async with Node("late", **settings) as late:
                    await late.wait_peers(1, 5)
                    assert time.monotonic() - began < 1.0 * slowness()
            assert process.returncode is None
            await end_of(process)
        assert node.counters()["refused_handshakes"] > COUNT // 2
