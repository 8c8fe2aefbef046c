"""Leaders that are killed, stopped, and cut off: never two at once, and soon another.

The contenders are processes of their own (contender.py), and write down when they believe to lead;
the tests judge from what they wrote. The lock is tested as the election is.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, Protocol

import pytest

from domi_fast import LeadershipLost, Node
from domi_fast.registry import open_registry
from tests.conftest import LOOPS, SOAK
from tests.servers import Consul, Etcd, ZooKeeper
from tests.support import ROOT, environment, slowness, until_now

CONTENDERS = 3


class Server(Protocol):
    url: str

    def start(self) -> None: ...

    def kill(self) -> None: ...


@dataclass(frozen=True)
class Backend:
    """A registry, and how long the tests of it may be.

    :ivar server: makes what has to run; None for a file.
    :ivar lease: seconds of a leadership.
    :ivar kills: of leaders, in a short and in a long run.
    :ivar pauses: the same, of leaders that are stopped and go on. A short run with none is none.
    """

    server: Callable[[Path], Server] | None
    lease: float
    kills: tuple[int, int]
    pauses: tuple[int, int] = (1, 5)


BACKENDS = {
    "sqlite": Backend(None, 1.0, (4, 50)),
    "etcd": Backend(Etcd, 2.0, (2, 50)),
    "zookeeper": Backend(ZooKeeper, 3.0, (1, 5), (0, 5)),
    "consul": Backend(Consul, 10.0, (1, 5), (0, 5)),
}


@dataclass(frozen=True)
class Term:
    """One leadership, as its holder wrote it down; times of CLOCK_MONOTONIC.

    :ivar believed: when the holder was last told that it leads, or a little later.
    :ivar valid_until: until when that was to hold.
    :ivar lost: when the holder knew that it was over; None for one that was killed.
    """

    pid: int
    token: int
    began: float
    believed: float
    valid_until: float
    lost: float | None


class Arena:
    """Contenders for one leadership, in the order of their start, and what they wrote."""

    def __init__(self, url: str, kind: str, lease: float, log: Path) -> None:
        self.limit = lease + 1.0 + open_registry(url).limits.gone_after(lease)
        self._arguments = [url, kind, str(lease), str(log)]
        self._loops = cycle(LOOPS)
        self._log = log
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def add(self) -> None:
        process = subprocess.Popen(
            [
                *(sys.executable, str(ROOT / "tests" / "faults" / "contender.py")),
                *(*self._arguments, next(self._loops)),
            ],
            stdin=subprocess.PIPE,
            env=environment(),
        )
        self._processes[process.pid] = process

    def signal(self, pid: int, number: signal.Signals) -> float:
        """The time just before it."""
        assert self._processes[pid].poll() is None, f"contender {pid} ended by itself"
        at = time.monotonic()
        self._processes[pid].send_signal(number)
        return at

    def reap(self, pid: int) -> None:
        process = self._processes.pop(pid)
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()

    def end(self) -> None:
        for pid in list(self._processes):
            self.reap(pid)

    def records(self) -> list[dict[str, Any]]:
        with suppress(FileNotFoundError):
            # Without the last line, which may not be whole.
            return [json.loads(line) for line in self._log.read_bytes().split(b"\n")[:-1]]
        return []

    def terms(self) -> list[Term]:
        """In the order in which they began."""
        by_token: dict[int, list[dict[str, Any]]] = {}
        for each in self.records():
            by_token.setdefault(each["token"], []).append(each)
        found = []
        for token, history in by_token.items():
            first, losses = history[0], [r["at"] for r in history if r["event"] == "lost"]
            believed = [r for r in history if r["event"] != "lost"]
            assert first["event"] == "began"
            assert {r["pid"] for r in history} == {first["pid"]}, f"two held the token {token}"
            assert all(r["refused"] for r in history if r["event"] == "lost")
            found.append(
                Term(
                    pid=first["pid"],
                    token=token,
                    began=first["at"],
                    believed=believed[-1]["at"],
                    valid_until=believed[-1]["valid_until"],
                    lost=losses[0] if losses else None,
                )
            )
        return sorted(found, key=lambda term: term.began)

    def wait_term(self, after: int) -> Term:
        """The first that began after the one with this token."""

        def newer() -> list[Term]:
            return [term for term in self.terms() if term.token > after]

        until_now(newer, timeout=60.0, pause=0.02)
        return newer()[0]


def judge(terms: list[Term]) -> None:
    """One leader at a time; tokens grow; the next waited for the end of the last."""
    for one, two in pairwise(terms):
        assert one.token < two.token, (one, two)
        assert one.believed <= two.began, f"two leaders at once: {one} and {two}"
        assert one.valid_until <= two.began, f"it began within the lease of another: {one}, {two}"


def report(capsys: pytest.CaptureFixture[str], what: str, seconds: list[float]) -> None:
    middle, longest = statistics.median(seconds), max(seconds)
    with capsys.disabled() if SOAK else nullcontext():
        print(f"\n{what}: {len(seconds)} times, median {middle:.2f} s, longest {longest:.2f} s")


def on_those_with(times: Callable[[Backend], tuple[int, int]]) -> pytest.MarkDecorator:
    """A test on every backend that has time for it."""
    params = [
        pytest.param(name, marks=[pytest.mark.external] if backend.server else [])
        for name, backend in BACKENDS.items()
        if times(backend)[SOAK]
    ]
    return pytest.mark.parametrize("backend", params, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]


@pytest.fixture
def url(backend: Backend, tmp_path: Path) -> Iterator[str]:
    if backend.server is None:
        yield f"sqlite://{tmp_path}/registry.sqlite"
        return
    server = backend.server(tmp_path)
    server.start()
    try:
        yield server.url
    finally:
        server.kill()


@pytest.fixture(params=["elect", "lock"])
def arena(
    request: pytest.FixtureRequest, backend: Backend, url: str, tmp_path: Path
) -> Iterator[Arena]:
    arena = Arena(url, request.param, backend.lease, tmp_path / "log")
    try:
        for _ in range(CONTENDERS):
            arena.add()
        yield arena
    finally:
        arena.end()


@on_those_with(lambda backend: backend.kills)
@pytest.mark.timeout(1200 if SOAK else 120)
def test_leaders_that_are_killed(
    backend: Backend, arena: Arena, request: pytest.FixtureRequest, capsys: Any
) -> None:
    """SIGKILL, again and again; a new contender comes for each that is gone."""
    handed_on = []
    token = 0
    for _ in range(backend.kills[SOAK]):
        term = arena.wait_term(token)
        # Anywhere between two renewals of the lease.
        time.sleep(random.uniform(0.0, backend.lease / 3))
        killed = arena.signal(term.pid, signal.SIGKILL)
        arena.reap(term.pid)
        arena.add()
        token = term.token
        handed_on.append(arena.wait_term(token).began - killed)
        assert handed_on[-1] <= arena.limit + slowness() - 1.0
    judge(arena.terms())
    report(capsys, f"{request.node.name}: handed on", handed_on)


@on_those_with(lambda backend: backend.pauses)
@pytest.mark.timeout(600 if SOAK else 120)
def test_a_leader_that_was_stopped_knows_it(
    backend: Backend, arena: Arena, request: pytest.FixtureRequest, capsys: Any
) -> None:
    """SIGSTOP until another leads, then SIGCONT: its first look tells it, and its token is old."""
    noticed = []
    token = 0
    for _ in range(backend.pauses[SOAK]):
        term = arena.wait_term(token)
        stopped = arena.signal(term.pid, signal.SIGSTOP)
        successor = arena.wait_term(term.token)
        assert successor.began - stopped <= arena.limit + slowness() - 1.0
        assert successor.token > term.token
        woken = arena.signal(term.pid, signal.SIGCONT)

        def loss(term: Term = term) -> list[float]:
            found = [t.lost for t in arena.terms() if t.token == term.token]
            return [at for at in found if at is not None]

        until_now(loss, timeout=10.0)
        noticed.append(loss()[0] - woken)
        # And that takes nothing from the other.
        until_now(lambda: arena.terms()[-1].believed > loss()[0], timeout=10.0)
        assert arena.terms()[-1].token == successor.token
        token = term.token
    judge(arena.terms())
    report(capsys, f"{request.node.name}: noticed", noticed)


@pytest.mark.external
@pytest.mark.timeout(120)
async def test_a_leader_that_is_cut_off_stops_by_itself(tmp_path: Path) -> None:
    """The registry hangs: over at ``valid_until``; when it answers again, there is a new leader."""
    server = Etcd(tmp_path)
    server.start()
    seen = Seen()
    try:
        async with Node("a", registry=server.url, lease_ttl=2.0) as node:
            with pytest.raises(LeadershipLost, match="lease"):
                await lead_without(server, node, seen)
            assert seen.valid_until <= seen.over <= seen.valid_until + 0.2 * slowness()
            server.signal(signal.SIGCONT)
            assert await asyncio.wait_for(lead_once(node), 20.0) > seen.token
    finally:
        server.kill()


@dataclass
class Seen:
    token: int = 0
    valid_until: float = 0.0
    over: float = 0.0


async def lead_without(server: Etcd, node: Node, seen: Seen) -> None:
    """Lead while the registry hangs."""
    async with node.cluster.elect("post") as leadership:
        seen.token = leadership.token
        server.signal(signal.SIGSTOP)
        try:
            while True:
                seen.valid_until = leadership.valid_until
                await asyncio.sleep(0.01)
        finally:
            seen.over = time.monotonic()


async def lead_once(node: Node) -> int:
    async with node.cluster.elect("post") as leadership:
        leadership.check()
        return leadership.token
