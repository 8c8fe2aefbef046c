"""Names of a node, all under one lease: ``node.cluster.names``, on each registry."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from domi_fast import DomiError, Holder, Name, NameTaken, Node, RegistryError
from tests.servers import Consul, Etcd, Server, ZooKeeper
from tests.support import forget_records, nodes, until

KIND = "groups.room"
LEASES = {"memory": 0.5, "sqlite": 0.5, "etcd": 2.0, "zookeeper": 2.0, "consul": 10.0}
SERVERS: dict[str, type[Etcd | ZooKeeper | Consul]] = {
    "etcd": Etcd,
    "zookeeper": ZooKeeper,
    "consul": Consul,
}


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.external] if name in SERVERS else [])
        for name in LEASES
    ],
)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server | None]:
    if backend not in SERVERS:
        yield None
        return
    server = SERVERS[backend](tmp_path_factory.mktemp(backend))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def lease(backend: str) -> float:
    return LEASES[backend]


@pytest.fixture
def url(backend: str, server: Any, tmp_path: Path) -> str:
    if backend == "memory":
        return f"memory://{tmp_path.name}"
    if backend == "sqlite":
        return f"sqlite://{tmp_path}/registry.sqlite"
    return f"{server.url}/{tmp_path.name}"


def keeper(node: Node) -> Any:
    return node.cluster._names


async def end_its_lease(node: Node) -> None:
    """As when the registry has taken the node for dead: the next renewal finds nothing."""
    registry: Any = node._mesh._registry
    await registry._revoke(keeper(node)._lease)


async def try_to_claim(node: Node, name: str) -> Name | NameTaken:
    try:
        return await node.cluster.names(KIND).claim(name, node.config.name.encode())
    except NameTaken as taken:
        return taken


async def taken_by(node: Node, name: str) -> Holder:
    with pytest.raises(NameTaken) as caught:
        await node.cluster.names(KIND).claim(name)
    assert caught.value.peer == caught.value.holder.id
    return caught.value.holder


async def starve(node: Node) -> None:
    """No lease of the node is renewed until the one of its names is over."""
    registry: Any = node._mesh._registry
    lease = keeper(node)._lease
    registry._keep_alive = False
    await until(lease.lost.is_set, 2 * lease.ttl + 5.0)
    registry._keep_alive = True


# ------------------------------------------------------------------------------ holding and finding


async def test_a_name_is_held_found_changed_and_released(url: str, lease: float) -> None:
    async with nodes(url, "a", "b", lease_ttl=lease) as (a, b):
        mine, others = a.cluster.names(KIND), b.cluster.names(KIND)
        assert await others.find("r1") is None
        name = await mine.claim("r1", b"tcp\n\x00\xff")
        assert (name.name, name.value, name.held) == ("r1", b"tcp\n\x00\xff", True)
        holder = Holder(a.id, "a", b"tcp\n\x00\xff", name.epoch)
        for names in (mine, others):
            assert await names.find("r1") == holder
        assert await taken_by(b, "r1") == holder
        assert await taken_by(a, "r1") == holder

        await name.update(b"another")
        assert name.value == b"another"
        assert await others.find("r1") == Holder(a.id, "a", b"another", name.epoch)

        await name.release()
        await name.release()
        assert not name.held
        assert not name.lost.is_set()
        assert await others.find("r1") is None
        with pytest.raises(DomiError, match="released or lost"):
            await name.update(b"late")

        later = await others.claim("r1")
        assert later.epoch > name.epoch
        assert await mine.find("r1") == Holder(b.id, "b", b"", later.epoch)


async def test_two_claim_at_once_and_one_wins(url: str, lease: float) -> None:
    async with nodes(url, "a", "b", lease_ttl=lease) as (a, b):
        for number in range(5):
            # Of each node two tasks.
            found = await asyncio.gather(
                *(try_to_claim(node, f"r{number}") for node in (a, b, a, b))
            )
            (won,) = [each for each in found if isinstance(each, Name)]
            refused = [each for each in found if isinstance(each, NameTaken)]
            holder = await a.cluster.names(KIND).find(f"r{number}")
            assert holder is not None
            assert holder.epoch == won.epoch
            assert [each.holder for each in refused] == [holder] * 3


async def test_kinds_elections_and_clusters_are_apart(registry_url: str) -> None:
    async with (
        nodes(registry_url, "a") as (a,),
        Node("a", registry=registry_url, cluster="elsewhere") as stranger,
        a.cluster.elect("r1"),
        a.cluster.lock("r1"),
    ):
        found = [
            await node.cluster.names(kind).claim("r1")
            for node, kind in ((a, "one"), (a, "two"), (stranger, "one"))
        ]
        assert all(name.held for name in found)


async def test_all_names_hang_on_one_lease(url: str, lease: float, backend: str) -> None:
    """Two thousand of them; the node's close frees them at once."""
    count = 2_000 if backend in {"memory", "sqlite", "etcd"} else 500
    async with nodes(url, "b", lease_ttl=lease) as (b,):
        async with Node("a", registry=url, lease_ttl=lease) as a:
            registry: Any = a._mesh._registry
            before = len(registry._leases)
            names = a.cluster.names(KIND)
            found: list[Name] = []
            for first in range(0, count, 100):
                group = range(first, first + 100)
                found += await asyncio.gather(*(names.claim(f"n{number}") for number in group))
            assert len(registry._leases) == before + 1
            assert {name._claim.lease for name in found} == {keeper(a)._lease}
            for number in (0, count - 1):
                assert (await taken_by(b, f"n{number}")).name == "a"
        assert all(name.lost.is_set() for name in found)
        for number in (0, count - 1):
            assert (await b.cluster.names(KIND).claim(f"n{number}")).held


# ------------------------------------------------------------------------------------- its loss


async def test_a_lease_that_was_lost_costs_no_name(url: str, lease: float) -> None:
    """With the value that each had last."""
    async with nodes(url, "a", "b", lease_ttl=lease) as (a, b):
        names = a.cluster.names(KIND)
        found = [await names.claim(f"n{number}", b"old") for number in range(40)]
        for name in found:
            await name.update(name.name.encode())
        before = [name.epoch for name in found]
        await starve(a)
        await until(lambda: all(n.epoch > e for n, e in zip(found, before, strict=True)), 20.0)
        for name in found:
            holder = Holder(a.id, "a", name.name.encode(), name.epoch)
            assert await b.cluster.names(KIND).find(name.name) == holder
            assert name.held
        # And they are a node's as ever.
        await found[0].update(b"new")
        await found[1].release()
        assert (await taken_by(b, "n0")).value == b"new"
        assert (await b.cluster.names(KIND).claim("n1")).held


async def test_a_name_that_another_took_meanwhile_is_lost(url: str, lease: float) -> None:
    async with nodes(url, "a", "b", lease_ttl=lease) as (a, b):
        gone = await a.cluster.names(KIND).claim("gone")
        kept = await a.cluster.names(KIND).claim("kept")
        before = kept.epoch
        # The node is kept from claiming again, as by a registry that is away for it alone.
        async with gone._changing:
            await starve(a)
            found: list[Name | NameTaken] = []
            while not (found and isinstance(found[-1], Name)):
                found.append(await try_to_claim(b, "gone"))
        await asyncio.wait_for(gone.lost.wait(), 20.0)
        await until(lambda: kept.epoch > before, 20.0)
        assert (gone.held, kept.held) == (False, True)
        assert (await taken_by(a, "gone")).name == "b"
        with pytest.raises(DomiError, match="released or lost"):
            await gone.update(b"late")
        await gone.release()
        assert (await taken_by(a, "gone")).name == "b"


async def test_what_is_left_of_its_own_claim_is_no_other(registry_url: str) -> None:
    """A registry that was away itself may give a lease its whole length again."""
    async with nodes(registry_url, "a", lease_ttl=0.5) as (a,):
        registry, names = a._mesh._registry, a.cluster.names(KIND)
        name = await names.claim("r1", b"v")
        before = name.epoch
        value = (await registry.list(name._key)).entries[0].value
        async with name._changing:
            await end_its_lease(a)
            await until(keeper(a)._lease.lost.is_set)
            await registry.put(name._key, value)
            await registry.put(name._key.replace("r1", "r2"), value)
        await until(lambda: name.epoch > before)
        assert await names.find("r1") == Holder(a.id, "a", b"v", name.epoch)
        # Nor does it keep this node from a name that it does not hold.
        assert (await names.claim("r2")).held


async def test_an_outage_is_outlasted(
    registry_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing busy, one word of it in the log, and the names are there again with the registry."""
    async with nodes(registry_url, "a", lease_ttl=0.5) as (a,):
        registry: Any = a._mesh._registry
        names = a.cluster.names(KIND)
        name = await names.claim("r1", b"v")
        grant, asked = registry.grant, 0

        async def away(ttl: float) -> Any:
            nonlocal asked
            asked += 1
            raise RegistryError("it is away")

        monkeypatch.setattr(registry, "grant", away)
        before = name.epoch
        await end_its_lease(a)
        begun = time.monotonic()
        await until(lambda: asked >= 4)
        assert time.monotonic() - begun > 3 * 0.1
        assert name.held
        with pytest.raises(RegistryError):
            await name.update(b"w")
        assert name.value == b"v"
        with pytest.raises(RegistryError, match="it is away"):
            await names.claim("r2")
        monkeypatch.setattr(registry, "grant", grant)
        await until(lambda: name.epoch > before)
        assert (await names.find("r1")) == Holder(a.id, "a", b"v", name.epoch)
        told = [each for each in caplog.messages if "cannot claim its names again" in each]
        assert told == ["a: cannot claim its names again: it is away"]


async def test_a_name_that_was_released_in_an_outage_stays_so(registry_url: str) -> None:
    async with nodes(registry_url, "a", lease_ttl=0.5) as (a,):
        names = a.cluster.names(KIND)
        one, two = await names.claim("r1"), await names.claim("r2")
        before = two.epoch
        async with two._changing:
            await end_its_lease(a)
            await until(lambda: keeper(a)._lease is not two._claim.lease)
        await one.release()
        await until(lambda: two.epoch > before)
        assert await names.find("r1") is None
        assert not one.lost.is_set()


async def test_a_key_that_somebody_deleted_is_taken_again_by_an_update(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        name = await a.cluster.names(KIND).claim("r1")
        await b._mesh._registry.delete(name._key)
        await name.update(b"w")
        assert await b.cluster.names(KIND).find("r1") == Holder(a.id, "a", b"w", name.epoch)
        await b._mesh._registry.delete(name._key)
        await b.cluster.names(KIND).claim("r1")
        with pytest.raises(DomiError, match="lost"):
            await name.update(b"x")
        assert name.lost.is_set()
        assert name.value == b"w"


# ------------------------------------------------------------------------------ the end, and misuse


async def test_closing_the_node_frees_its_names_at_once(url: str, lease: float) -> None:
    async with nodes(url, "a", "b", lease_ttl=lease) as (a, b):
        names = a.cluster.names(KIND)
        found = [await names.claim(f"n{number}") for number in range(3)]
        waiting = asyncio.ensure_future(found[0].lost.wait())
        await a.close()
        await asyncio.wait_for(waiting, 5.0)
        for name in found:
            assert name.lost.is_set()
            await name.release()
            assert (await b.cluster.names(KIND).claim(name.name)).held
        for late in (names.claim("r1"), names.find("r1"), found[0].update(b"")):
            with pytest.raises(DomiError, match="the node was closed"):
                await late


async def test_names_are_lost_also_with_a_node_that_waits_for_nothing(registry_url: str) -> None:
    async with nodes(registry_url, "a", drain_timeout=0) as (a,):
        name = await a.cluster.names(KIND).claim("r1")
        await a.close()
        assert name.lost.is_set()


async def test_a_claim_under_way_when_its_node_closes(registry_url: str) -> None:
    async with nodes(registry_url, "b") as (b,):
        for turns in range(8):
            a = Node("a", registry=registry_url)
            await a.start()
            claiming = asyncio.ensure_future(try_to_claim(a, "r1"))
            for _ in range(turns):
                await asyncio.sleep(0)
            await a.close()
            (outcome,) = await asyncio.gather(claiming, return_exceptions=True)
            assert isinstance(outcome, (DomiError, Name))
            assert isinstance(outcome, DomiError) or outcome.lost.is_set()
            assert await b.cluster.names(KIND).find("r1") is None


async def test_a_claim_that_is_cancelled_leaves_nothing(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        for turns in range(8):
            claiming = asyncio.ensure_future(try_to_claim(a, f"r{turns}"))
            for _ in range(turns):
                await asyncio.sleep(0)
            if claiming.cancel():
                await asyncio.wait([claiming])
            if claiming.cancelled():
                assert await b.cluster.names(KIND).find(f"r{turns}") is None
            else:
                assert (await taken_by(b, f"r{turns}")).name == "a"


@pytest.mark.parametrize("name", ["", ".a", "a/b", "a b", "é", "x" * 129, 5, None])
async def test_a_name_that_is_not_allowed(registry_url: str, name: Any) -> None:
    async with nodes(registry_url, "a") as (a,):
        with pytest.raises(ValueError, match="1 to 128 letters"):
            a.cluster.names(name)
        for verb in (a.cluster.names(KIND).claim, a.cluster.names(KIND).find):
            with pytest.raises(ValueError, match="1 to 128 letters"):
                await verb(name)


async def test_the_longest_names_fit(url: str, lease: float) -> None:
    async with Node("a", registry=url, cluster="c" * 64, lease_ttl=lease) as a:
        names = a.cluster.names("k" * 128)
        assert (await names.claim("n" * 128)).held
        assert await names.find("n" * 128) is not None


async def test_a_value_that_is_not_allowed(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        names: Any = a.cluster.names(KIND)
        for wrong in ("text", 5, None, bytearray(b"x")):
            with pytest.raises(TypeError, match="bytes are wanted"):
                await names.claim("r1", wrong)
        with pytest.raises(RegistryError, match="at most"):
            await names.claim("r1", bytes(1 << 20))
        name = await names.claim("r1", b"v")
        with pytest.raises(RegistryError, match="at most"):
            await name.update(bytes(1 << 20))
        assert name.value == b"v"


async def test_an_entry_that_no_node_wrote(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        await a._mesh._registry.put(f"domi/default/names/{KIND}/r1", b"[]")
        with pytest.raises(RegistryError, match="is not a holder's"):
            await a.cluster.names(KIND).find("r1")
        assert (await taken_by(a, "r1")).id == -1


async def test_before_the_start_and_on_another_loop(registry_url: str) -> None:
    node = Node("a", registry=registry_url)
    for early in (node.cluster.names(KIND).claim("r1"), node.cluster.names(KIND).find("r1")):
        with pytest.raises(DomiError, match="has not started"):
            await early
    async with node:
        name = await node.cluster.names(KIND).claim("r1")

        async def elsewhere() -> None:
            names = node.cluster.names(KIND)
            for wrong in (names.claim("r2"), names.find("r2"), name.update(b""), name.release()):
                with pytest.raises(DomiError, match="another event loop"):
                    await wrong

        await asyncio.to_thread(asyncio.run, elsewhere())
        assert name.held
