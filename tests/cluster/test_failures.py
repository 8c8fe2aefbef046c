"""What a cluster does when processes die, stand still, or do not belong to it."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from domi_fast import ClusterFull, LibraryChannel, Node, VersionTooOld, encode_frame
from domi_fast.errors import RegistryError
from domi_fast.handshake import Offer
from domi_fast.registry import Claim, Lease, NoKeyFree, open_registry
from domi_fast.registry.held import HeldLease
from tests.support import (
    MAGIC,
    RawPeer,
    Worker,
    forget_records,
    nodes,
    session,
    slowness,
    until,
    workers,
)

ECHO, STALL, WORK = 50, 51, 53
LOOPS = ["asyncio", "uvloop"]


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


@pytest.fixture(params=LOOPS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def two(kind: str) -> Iterator[list[Worker]]:
    with workers(kind, kind) as started:
        yield started


# ------------------------------------------------------------------------------------------- death


def test_one_of_three_servers_is_killed_under_load(kind: str, sqlite_url: str) -> None:
    with workers(*[kind] * 4) as (client, *servers):
        for number, server in enumerate(servers):
            server.ask("start", name=f"server{number}", registry=sqlite_url)
        [me] = client.ask("start", name="client", registry=sqlite_url)
        # The client itself does not serve: the three do.
        client.ask("wait_subscribed", channel=WORK, count=4)
        client.ask("leave_channel", channel=WORK)
        client.ask("watch_losses")
        for server in servers:
            server.ask("watch_losses")
        client.ask("load", concurrency=64)
        client.ask("wait_answers", count=500)
        [victim] = servers[1].ask("ids")
        died = time.monotonic()
        servers[1].kill()
        servers[1].process.wait()
        client.ask("wait_peers", count=2)
        client.ask("wait_answers", count=2000)
        result = client.ask("finish")

        outcomes = result["outcomes"]
        assert set(outcomes) <= {"answer", "PeerLost"}
        assert sum(outcomes.values()) == result["asked"]
        assert result["in_flight"] == 0
        assert outcomes["PeerLost"] > 0
        # The dead node's requests are told within 100 ms, and nobody else's.
        assert max(result["lost_at"]) - died < 0.1 * slowness()
        [(node, peer, at, _)] = client.ask("losses")
        assert (node, peer) == (me, victim)
        assert at - died < 0.1 * slowness()
        # The rest went to the other two, evenly.
        handled = [server.ask("handled") for server in (servers[0], servers[2])]
        assert min(handled) > 0.8 * max(handled)
        assert sum(handled) <= outcomes["answer"]


# ------------------------------------------------------------------------------------------ leases


def test_a_lost_lease_is_taken_again(two: list[Worker], sqlite_url: str) -> None:
    """A process that stood still for longer than its lease comes back under its id."""
    settings = {"registry": sqlite_url, "lease_ttl": 0.5}
    [one] = two[0].ask("start", **settings)
    [other] = two[1].ask("start", **settings)
    two[0].ask("watch_losses")
    two[1].kill(signal.SIGSTOP)
    wait_for_entries(sqlite_url, {one})
    two[1].kill(signal.SIGCONT)
    wait_for_entries(sqlite_url, {one, other})
    assert two[1].ask("ids") == [other]
    # Nobody took the id, so the session has lived on.
    assert two[0].ask("losses") == []
    assert two[0].ask("request", machine=other, channel=ECHO, text="still") == "still"
    assert two[1].ask("request", machine=one, channel=ECHO, text="there") == "there"


async def test_a_key_that_goes_between_two_looks_is_taken_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was held when the node asked for it, and is gone when it looks by whom."""
    async with Node("a", registry="memory://between") as a:
        members = a._mesh._members
        registry, displaced, asked = members._registry, [], []
        claim = registry.claim

        async def held_at_first(keys: Sequence[str], value: bytes, lease: Lease) -> Claim:
            asked.append(keys)
            if len(asked) == 1:
                raise NoKeyFree("all keys are held")
            return await claim(keys, value, lease)

        monkeypatch.setattr(registry, "claim", held_at_first)
        monkeypatch.setattr(a._mesh, "displaced", lambda: displaced.append(a.id))
        assert members._claim is not None
        lease = members._claim.lease
        assert isinstance(lease, HeldLease)
        lease.lose()
        await until(lambda: members.valid)
        assert (a.id, displaced) == (0, [])
        assert [len(keys) for keys in asked] == [1, 1]


def test_an_id_that_went_to_another_node(kind: str, sqlite_url: str) -> None:
    settings = {"registry": sqlite_url, "lease_ttl": 0.5, "start_timeout": 1.0}
    with workers(kind, kind, kind) as (witness, sleeper, heir):
        [one] = witness.ask("start", **settings)
        [id_of_both] = sleeper.ask("start", **settings)
        heir.ask("ids")
        sleeper.kill(signal.SIGSTOP)
        wait_for_entries(sqlite_url, {one})
        assert heir.ask("start", **settings) == [id_of_both]
        # To the witness the heir is that node now, though the sleeper's socket is still there.
        heir.ask("wait_peers", count=1)
        sleeper.kill(signal.SIGCONT)
        [new] = sleeper.ask("wait_ids", different_from=[id_of_both])
        assert new not in (one, id_of_both)
        wait_for_entries(sqlite_url, {one, id_of_both, new})
        for process in (witness, sleeper, heir):
            process.ask("wait_peers", count=2)
        for process, machine in ((witness, one), (sleeper, new), (heir, id_of_both)):
            process.ask("subscribe", machine=machine, channel=100)
        for process in (witness, sleeper, heir):
            process.ask("wait_subscribed", channel=100, count=3)
            for machine in (one, new, id_of_both):
                answer = process.ask("request", machine=machine, channel=100, text="who")
                assert answer == str(machine)
        # It was the heir, and nobody else, that answered for the id.
        answered_by = {
            receiver
            for process in (witness, sleeper, heir)
            for receiver, *_ in process.ask("received")
        }
        assert answered_by == {one, new, id_of_both}


def wait_for_entries(url: str, ids: set[int], timeout: float = 10.0) -> None:
    """Wait until exactly these machine ids stand in the registry."""

    async def wait() -> None:
        registry = open_registry(url)
        await registry.open()
        try:
            end = time.monotonic() + timeout
            while True:
                entries = (await registry.list("domi/default/nodes/")).entries
                found = [int(entry.key.rsplit("/", 1)[1]) for entry in entries]
                assert len(found) == len(set(found))
                if set(found) == ids:
                    return
                assert time.monotonic() < end, f"{found} and not {ids}"
                await asyncio.sleep(0.02)
        finally:
            await registry.close()

    asyncio.run(wait())


async def test_a_registry_that_is_away_for_a_moment(registry_url: str) -> None:
    """The lease is lost and the first attempts to get another one fail."""
    async with nodes(registry_url, "a", lease_ttl=0.2) as (a,):
        members: Any = a._mesh._members
        grant, attempts = members._registry.grant, []

        async def failing(ttl: float) -> Any:
            attempts.append(ttl)
            if len(attempts) < 3:
                raise RegistryError("the disk is full")
            return await grant(ttl)

        members._registry.grant = failing
        lease = members._claim.lease
        await lease.revoke()
        lease.lost.set()
        await until(lambda: len(attempts) == 3)
        await until(lambda: members._claim.lease is not lease)
        entries = (await members._registry.list(members._prefix)).entries
        assert [entry.key[-4:] for entry in entries] == ["0000"]
        assert a.id == 0


# ------------------------------------------------------------------------------------------ refusal


async def test_a_full_cluster(sqlite_url: str) -> None:
    registry = open_registry(sqlite_url)
    await registry.open()
    try:
        lease = await registry.grant(60)
        for machine in range(1023):
            await registry.create(f"domi/default/nodes/{machine:04d}", b"{}", lease=lease)
        # The last id is still free.
        async with Node("a", registry=sqlite_url) as last:
            assert last.id == 1023
            with pytest.raises(ClusterFull) as refused:
                await Node("b", registry=sqlite_url).start()
            assert refused.value.limit == 1024
        # And free again.
        async with Node("c", registry=sqlite_url) as again:
            assert again.id == 1023
    finally:
        await registry.close()


async def test_an_older_version_may_not_join(registry_url: str) -> None:
    newer = Node("server", version="v1.10", registry=registry_url, roll_deadline=None)
    async with newer:
        old = Node("server", version="1.9.9", registry=registry_url)
        with pytest.raises(VersionTooOld) as refused:
            await old.start()
        assert refused.value.peer == newer.id
        assert old.id == -1
        # The same version, a newer one and another name may.
        for name, version in (("server", "1.10"), ("server", "2rc1"), ("client", "0.1")):
            async with Node(name, version=version, registry=registry_url) as node:
                await node.wait_peers(1, 5)
        await newer.wait_peers(0, 5)
    async with Node("server", version="1.9.9", registry=registry_url) as alone:
        assert alone.id >= 0


async def test_a_node_of_another_cluster_is_refused(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        raw = await RawPeer.connect(a.port)
        try:
            offer = Offer("stranger", "1", "elsewhere", epoch=1, instance=bytes(16))
            name = encode_frame(LibraryChannel.NODE_NAME, b"\x07\x00", offer.encode())
            await raw.send(MAGIC + name)
            goodbye = await raw.frame()
            assert goodbye.channel == LibraryChannel.EXIT
            assert b"elsewhere" in goodbye.data
            with pytest.raises(EOFError):
                await raw.frame()
            assert not a.peers
            assert a.counters()["protocol_errors"] == 1
        finally:
            raw.close()


async def test_clusters_on_one_registry_do_not_meet(registry_url: str) -> None:
    one = Node("a", cluster="one", registry=registry_url)
    two = Node("b", cluster="two", registry=registry_url)
    async with one, two, Node("c", cluster="two", registry=registry_url) as third:
        await third.wait_peers(1, 5)
        await two.wait_peers(1, 5)
        assert not one.peers
        assert one.id == two.id == 0


async def test_an_address_that_another_cluster_has_got(registry_url: str) -> None:
    """A registered node is dead and a node of another cluster listens at its port now."""
    async with nodes(registry_url, "a", cluster="one") as (a,):
        registry: Any = a._mesh._members._registry
        info = a._mesh._members.view[a.id]
        lease = await registry.grant(30)
        stale = info.encode().replace(info.mark.hex().encode(), b"00" * 16)
        await registry.create("domi/two/nodes/0500", stale, lease=lease)
        async with Node("b", cluster="two", registry=registry_url, start_timeout=0.3) as b:
            assert not b.peers
            assert not a.peers
            assert b._router.session(500) is None
            assert a.counters()["protocol_errors"] >= 1


# ------------------------------------------------------------------------------------- unix sockets


def test_peers_of_one_machine_use_the_unix_socket(
    two: list[Worker], sqlite_url: str, tmp_path: Path
) -> None:
    paths = [str(tmp_path / f"{number}.sock") for number in range(2)]
    ids = []
    for process, path in zip(two, paths, strict=True):
        ids += process.ask("start", registry=sqlite_url, unix_path=path)
    for process in two:
        process.ask("wait_peers", count=1)
    for process, me, other in ((two[0], ids[0], ids[1]), (two[1], ids[1], ids[0])):
        address = process.ask("sessions")[str(me)]["addresses"][str(other)]
        assert address in {f"unix:{path}" for path in paths}
        assert process.ask("request", machine=other, channel=ECHO, text="x" * 100_000)


# --------------------------------------------------------------------------------------- heartbeats


def test_a_peer_that_stands_still_is_lost(two: list[Worker], sqlite_url: str) -> None:
    timeout = 0.6
    settings = {
        "registry": sqlite_url,
        "heartbeat_interval": 0.1,
        "heartbeat_timeout": timeout,
        "lease_ttl": 60,
    }
    [one] = two[0].ask("start", **settings)
    [other] = two[1].ask("start", **settings)
    for process in two:
        process.ask("wait_peers", count=1)
        process.ask("watch_losses")
    two[1].kill(signal.SIGSTOP)
    stopped = time.monotonic()
    two[0].ask("wait_peers", count=0)
    [(node, peer, at, reason)] = two[0].ask("losses")
    assert (node, peer) == (one, other)
    assert "silent" in reason
    # It may have been heard up to an interval before it stopped.
    assert timeout - 0.15 < at - stopped < timeout + 0.2 * slowness()
    # It comes back when it goes on.
    two[1].kill(signal.SIGCONT)
    for process in two:
        process.ask("wait_peers", count=1)
    assert two[0].ask("request", machine=other, channel=ECHO, text="again") == "again"


@pytest.mark.parametrize("how", ["handler", "signal"])
def test_who_stood_still_does_not_blame_its_peers(
    two: list[Worker], sqlite_url: str, how: str
) -> None:
    """The one that sleeps is strict, its peer patient: no session is lost."""
    shared = {"registry": sqlite_url, "heartbeat_interval": 0.1, "lease_ttl": 60}
    [strict] = two[0].ask("start", heartbeat_timeout=0.5, **shared)
    [patient] = two[1].ask("start", heartbeat_timeout=30, **shared)
    for process in two:
        process.ask("wait_peers", count=1)
        process.ask("watch_losses")
    for _ in range(2):
        if how == "handler":
            # Two in one read: the second is still to be delivered when the clock is looked at.
            for text in ("0.8", "0.01", "0.8"):
                two[1].ask("notify", machine=strict, channel=STALL, text=text)
        else:
            two[0].kill(signal.SIGSTOP)
            time.sleep(0.8)  # for as long as the process is to stand still
            two[0].kill(signal.SIGCONT)
        # Its commands are read after what the sockets hold.
        two[0].ask("ids")
        losses = [process.ask("losses") for process in two]
        assert losses == [[], []], [process.ask("counters") for process in two]
        assert two[1].ask("request", machine=strict, channel=ECHO, text="there") == "there"
        assert two[0].ask("request", machine=patient, channel=ECHO, text="there") == "there"
    assert [process.ask("losses") for process in two] == [[], []]


async def test_heartbeats_keep_a_quiet_session_alive(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", heartbeat_interval=0.1, heartbeat_timeout=0.35) as (
        a,
        b,
    ):
        ends = session(a, b.id), session(b, a.id)
        heard = [end.frames_in for end in ends]
        await until(lambda: all(end.frames_in >= was + 20 for end, was in zip(ends, heard)))  # noqa: B905
        assert ends == (session(a, b.id), session(b, a.id))
        assert all(end.up for end in ends)


async def test_a_silent_plain_peer_is_lost(registry_url: str) -> None:
    async with nodes(registry_url, "a", heartbeat_interval=0.1, heartbeat_timeout=0.3) as (a,):
        raw = await RawPeer.plain(a, 700)
        try:
            begun = time.monotonic()
            await a.wait_peers(0, 5)
            assert 0.25 < time.monotonic() - begun < 0.3 + 0.2 * slowness()
            assert a.counters()["peers_silent"] == 1
            while True:
                frame = await raw.frame()
                assert frame.channel == LibraryChannel.HEARTBEAT
        except EOFError:
            pass
        finally:
            raw.close()


async def test_a_handshake_that_stops_half_way(registry_url: str) -> None:
    async with nodes(registry_url, "a", handshake_timeout=0.2) as (a,):
        raws = []
        for sent in (b"", MAGIC[:2], MAGIC, MAGIC + b"\x0c\x00\x00"):
            raw = await RawPeer.connect(a.port)
            await raw.send(sent)
            raws.append(raw)
        begun = time.monotonic()
        for raw in raws:
            with pytest.raises(EOFError):
                await raw.frame()
            raw.close()
        assert 0.1 < time.monotonic() - begun < 0.2 + 0.3 * slowness()
        assert a.counters()["protocol_errors"] == 4
