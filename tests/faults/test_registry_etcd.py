"""What befalls an etcd and the way to it: crashes, hangs, compaction, members that are gone."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from domi_fast import Node
from domi_fast.registry import Delete, Put, RegistryError, Reset, open_registry
from domi_fast.registry.etcd import EtcdRegistry
from domi_fast.registry.etcd_claim import Place
from domi_fast.registry.etcd_link import Channel
from domi_fast.registry.link import PATIENCE, TIMEOUT, Away
from tests.servers import Etcd, etcd_cluster, free_ports
from tests.support import ROOT, busy, until

T = TypeVar("T")

pytestmark = pytest.mark.external


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    server = Etcd(tmp_path_factory.mktemp("etcd"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def url(etcd: Etcd, tmp_path: Path) -> str:
    return f"{etcd.url}/{tmp_path.name}"


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[EtcdRegistry]:
    registry = open_registry(url)
    assert isinstance(registry, EtcdRegistry)
    await registry.open()
    try:
        yield registry
    finally:
        await registry.close()


def enable_users(channel: Channel) -> None:
    """There is one, who may do everything; from then on nobody else may."""
    rpc, auth = channel.rpc, channel.rpc.AuthStub(channel._client.channel)
    auth.UserAdd(rpc.AuthUserAddRequest(name="root", password="sesame"))
    auth.RoleAdd(rpc.AuthRoleAddRequest(name="root"))
    auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user="root", role="root"))
    auth.AuthEnable(rpc.AuthEnableRequest())


@asynccontextmanager
async def with_users(folder: Path, *options: str) -> AsyncIterator[tuple[Etcd, str]]:
    """An etcd with one user, and the URL by which that one comes."""
    server = Etcd(folder, options=options)
    server.start()
    try:
        async with opened(server.url) as registry:
            await registry.link.call(enable_users, again=False)
        yield server, server.url.replace("://", "://root:sesame@")
    finally:
        server.kill()


async def patiently(work: Callable[[], Coroutine[Any, Any, T]], limit: float = 20.0) -> T:
    """What it returns, when the registry is back."""
    end = time.monotonic() + limit
    while True:
        try:
            return await work()
        except RegistryError:  # noqa: PERF203 - the loop is there for it
            assert time.monotonic() < end
            await asyncio.sleep(0.05)


async def test_a_crash_and_restart_loses_nothing(etcd: Etcd, url: str) -> None:
    async with opened(url) as one, opened(url) as two:
        lease = await one.grant(3.0)
        claim = await one.claim(["id/1"], b"mine", lease)
        watch = two.watch("", since=(await two.list("")).cursor)
        first = asyncio.ensure_future(watch.__anext__())
        await one.put("a", b"1")
        event = await asyncio.wait_for(first, 5)
        assert isinstance(event, Put)
        etcd.kill()
        etcd.start()
        entry = await patiently(lambda: one.put("b", b"2"))
        event = await asyncio.wait_for(watch.__anext__(), 10)
        assert isinstance(event, Put)
        assert event.entry == entry
        assert not lease.lost.is_set()
        await patiently(lambda: claim.update(b"still mine"))


async def test_one_that_hangs_is_noticed(etcd: Etcd, url: str) -> None:
    async with opened(url) as registry:
        lease = await registry.grant(2.0)
        watch = registry.watch("", since=(await registry.list("")).cursor)
        waiting = asyncio.ensure_future(watch.__anext__())
        etcd.signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            # The first whose time is over takes the channel away from the others.
            stale = registry.put("k", b"x", expect=1)
            calls = [registry.get("k"), registry.get("k"), stale]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert time.monotonic() - began < 10.0
            address = etcd.url.removeprefix("etcd://")
            assert {str(each) for each in outcomes} == {f"etcd at {address} does not answer"}
            await asyncio.wait_for(lease.lost.wait(), 5)
        finally:
            etcd.signal(signal.SIGCONT)
        entry = await patiently(lambda: registry.put("k", b"back"))
        event = await asyncio.wait_for(waiting, 10)
        assert isinstance(event, Put)
        assert event.entry == entry


async def test_closing_ends_what_waits_for_one_that_hangs(etcd: Etcd, url: str) -> None:
    async with opened(url) as registry:
        # More than there are threads.
        waiting = [asyncio.ensure_future(registry.get("k")) for _ in range(24)]
        etcd.signal(signal.SIGSTOP)
        try:
            waiting += [asyncio.ensure_future(registry.get("k")) for _ in range(24)]
            await asyncio.sleep(0)
            await registry.close()
            outcomes = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 10)
        finally:
            etcd.signal(signal.SIGCONT)
        assert {type(outcome) for outcome in outcomes} <= {RegistryError, Away, type(None)}
        assert RegistryError in {type(outcome) for outcome in outcomes}


async def test_a_call_that_closing_ends_says_so(
    etcd: Etcd, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not that the server is away."""
    begun = threading.Event()
    txn = Channel.txn

    def begin(*given: Any) -> Any:
        begun.set()
        return txn(*given)

    monkeypatch.setattr(Channel, "txn", begin)
    async with opened(url) as registry:
        etcd.signal(signal.SIGSTOP)
        try:
            put = asyncio.ensure_future(registry.put("k", b"x"))
            assert await asyncio.to_thread(begun.wait, 10)
            await registry.close()
            with pytest.raises(RegistryError, match="was closed before it had answered"):
                await put
        finally:
            etcd.signal(signal.SIGCONT)


async def test_a_foreign_key_that_is_no_text_ends_no_watch(url: str) -> None:
    async with opened(url) as registry:
        watch = registry.watch("", since=(await registry.list("")).cursor)
        first = asyncio.ensure_future(watch.__anext__())

        def intrude(channel: Channel) -> None:
            channel._client.put(registry.keys + b"\xff", b"x")
            channel._client.delete(registry.keys + b"\xff")

        await registry.link.call(intrude, again=False)
        await registry.put("k", b"x")
        seen = [await asyncio.wait_for(first, 10)]
        while not (isinstance(seen[-1], Put) and seen[-1].entry.key == "k"):
            seen.append(await asyncio.wait_for(watch.__anext__(), 10))
        assert not any(isinstance(event, Reset) for event in seen)


async def test_a_watch_behind_compaction_resyncs(url: str) -> None:
    async with opened(url) as registry:
        old = (await registry.list("")).cursor
        for number in range(5):
            await registry.put("k", b"%d" % number)
        await registry.delete("k")
        await registry.put("other", b"x")
        now = (await registry.list("")).cursor
        assert isinstance(now, int)

        def compact(channel: Channel) -> None:
            channel._client.compact(now)

        await registry.link.call(compact, again=False)
        channel = registry.link.channel()
        watch = registry.watch("", since=old)
        event = await asyncio.wait_for(watch.__anext__(), 10)
        assert isinstance(event, Reset)
        assert [entry.key for entry in event.snapshot.entries] == ["other"]
        await registry.put("k", b"after")
        event = await asyncio.wait_for(watch.__anext__(), 10)
        assert isinstance(event, Put)
        assert event.entry.value == b"after"
        await registry.delete("k")
        event = await asyncio.wait_for(watch.__anext__(), 10)
        assert isinstance(event, Delete)
        assert event.key == "k"
        # A server that ends a watch is not away: nobody else's call was ended with it.
        assert registry.link.channel() is channel


async def test_a_watch_outlives_a_channel_that_another_call_has_closed(url: str) -> None:
    async with opened(url) as one:
        link = one.link
        stale, current = link.channel(), link.channel
        link.drop(stale)
        given: list[Channel] = []
        # What its thread does when the other call comes between its taking and its using.
        link.channel = lambda: given.pop() if given else current()  # type: ignore[method-assign]
        watch = one.watch("", since=(await one.list("")).cursor)
        given.append(stale)
        event = asyncio.ensure_future(watch.__anext__())
        await until(lambda: not given)
        await one.put("a", b"1")
        assert isinstance(await asyncio.wait_for(event, 5), Put)


async def test_a_member_that_is_away_is_passed_over(etcd: Etcd, tmp_path: Path) -> None:
    (dead,) = free_ports(1)
    address = etcd.url.removeprefix("etcd://")
    async with opened(f"etcd://127.0.0.1:{dead},{address}/{tmp_path.name}") as registry:
        await registry.put("k", b"x")
        entry = await registry.get("k")
        assert entry is not None
        assert entry.value == b"x"


async def test_a_cluster_of_etcds_loses_its_members_by_turns(tmp_path: Path) -> None:
    """Whichever of three is killed, its leader too: no request fails, and others may join.

    A lease may be over before the rest have a new leader, but not for long.
    """
    lease = 3.0
    members = await asyncio.to_thread(etcd_cluster, tmp_path, 3)
    addresses = ",".join(member.url.removeprefix("etcd://") for member in members)
    settings: dict[str, Any] = {"registry": f"etcd://{addresses}", "lease_ttl": lease}
    try:
        async with Node("a", **settings) as a, Node("b", **settings) as b, busy(a, b):
            for member in members:
                await asyncio.to_thread(member.kill)
                async with Node("c", **settings) as c:
                    assert c.id == 2
                    await c.wait_subscribed(50, timeout=10)
                    assert await c.request(50, b"x") == b"x"
                await until(lambda: set(a.peers) == {1}, 10.0)
                await asyncio.to_thread(member.start)
                await until(lambda: a.registered and b.registered, lease + 1.0)
            assert (a.id, b.id) == (0, 1)
    finally:
        for member in members:
            member.kill()


async def test_nobody_is_there() -> None:
    (dead,) = free_ports(1)
    registry = open_registry(f"etcd://127.0.0.1:{dead}")
    began = time.monotonic()
    with pytest.raises(RegistryError, match=f"127.0.0.1:{dead}"):
        await registry.open()
    assert time.monotonic() - began < 10.0


async def test_user_and_password(tmp_path: Path) -> None:
    async with with_users(tmp_path) as (server, right):
        async with opened(right) as registry:
            watch = registry.watch("", since=(await registry.list("")).cursor)
            lease = await registry.grant(2.0)
            await registry.claim(["k"], b"x", lease)
            event = await asyncio.wait_for(watch.__anext__(), 5)
            assert isinstance(event, Put)
            await asyncio.sleep(lease.valid_until - time.monotonic() + 0.1)
            assert not lease.lost.is_set()
        for url in (right.replace("sesame", "wrong"), server.url):
            with pytest.raises(RegistryError) as caught:
                await open_registry(url).open()
            assert "wrong" not in str(caught.value)


async def test_one_that_hangs_is_asked_for_one_token_at_a_time(tmp_path: Path) -> None:
    """By threads, none of which the loop waits for: not even when it closes meanwhile."""
    async with with_users(tmp_path) as (server, url), opened(url) as registry:
        await registry.put("k", b"x")
        lateness = 0.0

        async def beat() -> None:
            nonlocal lateness
            while True:
                due = time.monotonic() + 0.01
                await asyncio.sleep(0.01)
                lateness = max(lateness, time.monotonic() - due)

        beating = asyncio.ensure_future(beat())
        server.signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            calls = [registry.get("k") for _ in range(6)]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(each) for each in outcomes} == {Away}
            assert time.monotonic() - began < PATIENCE + 2 * TIMEOUT
            late = [asyncio.ensure_future(registry.get("k")) for _ in range(6)]
            await asyncio.wait(late, timeout=0.2)
            began = time.monotonic()
            await registry.close()
            assert time.monotonic() - began < TIMEOUT
            assert {type(each) for each in await asyncio.gather(*late, return_exceptions=True)} == {
                RegistryError
            }
            assert lateness < 1.0
        finally:
            beating.cancel()
            server.signal(signal.SIGCONT)


async def test_what_had_no_token_was_not_sent(tmp_path: Path) -> None:
    """One member takes connections and says nothing: a change goes on to the next."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        async with (
            with_users(tmp_path) as (_, url),
            opened(f"{url},127.0.0.1:{port}") as registry,
        ):
            registry.link.drop(registry.link.channel())
            assert (await registry.put("k", b"x")).value == b"x"


async def test_a_change_of_users_asks_for_another_token(tmp_path: Path) -> None:
    """Where the tokens are signed, each is good until the next change of users or roles."""
    private, public = tmp_path / "key.pem", tmp_path / "public.pem"
    key = rsa.generate_private_key(65537, 2048)
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    token = f"jwt,pub-key={public},priv-key={private},sign-method=RS256,ttl=10m"
    async with AsyncExitStack() as stack:
        _, url = await stack.enter_async_context(
            with_users(tmp_path / "etcd", "--auth-token", token)
        )
        async with opened(url) as registry, opened(url) as other:
            watch = registry.watch("", since=(await registry.list("")).cursor)
            first = asyncio.ensure_future(watch.__anext__())
            await registry.put("k", b"before")
            assert isinstance(await asyncio.wait_for(first, 5), Put)

            def add(channel: Channel) -> None:
                rpc, auth = channel.rpc, channel.rpc.AuthStub(channel._client.channel)
                request = rpc.AuthUserAddRequest(name="other", password="sesame")
                auth.UserAdd(request, metadata=channel._metadata)

            await other.link.call(add, again=False)
            entry = await registry.put("k", b"after")
            event = await asyncio.wait_for(watch.__anext__(), 5)
            while isinstance(event, Reset):
                event = await asyncio.wait_for(watch.__anext__(), 5)
            assert event == Put(entry, event.cursor)


async def test_one_that_is_slow_for_a_renewal_is_in_time_for_others(etcd: Etcd, url: str) -> None:
    """A renewal has a third of the lease, and gives up the channel then: not the others' calls."""
    async with opened(url) as registry:
        await registry.grant(2.0)
        current = registry.link._channel
        etcd.signal(signal.SIGSTOP)
        try:
            put = asyncio.ensure_future(registry.put("k", b"x"))
            await until(lambda: registry.link._channel is not current)
        finally:
            etcd.signal(signal.SIGCONT)
        assert (await put).value == b"x"


async def test_who_waits_for_locks_asks_when_there_is_news_alone(
    etcd: Etcd, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One waiter's look is no news for the others of its registry."""
    looks = 0
    look = Place.look

    def counted(place: Place, channel: Channel) -> int | tuple[bytes, int]:
        nonlocal looks
        looks += 1
        return look(place, channel)

    async with opened(url) as holder, opened(url) as registry:
        held = await holder.grant(10.0)
        names = ["one", "two", "three"]
        for name in names:
            await holder.acquire(name, held, b"")
        monkeypatch.setattr(Place, "look", counted)
        waiting = [
            asyncio.ensure_future(registry.acquire(name, await registry.grant(10.0), b""))
            for name in names
        ]
        try:
            await until(lambda: looks == len(names))
            # Whoever waits looks whether it was its own.
            await (await registry.grant(10.0)).revoke()
            await until(lambda: looks == 2 * len(names))
            for _ in range(100):
                await registry.get("k")
            assert looks == 2 * len(names)
            await held.revoke()
            await asyncio.gather(*waiting)
        finally:
            for task in waiting:
                task.cancel()


async def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("domi_fast.registry.link.PATIENCE", 0.5)
    server = Etcd(tmp_path, tls=True)
    server.start()
    try:
        ca = f"{server.url}?ca={server.cert}"
        async with opened(f"{ca}&cert={server.cert}&key={server.key}") as registry:
            await registry.put("k", b"x")
            assert (await registry.list("")).entries[0].value == b"x"
        for url in (server.url, ca):  # not encrypted; no certificate of the client's own
            with pytest.raises(RegistryError):
                await open_registry(url).open()
    finally:
        server.kill()


@pytest.mark.parametrize("version", ["3.20.3", "4.21.12", "newest"])
def test_every_protobuf_will_do(etcd: Etcd, tmp_path: Path, version: str) -> None:
    """The oldest that etcd3 itself can be imported with, the first that it cannot, the newest."""
    folder = tmp_path / "protobuf"
    wanted = "protobuf" if version == "newest" else f"protobuf=={version}"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, wanted],
        check=True,
    )
    script = f"""
import sys
sys.path.insert(0, {str(folder)!r})
import asyncio, google.protobuf
from domi_fast.registry import open_registry
assert google.protobuf.__file__.startswith({str(folder)!r})
async def main():
    registry = open_registry({etcd.url + "/" + tmp_path.name!r})
    await registry.open()
    lease = await registry.grant(3.0)
    claim = await registry.claim(["k"], b"x", lease)
    print((await registry.get("k")).value, google.protobuf.__version__)
    await registry.close()
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("b'x' ")
    if version != "newest":
        assert version in done.stdout
