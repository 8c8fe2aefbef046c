"""What a cluster does when its registry's server dies, is cut off, or outlives a node: on each."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import pytest

from domi_fast import Node
from domi_fast.registry import NoKeyFree, Registry, open_registry
from tests.conftest import SOAK
from tests.proxy import Proxy
from tests.servers import Consul, Etcd, ZooKeeper
from tests.support import ROOT, busy, until

pytestmark = pytest.mark.external

KILLS = 20 if SOAK else 2
NODES = "domi/default/nodes/"


class Server(Protocol):
    port: int
    url: str

    def start(self) -> None: ...

    def kill(self) -> None: ...


@dataclass(frozen=True)
class Kind:
    """:ivar lease: seconds, as short as the server of the tests takes them."""

    make: Callable[[Path], Server]
    lease: float


KINDS = {"etcd": Kind(Etcd, 2.0), "zookeeper": Kind(ZooKeeper, 1.0), "consul": Kind(Consul, 1.0)}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def lease(kind: str) -> float:
    return KINDS[kind].lease


@pytest.fixture(scope="module")
def server(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = KINDS[kind].make(tmp_path_factory.mktemp(kind))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def url(server: Server, tmp_path: Path) -> str:
    return f"{server.url}/{tmp_path.name}"


@pytest.fixture(autouse=True)
def shorter_leases(kind: str, lease: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Consul takes no less than ten seconds, unless its server is told so, as that of the tests."""
    if kind == "consul":
        from domi_fast.registry.consul import LIMITS

        limits = replace(LIMITS, min_ttl=lease)
        monkeypatch.setattr("domi_fast.registry.consul.LIMITS", limits)


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Registry]:
    registry = open_registry(url)
    await registry.open()
    try:
        yield registry
    finally:
        await registry.close()


def is_registered(*nodes: Node) -> bool:
    return all(node.registered for node in nodes)


async def found(registry: Registry) -> dict[str, bytes]:
    """What it has of nodes."""
    return {entry.key: entry.value for entry in (await registry.list(NODES)).entries}


async def come_back(registry: Registry, before: dict[str, bytes], *nodes: Node) -> None:
    """Wait until the nodes know that they are registered, as they were, and nobody else is."""
    while True:
        if is_registered(*nodes) and await found(registry) == before:
            return
        await asyncio.sleep(0.02)


def seen_by(*nodes: Node) -> set[frozenset[int]]:
    """Which ids each of them has in its table."""
    return {frozenset(node._mesh._members.view) for node in nodes}


async def test_a_cluster_goes_on_while_its_registry_is_killed(
    server: Server, url: str, lease: float
) -> None:
    """By turns for a moment, and until the leases are over: no request between live nodes fails.

    Soon after its return the same nodes are registered, each once, under the ids that they had.
    """
    settings = {"registry": url, "lease_ttl": lease}
    async with (
        Node("a", **settings) as a,  # type: ignore[arg-type]
        Node("b", **settings) as b,  # type: ignore[arg-type]
        busy(a, b) as answered,
        opened(url) as registry,
    ):
        before = await found(registry)
        assert len(before) == 2
        for kill in range(KILLS):
            await asyncio.to_thread(server.kill)
            count = answered()
            if kill % 2:
                await until(lambda: not a.registered and not b.registered, lease + 1.0)
            await until(lambda count=count: answered() > count + 50)  # type: ignore[misc]
            await asyncio.to_thread(server.start)
            # A lease may still end when its server is back: what is registered then counts.
            await asyncio.wait_for(come_back(registry, before, a, b), lease + 1.0)
            assert (a.id, b.id) == (0, 1)
        # The watches have gone on, too.
        async with Node("c", **settings) as c:  # type: ignore[arg-type]
            assert c.id == 2
            await until(lambda: seen_by(a, b, c) == {frozenset({0, 1, 2})})
            await c.wait_subscribed(50, timeout=10)
            assert await c.request(50, b"x") == b"x"
        await until(lambda: seen_by(a, b) == {frozenset({0, 1})})


async def test_an_id_has_one_owner_while_a_node_is_cut_off(
    server: Server, url: str, lease: float
) -> None:
    """For longer than its lease: it stops before another may have its id, and gets a new one."""
    async with Proxy(server.port) as proxy, opened(url) as registry:
        there = re.sub(r":\d+/", f":{proxy.port}/", url)
        async with (
            Node("a", registry=there, lease_ttl=lease) as a,
            Node("b", registry=url, lease_ttl=lease) as b,
        ):
            before = await registry.get(f"{NODES}0000")
            assert before is not None
            async with busy(b, a):
                proxy.cut()
                limit = lease + registry.limits.gone_after(lease)
                await until(lambda: seen_by(b) == {frozenset({1})}, limit + 1.0)
                assert not a.registered
            async with Node("c", registry=url, lease_ttl=lease) as c:
                assert (c.id, b.id) == (0, 1)
                assert not a.registered
                proxy.mend()
                await until(lambda: a.registered and a.id == 2, 10.0)
                await until(lambda: seen_by(a, b, c) == {frozenset({0, 1, 2})})
                await until(lambda: set(b.peers) == {0, 2})
                assert {i: peer.name for i, peer in b.peers.items()} == {0: "c", 2: "a"}
                entries = (await registry.list(NODES)).entries
                assert [entry.key[-4:] for entry in entries] == ["0000", "0001", "0002"]
                assert entries[0].epoch > before.epoch
                async with busy(b, a):
                    pass


VICTIM = """
import asyncio, sys
from dataclasses import replace
from domi_fast import Node
url, lease = sys.argv[1], float(sys.argv[2])
if url.startswith("consul:"):
    from domi_fast.registry import consul
    consul.LIMITS = replace(consul.LIMITS, min_ttl=lease)

async def main():
    async with Node("victim", registry=url, lease_ttl=lease) as node:
        print(node.id, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_killed_node_is_gone_from_every_table(url: str, lease: float) -> None:
    """And its id is free after its lease, and not before."""
    async with (
        Node("a", registry=url, lease_ttl=lease) as a,
        Node("b", registry=url, lease_ttl=lease) as b,
        opened(url) as registry,
    ):
        own = await registry.grant(lease)
        key = f"{NODES}0002"
        with subprocess.Popen(
            [sys.executable, "-c", VICTIM, url, str(lease)], stdout=subprocess.PIPE, cwd=ROOT
        ) as victim:
            assert victim.stdout is not None
            assert int(await asyncio.to_thread(victim.stdout.readline)) == 2
            await until(lambda: seen_by(a, b) == {frozenset({0, 1, 2})})
            before = await registry.get(key)
            victim.kill()
            killed = time.monotonic()
        with pytest.raises(NoKeyFree):
            await registry.claim([key], b"", own)
        await until(
            lambda: seen_by(a, b) == {frozenset({0, 1})},
            lease + registry.limits.gone_after(lease) + 1.0,
        )
        # Its last renewal was at most a third of its lease before.
        assert time.monotonic() > killed + lease * 0.6
        assert set(a.peers) == {1}
        async with Node("heir", registry=url, lease_ttl=lease) as heir:
            assert heir.id == 2
            after = await registry.get(key)
            assert before is not None
            assert after is not None
            assert after.epoch > before.epoch
