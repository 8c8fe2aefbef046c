"""A wall clock that jumps: no timer, deadline, heartbeat or lease goes by it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support import ROOT, compile_c

PROGRAM = """
    import asyncio, sys, time
    from pathlib import Path
    from domi_fast import DeadlineExceeded, Node

    url, jump, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])

    async def main():
        settings = dict(registry=url, heartbeat_interval=0.2, heartbeat_timeout=0.6, lease_ttl=1.0)
        async with Node("a", **settings) as a, Node("b", **settings) as b:
            b.subscribe(50, lambda ctx: ctx.reply(ctx.data))
            b.subscribe(51, lambda ctx: kept.append(ctx))
            await a.wait_subscribed(51, timeout=10)
            kept, peers, ids = [], list(a.peers), (a.id, b.id)
            happened = []

            async def watch(events):
                async for event in events:
                    happened.append(event.kind)

            watching = [asyncio.ensure_future(watch(node.events())) for node in (a, b)]
            await asyncio.sleep(0)
            begun, wall = time.monotonic(), time.time()
            deadline = asyncio.ensure_future(a.request(51, b"", timeout=1.0))
            jump.touch()
            moved = time.time() - wall
            assert abs(moved - seconds) < 60, moved
            for _ in range(20):
                assert await a.request(50, b"x", timeout=1.0) == b"x"
                await asyncio.sleep(0.1)
            try:
                await deadline
            except DeadlineExceeded:
                pass
            assert time.monotonic() - begun < 20
            assert list(a.peers) == peers and (a.id, b.id) == ids
            assert happened == [], happened
            for node in (a, b):
                counters = node.counters()
                assert counters.get("protocol_errors", 0) == 0, counters
        await asyncio.gather(*watching)
        assert sorted(happened) == ["left", "left"], happened
        print("whole")

    asyncio.run(main())
"""


@pytest.mark.parametrize("seconds", [3600, -3600, 10 * 365 * 86400])
def test_a_jump_of_the_wall_clock_changes_nothing(
    tmp_path: Path, registry_url: str, seconds: int
) -> None:
    """The clock of this machine cannot be set for a test: a preloaded library moves the wall clock
    of one process, for all that asks for it there."""
    shim = compile_c(
        ROOT / "tests" / "native" / "wall_clock.c", tmp_path / "wall_clock.so", "-shared", "-fPIC"
    )
    jump = tmp_path / "jump"
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(filter(None, [os.environ.get("LD_PRELOAD"), str(shim)])),
        "WALL_CLOCK_FILE": str(jump),
        "WALL_CLOCK_JUMP": str(seconds),
    }
    program = [sys.executable, "-c", textwrap.dedent(PROGRAM), registry_url, str(jump)]
    done = subprocess.run(
        [*program, str(seconds)],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("whole\n", "", 0)
