"""What befalls a Consul and the way to it: crashes, hangs, silence, a session that is ended."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import pytest
from consul import aio

from domi_fast import Node
from domi_fast.registry import Delete, Put, RegistryError, Reset, open_registry
from domi_fast.registry.consul import LIMITS, ConsulRegistry
from domi_fast.registry.consul_agent import WAIT
from domi_fast.registry.link import PATIENCE, TIMEOUT
from tests.proxy import Proxy
from tests.servers import Consul, free_ports

T = TypeVar("T")

pytestmark = pytest.mark.external

TTL = 1.0
"""Seconds of a lease here, which the servers of the tests take; by default Consul takes no less
than ten."""


@pytest.fixture(autouse=True)
def shorter_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("domi_fast.registry.consul.LIMITS", replace(LIMITS, min_ttl=TTL))


@pytest.fixture(scope="module")
def consul(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consul]:
    server = Consul(tmp_path_factory.mktemp("consul"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def url(consul: Consul, tmp_path: Path) -> str:
    return f"{consul.url}/{tmp_path.name}"


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[ConsulRegistry]:
    registry = open_registry(url)
    assert isinstance(registry, ConsulRegistry)
    await registry.open()
    try:
        yield registry
    finally:
        await registry.close()


def by_way_of(proxy: Proxy, url: str) -> str:
    return re.sub(r":\d+/", f":{proxy.port}/", url)


async def patiently(work: Callable[[], Coroutine[Any, Any, T]], limit: float = 20.0) -> T:
    """What it returns, when the registry is back."""
    end = time.monotonic() + limit
    while True:
        try:
            return await work()
        except RegistryError:  # noqa: PERF203 - the loop is there for it
            assert time.monotonic() < end
            await asyncio.sleep(0.05)


async def test_a_crash_and_restart_loses_nothing(consul: Consul, url: str) -> None:
    async with opened(url) as one, opened(url) as two:
        lease = await one.grant(10.0)
        claim = await one.claim(["id/1"], b"mine", lease)
        watch = two.watch("", since=None)
        assert isinstance(await watch.__anext__(), Reset)
        await one.put("a", b"1")
        event = await asyncio.wait_for(watch.__anext__(), 5)
        assert isinstance(event, Put)
        await asyncio.to_thread(consul.kill)
        await asyncio.to_thread(consul.start)
        entry = await patiently(lambda: one.put("b", b"2"))
        event = await asyncio.wait_for(watch.__anext__(), 10)
        assert isinstance(event, Put)
        assert event.entry == entry
        assert not lease.lost.is_set()
        await patiently(lambda: claim.update(b"still mine"))


async def test_one_that_hangs_is_noticed(
    consul: Consul, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert TIMEOUT + PATIENCE < 10.0
    monkeypatch.setattr("domi_fast.registry.link.PATIENCE", 0.5)
    async with opened(url) as registry:
        lease = await registry.grant(TTL)
        watch = registry.watch("", since=None)
        assert isinstance(await watch.__anext__(), Reset)
        waiting = asyncio.ensure_future(watch.__anext__())
        consul.signal(signal.SIGSTOP)
        try:
            with pytest.raises(RegistryError, match=r"Consul at 127\.0\.0\.1:\d+ does not answer"):
                await asyncio.wait_for(registry.get("k"), TIMEOUT + 1.0)
            await asyncio.wait_for(lease.lost.wait(), TTL)
        finally:
            consul.signal(signal.SIGCONT)
        entry = await patiently(lambda: registry.put("k", b"back"))
        event = await asyncio.wait_for(waiting, 10)
        assert isinstance(event, Put)
        assert event.entry == entry


async def test_a_connection_that_has_gone_dead_is_left(
    consul: Consul, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert WAIT * 17 / 16 + TIMEOUT < 10.0
    monkeypatch.setattr("domi_fast.registry.consul_agent.WAIT", 0.5)
    monkeypatch.setattr("domi_fast.registry.consul_agent.TIMEOUT", 0.5)
    async with (
        Proxy(consul.port) as proxy,
        opened(url) as other,
        opened(by_way_of(proxy, url)) as registry,
    ):
        watch = registry.watch("", since=None)
        assert isinstance(await watch.__anext__(), Reset)
        held = await other.acquire("lock", await other.grant(10.0))
        assert isinstance(await watch.__anext__(), Put)
        waiting = asyncio.ensure_future(registry.acquire("lock", await registry.grant(10.0)))
        event = asyncio.ensure_future(watch.__anext__())
        await asyncio.wait([waiting, event], timeout=0.05)
        proxy.deaden()
        await held.release()
        assert isinstance(await asyncio.wait_for(event, 3.0), Delete)
        assert (await asyncio.wait_for(waiting, 3.0)).epoch > held.epoch


async def test_who_waits_for_an_answer_hears_that_the_registry_was_closed(
    consul: Consul, url: str
) -> None:
    async with Proxy(consul.port) as proxy:
        registry = open_registry(by_way_of(proxy, url))
        await registry.open()
        proxy.cut()
        asked = [
            asyncio.ensure_future(call) for call in (registry.get("k"), registry.put("k", b""))
        ]
        await asyncio.wait(asked, timeout=0.05)
        await registry.close()
        for each in asked:
            with pytest.raises(RegistryError, match="closed"):
                await each


async def test_a_session_that_was_ended_is_a_lease_that_is_lost(url: str) -> None:
    async with opened(url) as registry:
        lease = await registry.grant(TTL)
        claim = await registry.claim(["k"], b"", lease)
        await registry._revoke(registry._own(lease))  # as with Consul's own tools
        await asyncio.wait_for(lease.lost.wait(), TTL / 2)
        with pytest.raises(RegistryError, match="over"):
            await claim.update(b"")


def test_an_agent_that_leaves_takes_no_lease_along(
    consul: Consul, url: str, tmp_path: Path
) -> None:
    """Consul would end the sessions of its node at once, while their owners rely on them."""
    agent = Consul(tmp_path, server=consul)
    agent.start()

    async def main() -> None:
        async with opened(url) as other:
            registry = open_registry(url.replace(consul.url, agent.url))
            assert isinstance(registry, ConsulRegistry)
            await registry.open()
            lease = await registry.grant(2 * TTL)
            await registry.claim(["k"], b"", lease)
            watch = other.watch("", since=None)
            assert isinstance(await watch.__anext__(), Reset)
            registry._halt()
            agent.signal(signal.SIGTERM)
            event = await asyncio.wait_for(watch.__anext__(), 6 * TTL)
            assert isinstance(event, Delete)
            assert time.monotonic() >= lease.valid_until

    try:
        asyncio.run(main())
    finally:
        agent.kill()


async def test_nobody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("domi_fast.registry.link.PATIENCE", 0.2)
    (dead,) = free_ports(1)
    registry = open_registry(f"consul://127.0.0.1:{dead}")
    with pytest.raises(RegistryError, match=f"Consul at 127.0.0.1:{dead}"):
        await registry.open()


@pytest.mark.parametrize("answer", [200, 404, 500])
async def test_somebody_else_is_there(answer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("domi_fast.registry.link.PATIENCE", 0.2)

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            with pytest.raises(RegistryError, match=f"Consul at 127.0.0.1:{server.server_port}"):
                await open_registry(f"consul://127.0.0.1:{server.server_port}").open()
        finally:
            server.shutdown()
            thread.join()


async def passing(agent: Any, name: str, *ids: str) -> dict[str, dict[str, Any]]:
    """The services of this name whose checks pass, once they are these; by blocking queries."""
    index = None
    end = time.monotonic() + 20.0
    while True:
        index, found = await agent.health.service(name, passing=True, index=index, wait="2s")
        services = {each["Service"]["ID"]: each["Service"] for each in found}
        if services.keys() == set(ids):
            return services
        assert time.monotonic() < end, found


@asynccontextmanager
async def asked(consul: Consul, token: str | None = None) -> AsyncIterator[Any]:
    """What somebody who knows Consul, and not us, asks it with."""
    async with aio.Consul(port=consul.port, token=token) as agent:
        yield agent


async def test_a_node_is_a_service_of_the_catalog(consul: Consul, url: str) -> None:
    """For as long as its lease is renewed, and again when the agent has forgotten it."""
    async with asked(consul) as agent:
        settings = {"registry": url, "lease_ttl": TTL, "cluster": "shop", "version": "1.2"}
        async with Node("orders", **settings) as a, Node("orders", **settings) as b:
            first, second = (f"domi-shop-{node.id:04d}" for node in (a, b))
            one = (await passing(agent, "orders", first, second))[first]
            assert (one["Address"], one["Port"], one["Tags"]) == ("127.0.0.1", a.port, ["shop"])
            assert one["Meta"] == {"version": "1.2", "machine_id": str(a.id)}
            await asyncio.sleep(2 * TTL)
            await passing(agent, "orders", first, second)
            await agent.agent.service.deregister(first)
            await passing(agent, "orders", second)
            await passing(agent, "orders", first, second)
            registry: Any = b._mesh._registry
            registry._halt()  # b is as one that was killed
            await passing(agent, "orders", first)
        await passing(agent, "orders")


async def test_a_node_that_may_not_be_a_service_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a node all the same, and the log has it once."""
    server = Consul(tmp_path, acl=True)
    server.start()
    try:
        rules = """
            key_prefix "domi_fast/" { policy = "write" }
            session "domi-fast" { policy = "write" }
            node "domi-fast" { policy = "write" }
        """
        server.put("/v1/acl/policy", {"Name": "domi", "Rules": rules})
        token = server.put("/v1/acl/token", {"Policies": [{"Name": "domi"}]})["SecretID"]
        url = f"consul://{token}@127.0.0.1:{server.port}"
        async with asked(server, server.token) as agent:
            settings = {"registry": url, "lease_ttl": TTL}
            async with Node("a", **settings) as a, Node("b", **settings) as b:
                await asyncio.sleep(2 * TTL)
                assert set(a.peers) == {b.id}
                await passing(agent, "a")
    finally:
        server.kill()
    told = [r.getMessage() for r in caplog.records if "catalog" in r.getMessage()]
    assert sorted(text.partition(" ")[0] for text in told) == [
        "domi-default-0000",
        "domi-default-0001",
    ]
    assert all("ermission denied" in text for text in told)


async def test_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The URL's own is used, whatever the environment says.
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "of-the-environment")
    server = Consul(tmp_path, acl=True)
    await asyncio.to_thread(server.start)
    try:
        address = server.url.removeprefix("consul://")
        async with opened(f"consul://{server.token}@{address}") as registry:
            assert server.token not in registry.url
            watch = registry.watch("", since=None)
            assert isinstance(await watch.__anext__(), Reset)
            claim = await registry.claim(["k"], b"x", await registry.grant(10.0))
            event = await asyncio.wait_for(watch.__anext__(), 5)
            assert isinstance(event, Put)
            assert event.entry.epoch == claim.epoch
        with pytest.raises(RegistryError, match="ACL not found"):
            await open_registry(f"consul://wrong@{address}").open()
        # One that may do no more than docs/registries.md says.
        places = ('key_prefix "domi_fast/"', 'session "domi-fast"', 'node "domi-fast"')
        rules = "".join(f'{place} {{ policy = "write" }}\n' for place in places)
        server.put("/v1/acl/policy", {"Name": "domi", "Rules": rules})
        token = server.put("/v1/acl/token", {"Policies": [{"Name": "domi"}]})["SecretID"]
        async with opened(f"consul://{token}@{address}") as registry:
            watch = registry.watch("", since=None)
            assert isinstance(await watch.__anext__(), Reset)
            await registry.acquire("k", await registry.grant(10.0))
            assert isinstance(await asyncio.wait_for(watch.__anext__(), 5), Put)
            await registry.delete("k")
        monkeypatch.delenv("CONSUL_HTTP_TOKEN")
        with pytest.raises(RegistryError, match="Permission denied"):
            await open_registry(server.url).open()
    finally:
        server.kill()


async def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("domi_fast.registry.link.PATIENCE", 0.2)
    server = Consul(tmp_path, tls=True)
    await asyncio.to_thread(server.start)
    try:
        ca = f"{server.url}?ca={server.cert}"
        async with opened(f"{ca}&cert={server.cert}&key={server.key}") as registry:
            await registry.put("k", b"x")
            assert (await registry.list("")).entries[0].value == b"x"
        # Not encrypted; no certificate of the client's own; no certificate of the authority.
        for url in (server.url, ca, f"{server.url}?ca={tmp_path}/none"):
            with pytest.raises(RegistryError, match="Consul at 127"):
                await open_registry(url).open()
    finally:
        server.kill()


# ---------------------------------------------------------------------------- clusters


def is_valid(node: Node) -> bool:
    """Whether it holds its machine id at this moment."""
    return node._mesh._members.valid


def ids_in_view(node: Node) -> set[int]:
    return set(node._mesh._members.view)


async def test_the_default_lease_is_as_long_as_consul_wants_it(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("domi_fast.registry.consul.LIMITS", LIMITS)
    async with Node("a", registry=url) as a:
        claim = a._mesh._members._claim
        assert claim is not None
        assert claim.lease.ttl == 10.0
