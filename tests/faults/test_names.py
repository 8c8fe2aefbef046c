"""Names whose holder is killed or stopped, or whose registry is away for longer than the lease."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from domi_fast import Holder, Name, NameTaken, Node
from domi_fast.registry import open_registry
from tests.servers import Consul, Etcd, Server, ZooKeeper
from tests.support import ROOT, environment, slowness, until

LEASES = {"sqlite": 1.0, "etcd": 2.0, "zookeeper": 2.0, "consul": 10.0}
SERVERS: dict[str, type[Etcd | ZooKeeper | Consul]] = {
    "etcd": Etcd,
    "zookeeper": ZooKeeper,
    "consul": Consul,
}
ON_SERVERS = [pytest.param(name, marks=[pytest.mark.external]) for name in SERVERS]
COUNT = 20


@pytest.fixture(params=["sqlite", *ON_SERVERS])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def lease(backend: str) -> float:
    return LEASES[backend]


@pytest.fixture
def server(backend: str, tmp_path: Path) -> Iterator[Server | None]:
    if backend not in SERVERS:
        yield None
        return
    server = SERVERS[backend](tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def url(server: Etcd | ZooKeeper | Consul | None, tmp_path: Path) -> str:
    return f"sqlite://{tmp_path}/registry.sqlite" if server is None else server.url


@contextlib.contextmanager
def holder(url: str, lease: float, loop: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds ``n0`` and so on."""
    process = subprocess.Popen(
        [
            *(sys.executable, str(ROOT / "tests" / "faults" / "name_holder.py")),
            *(url, str(lease), str(COUNT), loop),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


async def claim_soon(node: Node, name: str, limit: float) -> Name:
    end = time.monotonic() + limit
    while True:
        try:
            return await node.cluster.names("held").claim(name)
        except NameTaken as taken:
            assert taken.holder.name == "holder"  # noqa: PT017 - and it goes on
            assert time.monotonic() < end, f"{name} is not free after {limit} s"
        await asyncio.sleep(0.02)


async def found_after(node: Node, name: str, epoch: int) -> Holder:
    """Its holder, once that has claimed it after this epoch."""
    end = time.monotonic() + 20.0
    while True:
        found = await node.cluster.names("held").find(name)
        if found is not None and found.epoch > epoch:
            return found
        assert time.monotonic() < end, f"{name} is not claimed again: {found}"
        await asyncio.sleep(0.02)


async def test_the_names_of_a_holder_that_is_killed(url: str, lease: float, loop_kind: str) -> None:
    """Free when its lease is over and the registry has seen that; not before it can be over."""
    async with Node("a", registry=url, lease_ttl=lease, start_timeout=0.0) as a:
        with holder(url, lease, loop_kind) as process:
            with pytest.raises(NameTaken):
                await a.cluster.names("held").claim("n0")
            process.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            limit = lease + open_registry(url).limits.gone_after(lease) + slowness()
            for number in range(COUNT):
                name = await claim_soon(a, f"n{number}", killed + limit - time.monotonic())
                if number == 0:
                    # The last renewal was a third of the lease ago at most.
                    assert time.monotonic() - killed > lease / 2
                assert name.held


async def test_a_holder_that_was_stopped_learns_what_it_lost(
    url: str, lease: float, loop_kind: str
) -> None:
    """Another has one of its names when it goes on; the rest it takes again."""
    async with Node("a", registry=url, lease_ttl=lease, start_timeout=0.0) as a:
        with holder(url, lease, loop_kind) as process:
            before = [await found_after(a, f"n{number}", 0) for number in range(1, COUNT)]
            process.send_signal(signal.SIGSTOP)
            limit = lease + open_registry(url).limits.gone_after(lease) + slowness()
            taken = await claim_soon(a, "n0", limit)
            process.send_signal(signal.SIGCONT)
            assert process.stdout is not None
            line = await asyncio.to_thread(process.stdout.readline)
            assert line == b"lost n0\n"
            for number, old in enumerate(before, 1):
                new = await found_after(a, f"n{number}", old.epoch)
                assert (new.name, new.value, new.id) == ("holder", b"v", old.id)
            assert taken.held


@pytest.mark.parametrize("backend", ON_SERVERS, indirect=True)
async def test_a_registry_that_is_away_for_longer_than_the_lease(
    server: Etcd | ZooKeeper | Consul, url: str, lease: float
) -> None:
    """Its server is killed and started again: no name is lost, and each is claimed anew."""
    async with Node("a", registry=url, lease_ttl=lease) as a:
        names = a.cluster.names("held")
        found = [await names.claim(f"n{number}", b"v") for number in range(COUNT)]
        before = [name.epoch for name in found]
        held = found[0]._claim.lease
        server.kill()
        await until(held.lost.is_set, 2 * lease + 5.0)
        assert all(name.held for name in found)
        server.start()
        await until(
            lambda: all(name.epoch > epoch for name, epoch in zip(found, before, strict=True)), 30.0
        )
        for name in found:
            assert name.held
            assert await names.find(name.name) == Holder(a.id, "a", b"v", name.epoch)
