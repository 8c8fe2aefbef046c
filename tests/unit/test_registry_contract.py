"""What every registry must do: one suite, run on each backend.

A backend joins by a :class:`Backend` of its own in ``BACKENDS``.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from domi_fast import ClusterFull, Node
from domi_fast.registry import (
    CompareFailed,
    Delete,
    Entry,
    Event,
    Lease,
    LeaseLost,
    NoKeyFree,
    Put,
    Registry,
    RegistryError,
    Reset,
    Snapshot,
    Watch,
    open_registry,
)
from domi_fast.registry.base import MAX_KEY
from domi_fast.registry.local import LocalRegistry
from domi_fast.registry.memory import MemoryRegistry
from domi_fast.registry.opened import OpenedRegistry
from domi_fast.registry.sqlite import SqliteRegistry
from tests.servers import Consul, Etcd, ZooKeeper

T = TypeVar("T")

LIMIT = 30.0


class Backend(ABC):
    """How the suite gets at a backend. Each test has a fresh one.

    :ivar ttl: seconds of a lease that is not long.
    :ivar short_ttl: one that is no longer than that.
    :ivar replays: its watches go on from a cursor and tell every change; those of others begin
        with a Reset, and of changes in quick succession tell the last.
    """

    ttl = 0.5
    short_ttl = 0.25
    replays = True
    url: str

    @abstractmethod
    def make(self) -> Registry:
        """A registry of the cluster under test, not yet open."""

    @abstractmethod
    def hang(self, registry: Registry) -> None:
        """From now on none of its leases is renewed."""

    @abstractmethod
    async def vanish(self, registry: Registry) -> None:
        """Be gone like a killed process."""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Registry]:
        registry = self.make()
        await registry.open()
        try:
            yield registry
        finally:
            await registry.close()


class Memory(Backend):
    def __init__(self, tmp_path: Path) -> None:
        self.url = f"memory://{tmp_path.name}"

    def make(self) -> Registry:
        return open_registry(self.url)

    def hang(self, registry: Registry) -> None:
        assert isinstance(registry, LocalRegistry)
        registry._keep_alive = False

    async def vanish(self, registry: Registry) -> None:
        assert isinstance(registry, MemoryRegistry)
        registry._halt()


class Sqlite(Memory):
    def __init__(self, tmp_path: Path) -> None:
        self.url = f"sqlite://{tmp_path}/registry.sqlite"

    async def vanish(self, registry: Registry) -> None:
        assert isinstance(registry, SqliteRegistry)
        await registry._halt()


class EtcdBackend(Backend):
    ttl = 2.0
    short_ttl = 2.0

    def __init__(self, server: Etcd, name: str) -> None:
        self.url = f"{server.url}/{name}"

    def make(self) -> Registry:
        return open_registry(self.url)

    def hang(self, registry: Registry) -> None:
        assert isinstance(registry, OpenedRegistry)
        registry._keep_alive = False

    async def vanish(self, registry: Registry) -> None:
        from domi_fast.registry.etcd import EtcdRegistry

        assert isinstance(registry, EtcdRegistry)
        registry._halt()


class ZooKeeperBackend(Backend):
    ttl = 1.0
    short_ttl = 1.0
    replays = False

    def __init__(self, server: ZooKeeper, name: str) -> None:
        self.url = f"{server.url}/{name}"

    def make(self) -> Registry:
        return open_registry(self.url)

    def hang(self, registry: Registry) -> None:
        assert isinstance(registry, OpenedRegistry)
        registry._keep_alive = False

    async def vanish(self, registry: Registry) -> None:
        from domi_fast.registry.zookeeper import ZooKeeperRegistry

        assert isinstance(registry, ZooKeeperRegistry)
        registry._halt()


class ConsulBackend(Backend):
    """With leases that are shorter than Consul takes by default, by a setting of its server."""

    ttl = 1.0
    short_ttl = 1.0
    replays = False

    def __init__(self, server: Consul, name: str) -> None:
        self.url = f"{server.url}/{name}"

    def make(self) -> Registry:
        registry = open_registry(self.url)
        registry.limits = replace(registry.limits, min_ttl=self.ttl)
        return registry

    def hang(self, registry: Registry) -> None:
        assert isinstance(registry, OpenedRegistry)
        registry._keep_alive = False

    async def vanish(self, registry: Registry) -> None:
        from domi_fast.registry.consul import ConsulRegistry

        assert isinstance(registry, ConsulRegistry)
        registry._halt()


@pytest.fixture(scope="module")
def consul(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consul]:
    server = Consul(tmp_path_factory.mktemp("consul"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def zookeeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZooKeeper]:
    server = ZooKeeper(tmp_path_factory.mktemp("zookeeper"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    server = Etcd(tmp_path_factory.mktemp("etcd"))
    server.start()
    yield server
    server.kill()


BACKENDS: dict[str, Callable[[pytest.FixtureRequest, Path], Backend]] = {
    "memory": lambda _, path: Memory(path),
    "sqlite": lambda _, path: Sqlite(path),
    "etcd": lambda request, path: EtcdBackend(request.getfixturevalue("etcd"), path.name),
    "zookeeper": lambda request, path: ZooKeeperBackend(
        request.getfixturevalue("zookeeper"), path.name
    ),
    "consul": lambda request, path: ConsulBackend(request.getfixturevalue("consul"), path.name),
}


pytestmark = pytest.mark.contract

EXTERNAL = {name: [pytest.mark.external] for name in ("etcd", "zookeeper", "consul")}


@pytest.fixture(params=[pytest.param(name, marks=EXTERNAL.get(name, ())) for name in BACKENDS])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    return BACKENDS[request.param](request, tmp_path)


@pytest.fixture(
    params=[
        pytest.param(name, marks=EXTERNAL.get(name, ())) for name in ("memory", "sqlite", "etcd")
    ]
)
def replaying(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    """Those whose watches replay."""
    return BACKENDS[request.param](request, tmp_path)


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return asyncio.run(asyncio.wait_for(main(), LIMIT))


async def soon(wait: Awaitable[T], limit: float = 5.0) -> T:
    return await asyncio.wait_for(wait, limit)


async def take(watch: Watch, count: int) -> list[Event]:
    return [await soon(watch.__anext__()) for _ in range(count)]


class View:
    """What is there under a prefix, as a watch that begins now tells it.

    :ivar events: all that it has given.
    """

    def __init__(self, registry: Registry, prefix: str, snapshot: Snapshot) -> None:
        self.watch = registry.watch(prefix, since=snapshot.cursor)
        self.entries = {entry.key: entry for entry in snapshot.entries}
        self.events: list[Event] = []

    @classmethod
    async def of(cls, registry: Registry, prefix: str) -> View:
        return cls(registry, prefix, await registry.list(prefix))

    async def until(self, wanted: Callable[[dict[str, Entry]], object]) -> None:
        while not wanted(self.entries):
            self.see(await soon(self.watch.__anext__()))

    def see(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Reset):
            self.entries = {entry.key: entry for entry in event.snapshot.entries}
        elif isinstance(event, Put):
            self.entries[event.entry.key] = event.entry
        else:
            del self.entries[event.key]

    def values(self, key: str) -> list[int]:
        """All that it has told of the key, in order."""
        told = [
            [event.entry] if isinstance(event, Put) else event.snapshot.entries
            for event in self.events
            if not isinstance(event, Delete)
        ]
        return [int(entry.value) for entries in told for entry in entries if entry.key == key]


async def stays(wait: Coroutine[Any, Any, object], seconds: float) -> bool:
    """Whether the wait is still on after so many seconds; it is then cancelled."""
    try:
        await asyncio.wait_for(wait, seconds)
    except asyncio.TimeoutError:
        return True
    return False


async def pending(task: asyncio.Future[Any]) -> None:
    await asyncio.wait([task])


# ---------------------------------------------------------------------------- keys and values


def test_values_are_written_read_and_deleted(backend: Backend) -> None:
    async def main() -> None:
        async with backend.open() as one, backend.open() as two:
            assert await one.get("a/b") is None
            written = await one.put("a/b", b"1")
            assert (written.key, written.value) == ("a/b", b"1")
            assert await two.get("a/b") == written
            again = await two.put("a/b", b"")
            assert again.version != written.version
            assert again.epoch == written.epoch
            assert await one.get("a/b") == again
            assert await one.delete("a/b") is True
            assert await two.delete("a/b") is False
            assert await two.get("a/b") is None

    run(main)


def test_a_write_can_be_bound_to_a_version(backend: Backend) -> None:
    async def main() -> None:
        async with backend.open() as one, backend.open() as two:
            first = await one.create("k", b"1")
            with pytest.raises(CompareFailed):
                await two.create("k", b"2")
            second = await two.put("k", b"2", expect=first.version)
            with pytest.raises(CompareFailed):
                await one.put("k", b"3", expect=first.version)
            with pytest.raises(CompareFailed):
                await one.delete("k", expect=first.version)
            assert await one.get("k") == second
            assert await one.delete("k", expect=second.version) is True
            assert await one.delete("k", expect=second.version) is False
            with pytest.raises(CompareFailed):
                await one.put("k", b"4", expect=second.version)
            # A key that was made anew is not at the version that it once had.
            third = await one.create("k", b"2")
            assert third.version not in (first.version, second.version)

    run(main)


def test_the_epoch_grows_across_deletion(backend: Backend) -> None:
    async def main() -> None:
        async with backend.open() as registry:
            epochs = []
            for _ in range(5):
                epochs.append((await registry.create("k", b"")).epoch)
                await registry.put("other", b"")
                await registry.delete("k")
            assert epochs == sorted(set(epochs))

    run(main)


def test_a_list_has_exactly_the_keys_with_the_prefix_in_order(backend: Backend) -> None:
    async def main() -> None:
        keys = ["node/10", "node/2", "node/é", "node", "nodes/1", "nod", "node/2/x", "zz"]
        async with backend.open() as registry:
            assert (await registry.list("")).entries == ()
            for key in keys:
                await registry.put(key, key.encode())
            for prefix in ("", "node/", "node", "node/2", "zz", "zzz"):
                found = (await registry.list(prefix)).entries
                assert [e.key for e in found] == sorted(k for k in keys if k.startswith(prefix))
                assert all(e.value == e.key.encode() for e in found)

    run(main)


@pytest.mark.parametrize(
    "key",
    ["a b+c", "%41/%2F", "?x=1&y#z;", "é/\U00010384", ".x/y.", "~|^`{}\"'<>[]\\", ":@!$*(),="],
)
def test_a_key_has_any_characters_of_text(backend: Backend, key: str) -> None:
    async def main() -> None:
        async with backend.open() as one, backend.open() as two:
            written = await one.put(key, b"1")
            assert await two.get(key) == written
            for prefix in ("", key[:1], key):
                assert (await two.list(prefix)).entries == (written,)
            view = await View.of(two, key)
            again = await one.put(key, b"2", expect=written.version)
            await view.until(lambda entries: entries == {key: again})
            assert await two.delete(key) is True
            await view.until(lambda entries: not entries)
            claim = await one.acquire(key, await one.grant(backend.ttl))
            assert claim.key == key

    run(main)


def test_a_prefix_that_no_key_has(backend: Backend) -> None:
    async def main() -> None:
        async with backend.open() as registry:
            await registry.put("a/b", b"")
            for prefix in ("a//", "a/./b", "a/../a", "../", "/", "a/.", "..", "a/b/"):
                assert (await registry.list(prefix)).entries == ()

    run(main)


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "a/./b", "..", "a\0b", "a\nb", "\ud800", "x" * 401]
)
def test_a_key_that_not_every_backend_can_hold_is_refused(backend: Backend, key: str) -> None:
    async def main() -> None:
        async with backend.open() as registry:
            lease = await registry.grant(backend.ttl)
            for call in (
                lambda: registry.get(key),
                lambda: registry.put(key, b""),
                lambda: registry.create(key, b""),
                lambda: registry.delete(key),
                lambda: registry.claim([key], b"", lease),
                lambda: registry.acquire(key, lease),
            ):
                with pytest.raises(RegistryError):
                    await call()

    run(main)


def test_values_and_leases_beyond_the_limits_are_refused(backend: Backend) -> None:
    async def main() -> None:
        async with backend.open() as registry:
            largest = registry.limits.max_value
            longest = "é" * (MAX_KEY // 2)
            for key in ("k", longest):
                assert len((await registry.put(key, bytes(largest))).value) == largest
                assert await registry.delete(key)
            lease = await registry.grant(backend.ttl)
            claim = await registry.acquire(longest, lease, bytes(largest))
            await claim.update(b"x" * largest)
            entry = await registry.get(longest)
            assert entry is not None
            assert entry.value == b"x" * largest
            for bad in (bytes(largest + 1), "text", None):
                with pytest.raises(RegistryError):
                    await registry.put("k", bad)  # type: ignore[arg-type]
            shorter = registry.limits.min_ttl * 0.9
            for ttl in (shorter, 0.0, -1.0, float("nan"), float("inf"), True, "3", None):
                with pytest.raises(RegistryError, match=f"a lease of {ttl!r} s: it must last from"):
                    await registry.grant(ttl)  # type: ignore[arg-type]

    run(main)


# ---------------------------------------------------------------------------- watches


def test_a_watch_arrives_at_what_is_there(backend: Backend) -> None:
    async def main() -> None:
        async with backend.open() as one, backend.open() as two:
            await one.put("w/0", b"before")
            snapshot = await one.list("w/")
            first = await two.put("w/1", b"1")
            await two.put("elsewhere", b"")
            await two.delete("w/0")
            view = View(one, "w/", snapshot)
            await view.until(lambda entries: entries == {"w/1": first})
            there = [await two.put(key, b"later") for key in ("w/2", "w/1/below", "w/é", "w/1")]
            await view.until(lambda entries: set(entries.values()) == set(there))
            await two.delete("w/1")
            again = await two.create("w/1", b"anew")
            await view.until(lambda entries: entries.get("w/1") == again)
            await two.delete("w/1")
            await view.until(lambda entries: set(entries.values()) == set(there[:3]))

    run(main)


def test_a_watch_goes_on_from_a_snapshot_without_a_gap(replaying: Backend) -> None:
    backend = replaying

    async def main() -> None:
        async with backend.open() as one, backend.open() as two:
            await one.put("w/0", b"before")
            snapshot = await one.list("w/")
            put = await two.put("w/1", b"1")
            await two.put("elsewhere", b"")
            await two.delete("w/0")
            watch = one.watch("w/", since=snapshot.cursor)
            first, second = await take(watch, 2)
            assert isinstance(first, Put)
            assert first.entry == put
            assert isinstance(second, Delete)
            assert second.key == "w/0"
            # From the cursor of an event another watch goes on as well.
            other = two.watch("w/", since=first.cursor)
            assert await take(other, 1) == [second]

            waiting = asyncio.ensure_future(watch.__anext__())
            put = await two.put("w/2", b"later")
            event = await soon(waiting)
            assert isinstance(event, Put)
            assert event.entry == put

    run(main)


def test_many_changes_by_many_arrive_in_order(backend: Backend) -> None:
    async def main() -> None:
        async with backend.open() as one, backend.open() as two, backend.open() as three:
            cursor = (await one.list("w/")).cursor
            view = View(one, "w/", await one.list("w/"))

            async def write(registry: Registry, name: str) -> None:
                for i in range(300):
                    await registry.put(f"w/{name}", str(i).encode())

            writers = asyncio.gather(write(two, "two"), write(three, "three"))
            await view.until(
                lambda entries: [e.value for e in entries.values()] == [b"299", b"299"]
            )
            await writers
            for name in ("two", "three"):
                values = view.values(f"w/{name}")
                assert values == (list(range(300)) if backend.replays else sorted(set(values)))
            if backend.replays:
                assert await take(three.watch("w/", since=cursor), 600) == view.events

    run(main)


def test_a_cursor_that_means_nothing_gives_a_reset(backend: Backend) -> None:
    async def main() -> None:
        async with backend.open() as registry:
            await registry.put("w/1", b"1")
            for cursor in (None, "from elsewhere", ("x", 1), -1):
                watch = registry.watch("w/", since=cursor)
                (event,) = await take(watch, 1)
                assert isinstance(event, Reset)
                assert [e.key for e in event.snapshot.entries] == ["w/1"]
                put = await registry.put("w/1", b"2")
                (event,) = await take(watch, 1)
                assert isinstance(event, Put)
                assert event.entry == put
                await watch.aclose()

    run(main)


def test_a_cancelled_wait_in_a_watch_loses_nothing(backend: Backend) -> None:
    async def main() -> None:
        async with backend.open() as one, backend.open() as two:
            view = await View.of(one, "w/")
            for i in range(40):
                waiting = asyncio.ensure_future(view.watch.__anext__())
                for _ in range(i % 5):
                    await asyncio.sleep(0)
                await two.put("w/k", str(i).encode())
                for _ in range(i % 7):
                    await asyncio.sleep(0)
                waiting.cancel()
                with suppress(asyncio.CancelledError):
                    view.see(await waiting)
            await view.until(lambda entries: "w/k" in entries and entries["w/k"].value == b"39")
            values = view.values("w/k")
            assert values == (list(range(40)) if backend.replays else sorted(set(values)))

    run(main)


def test_a_watch_ends_by_aclose_and_with_its_registry(backend: Backend) -> None:
    async def main() -> None:
        async with backend.open() as registry:
            cursor = (await registry.list("")).cursor

            async def read(watch: Watch) -> list[Event]:
                return [event async for event in watch if not isinstance(event, Reset)]

            for end in ("aclose", "close"):
                watch = registry.watch("", since=cursor)
                reading = asyncio.ensure_future(read(watch))
                assert await stays(pending(reading), 0.05)
                await (watch.aclose() if end == "aclose" else registry.close())
                assert await soon(reading) == []
                with pytest.raises(StopAsyncIteration):
                    await watch.__anext__()

    run(main)


def test_a_node_is_refused_when_every_id_is_held(backend: Backend) -> None:
    """Until one of them is free."""

    async def main() -> None:
        async with backend.open() as registry:
            # So many keys at once hold the loop up, and with it what keeps a short lease alive.
            lease = await registry.grant(max(backend.ttl, 3.0))
            keys = [f"domi/default/nodes/{machine:04d}" for machine in range(1024)]
            for begin in range(0, 1024, 64):
                some = keys[begin : begin + 64]
                await asyncio.gather(*[registry.create(key, b"{}", lease=lease) for key in some])
            node = Node("late", registry=backend.url)
            with pytest.raises(ClusterFull, match="all machine ids of cluster 'default'") as caught:
                await node.start()
            assert caught.value.limit == 1024
            assert node.id == -1
            await registry.delete(keys[517])
            async with Node("later", registry=backend.url) as node:
                assert node.id == 517

    run(main)


# ---------------------------------------------------------------------------- leases


def test_what_is_bound_to_a_lease_goes_when_it_is_revoked(backend: Backend) -> None:
    async def main() -> None:
        async with backend.open() as one, backend.open() as two:
            lease = await one.grant(backend.ttl)
            await one.put("k/1", b"", lease=lease)
            await one.create("k/2", b"", lease=lease)
            await one.put("k/3", b"", lease=lease)
            await one.put("k/3", b"unbound now")
            view = await View.of(two, "k/")
            await lease.revoke()
            await lease.revoke()
            assert [e.key for e in (await two.list("k/")).entries] == ["k/3"]
            await view.until(lambda entries: list(entries) == ["k/3"])
            assert not lease.lost.is_set()
            assert lease.valid_until <= time.monotonic()
            for call in (
                lambda: one.put("k/1", b"", lease=lease),
                lambda: one.create("k/1", b"", lease=lease),
                lambda: one.claim(["k/1"], b"", lease),
                lambda: one.acquire("k/1", lease),
            ):
                with pytest.raises(LeaseLost):
                    await call()
            assert await one.get("k/1") is None

    run(main)


def test_a_lease_is_kept_alive(backend: Backend) -> None:
    async def main() -> None:
        async with backend.open() as one, backend.open() as two:
            before = time.monotonic()
            lease = await one.grant(backend.ttl)
            assert lease.ttl == backend.ttl
            assert before + backend.ttl <= lease.valid_until <= time.monotonic() + backend.ttl
            await one.put("k", b"", lease=lease)
            first = lease.valid_until
            assert await stays(lease.lost.wait(), 3 * backend.ttl)
            assert first < time.monotonic() < lease.valid_until <= time.monotonic() + backend.ttl
            assert await two.get("k") is not None

    run(main)


def test_a_holder_that_hangs_loses_its_lease_and_cannot_write(backend: Backend) -> None:
    async def main() -> None:
        async with backend.open() as one, backend.open() as two:
            lease = await one.grant(backend.ttl)
            claim = await one.claim(["id/1"], b"old", lease)
            view = await View.of(two, "id/")
            backend.hang(one)
            await soon(lease.lost.wait())
            assert lease.valid_until <= time.monotonic() <= lease.valid_until + 0.25
            await view.until(lambda entries: not entries)
            heir = await two.claim(["id/1"], b"new", await two.grant(backend.ttl))
            assert heir.epoch > claim.epoch
            with pytest.raises(LeaseLost):
                await claim.update(b"from the grave")
            await claim.release()
            await lease.revoke()
            entry = await one.get("id/1")
            assert entry is not None
            assert (entry.value, entry.epoch) == (b"new", heir.epoch)

    run(main)


def test_the_keys_of_a_killed_holder_go_within_the_bound(backend: Backend) -> None:
    async def main() -> None:
        one = backend.make()
        await one.open()
        async with backend.open() as two:
            lease = await one.grant(backend.ttl)
            await one.put("k", b"", lease=lease)
            view = await View.of(two, "k")
            await backend.vanish(one)
            await view.until(lambda entries: not entries)
            now = time.monotonic()
            bound = two.limits.gone_after(lease.ttl) + 0.15
            assert lease.valid_until <= now <= lease.valid_until + bound

    run(main)


def test_the_lease_of_another_registry_is_refused(backend: Backend) -> None:
    async def main() -> None:
        async with backend.open() as one, backend.open() as two:
            lease = await one.grant(backend.ttl)
            with pytest.raises(RegistryError, match="another registry"):
                await two.put("k", b"", lease=lease)

    run(main)


# ---------------------------------------------------------------------------- claims


def test_a_claim_takes_the_first_free_key(backend: Backend) -> None:
    async def main() -> None:
        keys = [f"id/{i}" for i in range(3)]
        async with backend.open() as one, backend.open() as two:
            lease, other = await one.grant(backend.ttl), await two.grant(backend.ttl)
            first = await one.claim(keys, b"a", lease)
            second = await two.claim(keys, b"b", other)
            third = await one.claim(keys, b"c", lease)
            assert [c.key for c in (first, second, third)] == keys
            assert first.lease is lease
            for registry, bound in ((one, lease), (two, other)):
                with pytest.raises(NoKeyFree):
                    await registry.claim(keys, b"", bound)
            await second.update(b"b2")
            entry = await one.get("id/1")
            assert entry is not None
            assert (entry.value, entry.epoch) == (b"b2", second.epoch)
            await second.release()
            await second.release()
            with pytest.raises(LeaseLost):
                await second.update(b"b3")
            fourth = await one.claim(keys, b"d", lease)
            assert fourth.key == "id/1"
            assert fourth.epoch > second.epoch
            # The lease outlives the release of what was bound to it.
            assert (await two.claim(["id/9"], b"", other)).key == "id/9"

    run(main)


def test_a_claim_ends_when_somebody_else_takes_or_deletes_the_key(backend: Backend) -> None:
    async def main() -> None:
        async with backend.open() as one, backend.open() as two:
            lease = await one.grant(backend.ttl)
            deleted = await one.claim(["id/1"], b"", lease)
            taken = await one.claim(["id/2"], b"", lease)
            await two.delete("id/1")
            heir = await two.put("id/2", b"mine")
            for claim in (deleted, taken):
                with pytest.raises(LeaseLost):
                    await claim.update(b"")
                await claim.release()
            assert await two.get("id/2") == heir

    run(main)


def test_no_key_is_claimed_twice_by_many_at_once(backend: Backend) -> None:
    async def main() -> None:
        keys = [f"id/{i}" for i in range(40)]
        async with backend.open() as one, backend.open() as two:

            async def claim_all(registry: Registry) -> list[str]:
                lease = await registry.grant(2.0)
                claims = (registry.claim(keys, b"", lease) for _ in range(20))
                return [claim.key for claim in await asyncio.gather(*claims)]

            got = await asyncio.gather(claim_all(one), claim_all(two))
            assert sorted(got[0] + got[1]) == sorted(keys)

    run(main)


# ---------------------------------------------------------------------------- locks


def test_a_lock_goes_to_who_came_first(backend: Backend) -> None:
    async def main() -> None:
        async with backend.open() as one, backend.open() as two:
            order: list[int] = []
            epochs: list[int] = []
            lease = await one.grant(2.0)
            held = await one.acquire("lock", lease, b"holder")
            assert held.key == "lock"
            entry = await two.get("lock")
            assert entry is not None
            assert (entry.value, entry.epoch) == (b"holder", held.epoch)
            with pytest.raises(NoKeyFree):
                await two.claim(["lock"], b"", await two.grant(backend.ttl))

            async def wait(number: int, registry: Registry, lease: Lease) -> None:
                claim = await registry.acquire("lock", lease)
                order.append(number)
                epochs.append(claim.epoch)
                await claim.release()

            waiters = []
            for number in range(8):
                registry = one if number % 2 else two
                waiting = wait(number, registry, await registry.grant(5.0))
                waiters.append(asyncio.ensure_future(waiting))
                assert await stays(pending(waiters[-1]), 0.05)
            await held.release()
            await soon(asyncio.gather(*waiters))
            assert order == list(range(8))
            assert [held.epoch, *epochs] == sorted({held.epoch, *epochs})

    run(main)


def test_a_dead_waiter_is_passed_over_and_a_dead_holder_succeeded(backend: Backend) -> None:
    async def main() -> None:
        holder, corpse = backend.make(), backend.make()
        await holder.open()
        await corpse.open()
        async with backend.open() as heir:
            lease = await holder.grant(backend.ttl)
            held = await holder.acquire("lock", lease)
            bound = await corpse.grant(backend.short_ttl)
            second = asyncio.ensure_future(corpse.acquire("lock", bound))
            assert await stays(pending(second), 0.05)
            third = asyncio.ensure_future(heir.acquire("lock", await heir.grant(backend.ttl)))
            assert await stays(pending(third), 0.05)
            await backend.vanish(corpse)
            with pytest.raises(RegistryError):
                await second
            await backend.vanish(holder)
            claim = await soon(third)
            assert time.monotonic() >= lease.valid_until
            assert claim.epoch > held.epoch

    run(main)


def test_waiting_for_a_lock_ends_with_the_lease(backend: Backend) -> None:
    async def main() -> None:
        async with backend.open() as one, backend.open() as two:
            held = await one.acquire("lock", await one.grant(backend.ttl))
            for end in ("revoke", "hang"):
                lease = await two.grant(backend.ttl)
                waiting = asyncio.ensure_future(two.acquire("lock", lease))
                assert await stays(pending(waiting), 0.05)
                if end == "revoke":
                    await lease.revoke()
                else:
                    backend.hang(two)
                with pytest.raises(LeaseLost):
                    await soon(waiting)
            await held.release()
            assert await one.get("lock") is None

    run(main)


# ---------------------------------------------------------------------------- cancellation


async def cancel_after(steps: int, call: Awaitable[T]) -> T | None:
    """Cancel the call after so many turns of the loop; its result if it was quicker."""
    task = asyncio.ensure_future(call)
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        return None


def test_a_cancelled_claim_leaves_no_key_held(backend: Backend) -> None:
    async def main() -> None:
        keys = [f"id/{i}" for i in range(60)]
        async with backend.open() as one, backend.open() as two:
            lease = await one.grant(2.0)
            for steps in range(60):
                claim = await cancel_after(steps, one.claim(keys, b"", lease))
                if claim is not None:
                    await claim.release()
            # Done after all that this registry was asked for before.
            await one.put("done", b"")
            assert (await two.list("id/")).entries == ()

    run(main)


def test_a_cancelled_acquire_leaves_neither_lock_nor_place(backend: Backend) -> None:
    async def main() -> None:
        async with backend.open() as one, backend.open() as two:
            lease = await one.grant(2.0)
            for steps in range(60):
                claim = await cancel_after(steps, one.acquire("lock", lease))
                if claim is not None:
                    await claim.release()
            held = await two.acquire("lock", await two.grant(2.0))
            for steps in range(60):
                assert await cancel_after(steps, one.acquire("lock", lease)) is None
            await one.put("done", b"")
            await held.release()
            assert await two.get("lock") is None
            # Cancelled at the very moment when the lock is handed over.
            for steps in range(40):
                held = await two.acquire("lock", held.lease)
                waiting = asyncio.ensure_future(one.acquire("lock", lease))
                assert await stays(pending(waiting), 0.005)
                await held.release()
                claim = await cancel_after(steps, waiting)
                if claim is not None:
                    await claim.release()
                await one.put("done", b"")
                assert await two.get("lock") is None

    run(main)


def test_a_cancelled_revoke_or_release_is_done_all_the_same(backend: Backend) -> None:
    async def main() -> None:
        async with backend.open() as one, backend.open() as two:
            for steps in range(20):
                lease = await one.grant(2.0)
                claim = await one.claim(["id/1"], b"", lease)
                await cancel_after(steps + 1, claim.release())
                await one.put("done", b"")
                assert await two.get("id/1") is None
                await one.put("k", b"", lease=lease)
                await cancel_after(steps + 1, lease.revoke())
                await one.put("done", b"")
                assert await two.get("k") is None

    run(main)


# ---------------------------------------------------------------------------- life cycle


def test_closing_revokes_and_ends_what_waits(backend: Backend) -> None:
    async def main() -> None:
        async with backend.open() as other:
            registry = backend.make()
            await registry.open()
            lease = await registry.grant(2.0)
            claim = await registry.claim(["id/1"], b"", lease)
            held = await other.acquire("lock", await other.grant(2.0))
            waiting = asyncio.ensure_future(registry.acquire("lock", lease))
            assert await stays(pending(waiting), 0.05)
            await asyncio.gather(registry.close(), registry.close())
            await registry.close()
            assert not lease.lost.is_set()
            assert lease.valid_until <= time.monotonic()
            assert await other.get("id/1") is None
            with pytest.raises(RegistryError):
                await soon(waiting)
            await held.release()
            assert await other.get("lock") is None
            # What tidies up afterwards finds nothing to do.
            await claim.release()
            await lease.revoke()
            with pytest.raises(RegistryError, match="closed"):
                await registry.get("k")
            with pytest.raises(RegistryError):
                await registry.open()

    run(main)


def test_a_registry_is_used_only_when_open_and_on_its_loop(backend: Backend) -> None:
    async def main() -> None:
        registry = backend.make()
        with pytest.raises(RegistryError, match="not open"):
            await registry.get("k")
        with pytest.raises(RegistryError, match="not open"):
            registry.watch("", since=None)
        await registry.open()
        with pytest.raises(RegistryError):
            await registry.open()

        def elsewhere() -> None:
            with pytest.raises(RegistryError, match="loop"):
                asyncio.run(_get(registry))

        await asyncio.get_running_loop().run_in_executor(None, elsewhere)
        await registry.close()
        never_opened = backend.make()
        await never_opened.close()
        await never_opened.close()

    run(main)


async def _get(registry: Registry) -> object:
    return await registry.get("k")


def test_threads_with_loops_of_their_own_share_the_registry(backend: Backend) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with backend.open() as registry:
            view = await View.of(registry, "w/")

            async def there() -> None:
                async with backend.open() as other:
                    for i in range(20):
                        await other.put(f"w/{i}", b"")
                    lease = await other.grant(2.0)
                    claim = await other.acquire("lock", lease)
                    await claim.release()

            held = await registry.acquire("lock", await registry.grant(2.0))
            thread = loop.run_in_executor(None, run, there)
            await view.until(lambda entries: len(entries) == 20)
            assert list(view.entries) == [f"w/{i}" for i in range(20)]
            await held.release()
            await soon(thread)

    run(main)
