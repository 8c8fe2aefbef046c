"""A subscriber that is stopped under full publish load, with SIGSTOP: what it costs, and whom."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.conftest import SOAK
from tests.faults.flood import SIZE
from tests.support import ROOT, environment

COUNT = 400_000 if SOAK else 60_000
LIMIT = 16 << 20
SLOW_BUILD = any(os.environ.get(f"DOMI_{name}") == "1" for name in ("DEBUG", "SANITIZE"))
POLICIES = ["raise", "drop_oldest", "drop_newest", "disconnect"]


class Process:
    def __init__(self, part: str, settings: dict[str, Any], *more: str) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "tests/faults/flood.py"),
                part,
                json.dumps(settings),
                *more,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment(),
            text=True,
        )

    def said(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it ended with {self.process.wait(10)}"
        return dict(json.loads(line))

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def report(self) -> dict[str, Any]:
        self.go_on()
        return self.said()

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.communicate()


@contextmanager
def processes(settings: dict[str, Any], policy: str) -> Iterator[list[Process]]:
    started: list[Process] = []
    try:
        for part in ("slow", "live"):
            started.append(Process(part, settings))
            started[-1].said()
        more = {**settings, "when_full": policy, "queue_limit": LIMIT}
        started.append(Process("publisher", more, str(COUNT)))
        yield started
    finally:
        for process in started:
            process.end()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_subscriber_that_is_stopped(policy: str, tmp_path: Any) -> None:
    """The publisher's memory is bounded, the other gets all, and nothing is lost uncounted."""
    settings = {"registry": f"sqlite://{tmp_path}/registry", "heartbeat_timeout": 600.0}
    with processes(settings, policy) as (slow, live, publisher):
        publisher.said()
        publisher.said()  # the first half, with both of them awake
        os.kill(slow.process.pid, signal.SIGSTOP)
        publisher.go_on()
        grown = publisher.said()["grown"]
        os.kill(slow.process.pid, signal.SIGCONT)
        publisher.go_on()
        sums = publisher.said()
        assert sums["sent"] == 2 * COUNT
        # A slow build keeps what was freed, or counts it.
        if not SLOW_BUILD:
            assert grown <= LIMIT * 1.1
        # Not more than the sockets and the queue could take, so there were drops; who is
        # disconnected is offered nothing more, and loses what the queue had.
        queue = LIMIT // SIZE
        assert sums["dropped"] > (0.9 * queue if policy == "disconnect" else COUNT // 10)
        assert sums["others"] == 0
        there = live.report()
        assert (there["received"], there["ordered"]) == (2 * COUNT, True)
        stopped = slow.report()
        assert stopped["ordered"]
        assert sums["offered"] == stopped["received"] + sums["dropped"]
        if policy == "drop_oldest":
            assert stopped["last"] == 2 * COUNT - 1
        if policy == "disconnect":
            assert sums["offered"] < 2 * COUNT
        else:
            assert sums["offered"] == 2 * COUNT
