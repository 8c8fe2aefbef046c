"""What befalls a ZooKeeper and the way to it: crashes, hangs, cuts, members that are gone."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from socket import create_server
from typing import Any, TypeVar

import pytest

from domi_fast.registry import Claim, Entry, Put, RegistryError, Reset, Watch, open_registry
from domi_fast.registry.zookeeper import ZooKeeperRegistry
from tests.proxy import Proxy
from tests.servers import ZooKeeper, free_ports
from tests.support import until

T = TypeVar("T")

SOAK = os.environ.get("DOMI_SOAK") == "1"

pytestmark = pytest.mark.external


@pytest.fixture(scope="module")
def zookeeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZooKeeper]:
    server = ZooKeeper(tmp_path_factory.mktemp("zookeeper"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def url(zookeeper: ZooKeeper, tmp_path: Path) -> str:
    return f"{zookeeper.url}/{tmp_path.name}"


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[ZooKeeperRegistry]:
    registry = open_registry(url)
    assert isinstance(registry, ZooKeeperRegistry)
    await registry.open()
    try:
        yield registry
    finally:
        await registry.close()


async def patiently(work: Callable[[], Coroutine[Any, Any, T]], limit: float = 20.0) -> T:
    """What it returns, when the registry is back."""
    end = time.monotonic() + limit
    while True:
        try:
            return await work()
        except RegistryError:  # noqa: PERF203 - the loop is there for it
            assert time.monotonic() < end
            await asyncio.sleep(0.05)


async def arrives(watch: Watch, entry: Entry, limit: float = 10.0) -> None:
    """Wait until the watch has told of the entry."""

    async def follow() -> None:
        async for event in watch:
            told = event.snapshot.entries if isinstance(event, Reset) else ()
            if entry in told or (isinstance(event, Put) and event.entry == entry):
                return

    await asyncio.wait_for(follow(), limit)


async def refusals(*urls: str) -> list[str]:
    """What is said at each that cannot be opened."""

    async def refusal(url: str) -> str:
        with pytest.raises(RegistryError) as caught:
            await open_registry(url).open()
        return str(caught.value)

    return await asyncio.gather(*map(refusal, urls))


async def test_a_crash_and_restart_loses_nothing(zookeeper: ZooKeeper, url: str) -> None:
    async with opened(url) as one, opened(url) as two:
        lease = await one.grant(4.0)
        claim = await one.claim(["id/1"], b"mine", lease)
        held = await one.acquire("lock", lease)
        waiting = asyncio.ensure_future(two.acquire("lock", await two.grant(4.0)))
        watch = two.watch("", since=None)
        await arrives(watch, await one.put("a", b"1"))
        zookeeper.kill()
        zookeeper.start()
        entry = await patiently(lambda: one.put("b", b"2"))
        await arrives(watch, entry)
        assert not lease.lost.is_set()
        await patiently(lambda: claim.update(b"still mine"))
        assert not waiting.done()
        await patiently(held.release)
        assert (await asyncio.wait_for(waiting, 5)).epoch > held.epoch


async def test_one_that_hangs_is_noticed(
    zookeeper: ZooKeeper, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("domi_fast.registry.link.PATIENCE", 0.1)
    async with opened(url) as registry:
        lease = await registry.grant(2.0)
        watch = registry.watch("", since=None)
        await arrives(watch, await registry.put("k", b"before"))
        waiting = asyncio.ensure_future(watch.__anext__())
        zookeeper.signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(RegistryError, match="ZooKeeper at 127"):
                await registry.get("k")
            assert time.monotonic() - began < 10.0
            await asyncio.wait_for(lease.lost.wait(), 5)
        finally:
            zookeeper.signal(signal.SIGCONT)
        entry = await patiently(lambda: registry.put("k", b"back"))
        event = await asyncio.wait_for(waiting, 10)
        if not (isinstance(event, Reset) and event.snapshot.entries == (entry,)):
            await arrives(watch, entry)


async def test_a_loop_that_hangs_loses_its_lease(url: str) -> None:
    """The client's own threads do not keep alive what nobody looks after."""
    granted = asyncio.Event()
    loop = asyncio.get_running_loop()
    over = threading.Event()

    async def hang() -> None:
        async with opened(url) as registry:
            lease = await registry.grant(1.0)
            await registry.claim(["k"], b"", lease)
            loop.call_soon_threadsafe(granted.set)
            over.wait(20)
            with pytest.raises(RegistryError):
                await registry.put("k", b"", lease=lease)

    async with opened(url) as other:
        hanging = asyncio.ensure_future(asyncio.to_thread(asyncio.run, hang()))
        try:
            await asyncio.wait_for(granted.wait(), 10)
            began = time.monotonic()
            while await other.get("k") is not None:
                assert time.monotonic() - began < 1.0 + other.limits.expiry_bound
                await asyncio.sleep(0.02)
        finally:
            over.set()
        await hanging


async def test_a_member_that_is_away_is_passed_over(zookeeper: ZooKeeper, tmp_path: Path) -> None:
    (dead,) = free_ports(1)
    address = zookeeper.url.removeprefix("zookeeper://")
    async with opened(f"zookeeper://127.0.0.1:{dead},{address}/{tmp_path.name}") as registry:
        await registry.put("k", b"x")
        entry = await registry.get("k")
        assert entry is not None
        assert entry.value == b"x"


async def test_an_ensemble_outlives_its_leader(tmp_path: Path) -> None:
    ports = free_ports(6)
    members = [
        f"server.{i}=127.0.0.1:{ports[2 * i]}:{ports[2 * i + 1]}:participant" for i in range(3)
    ]
    servers = [
        ZooKeeper(tmp_path / str(i), member=i, options=["initLimit=20", "syncLimit=4", *members])
        for i in range(3)
    ]
    url = "zookeeper://" + ",".join(f"127.0.0.1:{server.port}" for server in servers)
    try:
        for server in servers:
            server.launch()
        for server in servers:
            server.wait()
        async with opened(url) as one, opened(url) as two:
            lease = await one.grant(6.0)
            claim = await one.claim(["id/1"], b"", lease)
            watch = two.watch("", since=None)
            next(server for server in servers if server.leads()).kill()
            await arrives(watch, await patiently(lambda: two.put("k", b"x")))
            await patiently(lambda: claim.update(b"mine"))
            assert not lease.lost.is_set()
    finally:
        for server in servers:
            server.kill()


async def test_nobody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("domi_fast.registry.link.PATIENCE", 0.5)
    (dead,) = free_ports(1)
    with closing(create_server(("127.0.0.1", 0))) as mute:
        ports = [dead, mute.getsockname()[1]]
        began = time.monotonic()
        errors = await refusals(*[f"zookeeper://127.0.0.1:{port}" for port in ports])
        assert time.monotonic() - began < 10.0
        assert errors[0].startswith(f"ZooKeeper at 127.0.0.1:{ports[0]}: [Errno 111]")
        assert errors[1].startswith(f"ZooKeeper at 127.0.0.1:{ports[1]}: ")


async def test_a_session_that_the_server_does_not_grant(tmp_path: Path) -> None:
    server = ZooKeeper(tmp_path, options=["maxSessionTimeout=2000"])
    server.start()
    try:
        async with opened(server.url) as registry:
            with pytest.raises(RegistryError, match=r"at most 1\.5 s.*maxSessionTimeout"):
                await registry.grant(1.6)
            await registry.grant(1.5)
    finally:
        server.kill()


async def test_user_and_password(zookeeper: ZooKeeper, tmp_path: Path) -> None:
    place = f"{zookeeper.url.removeprefix('zookeeper://')}/{tmp_path.name}"
    async with opened(f"zookeeper://me:sesame@{place}") as registry:
        watch = registry.watch("", since=None)
        lease = await registry.grant(1.0)
        claim = await registry.claim(["k"], b"x", lease)
        held = await registry.acquire("lock", lease)
        await claim.update(b"y")
        entry = await registry.get("k")
        assert entry is not None
        await arrives(watch, entry)
        await held.release()
    for error in await refusals(f"zookeeper://me:wrong@{place}", f"zookeeper://{place}"):
        assert "user and password" in error
        assert "wrong" not in error


# kazoo drops a socket whose handshake has failed.
@pytest.mark.filterwarnings("ignore:.*ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning")
async def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("domi_fast.registry.link.PATIENCE", 0.5)
    server = ZooKeeper(tmp_path, tls=True)
    server.start()
    try:
        ca = f"{server.url}?ca={server.cert}"
        async with opened(f"{ca}&cert={server.cert}&key={server.key}") as registry:
            await registry.put("k", b"x")
            await registry.claim(["id"], b"", await registry.grant(1.0))
            assert (await registry.list("k")).entries[0].value == b"x"
        # Not encrypted; no certificate of the client's own.
        await refusals(server.url, ca)
        (error,) = await refusals(f"{server.url}?ca={tmp_path}/none.pem")
        assert "none.pem" in error
        await until(lambda: not any("end of a session" in t.name for t in threading.enumerate()))
    finally:
        server.kill()


async def test_a_revoke_that_is_cut_off_is_done_in_the_end(
    zookeeper: ZooKeeper, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("domi_fast.registry.zookeeper_session.TIMEOUT", 0.3)
    root = url.rpartition("/")[2]
    async with (
        Proxy(zookeeper.port) as proxy,
        opened(url) as other,
        opened(f"zookeeper://127.0.0.1:{proxy.port}/{root}") as registry,
    ):
        lease = await registry.grant(6.0)
        await registry.put("k", b"", lease=lease)
        proxy.cut()
        revoking = asyncio.ensure_future(lease.revoke())
        # The first try gives up, and what it leaves behind is another client's to end.
        await asyncio.wait([revoking], timeout=0.5)
        assert not revoking.done()
        assert await other.get("k") is not None
        proxy.mend()
        await asyncio.wait_for(revoking, 3)
        assert await other.get("k") is None


async def test_a_server_that_takes_a_connection_and_never_greets(
    zookeeper: ZooKeeper, tmp_path: Path
) -> None:
    """As one that is just starting may do: another connection is tried in good time."""
    async with (
        Proxy(zookeeper.port) as proxy,
        opened(f"zookeeper://127.0.0.1:{proxy.port}/{tmp_path.name}") as registry,
    ):
        proxy.cut()
        before = proxy.connections
        granting = asyncio.ensure_future(registry.grant(1.0))
        await until(lambda: proxy.connections > before)
        proxy.deaden()
        proxy.mend()
        lease = await asyncio.wait_for(granting, 1.8)
        assert not lease.lost.is_set()


def test_a_lock_has_one_holder_while_the_ways_are_cut_at_random(url: str) -> None:
    """Whoever gets it finds every earlier holder's lease over, or the lock given back."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    port, root = int(url.split(":")[2].partition("/")[0]), url.rpartition("/")[2]
    end = time.monotonic() + (60.0 if SOAK else 4.0)
    held: set[Claim] = set()
    epochs: list[int] = []

    def goes_on() -> bool:
        # Where that is not much time, until there is something to see.
        now = time.monotonic()
        return now < end or (len(epochs) <= 3 and now < end + 30.0)

    async def contend(proxy: Proxy) -> None:
        async with opened(f"zookeeper://127.0.0.1:{proxy.port}/{root}") as registry:
            while goes_on():
                with suppress(RegistryError):
                    lease = await registry.grant(0.75)
                    try:
                        claim = await registry.acquire("lock", lease)
                        now = time.monotonic()
                        assert all(other.lease.valid_until <= now for other in held)
                        epochs.append(claim.epoch)
                        held.clear()
                        held.add(claim)
                        with suppress(asyncio.TimeoutError):
                            await asyncio.wait_for(lease.lost.wait(), 0.02)
                        held.discard(claim)
                        await claim.release()
                    finally:
                        await lease.revoke()

    async def cut(proxy: Proxy) -> None:
        while goes_on():
            await asyncio.sleep(chance.uniform(0.2, 1.0))
            proxy.cut()
            await asyncio.sleep(chance.choice((0.1, 0.4, 1.5)))
            proxy.mend()

    async def main() -> None:
        async with Proxy(port) as one, Proxy(port) as two, Proxy(port) as three:
            ways = (one, two, three)
            cuts = [asyncio.ensure_future(cut(way)) for way in ways]
            await asyncio.gather(*map(contend, ways), *cuts)

    asyncio.run(main())
    assert epochs == sorted(set(epochs))
    assert len(epochs) > 3
