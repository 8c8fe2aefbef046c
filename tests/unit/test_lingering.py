"""Who is disconnected for being slow still reads what the sockets had taken of its session."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from domi_fast import Context, Node, PeerLost, Tls, transport
from tests import reference
from tests.certificates import Authority
from tests.support import RawPeer, forget_records, guest_greeting, nodes, session, until

LIMIT = 64 << 10
SIZE = 10_000
CHANNEL = 50


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    authority = Authority(tmp_path_factory.mktemp("certificates"))
    return authority.issue("name")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def give_up(node: Node, machine: int) -> int:
    """Send until the node disconnects the peer: how many, with the one that was too many."""
    sent = 0
    while True:
        data = struct.pack("<I", sent) + bytes(SIZE - 4)
        sent += 1
        try:
            node.notify(CHANNEL, data, to=machine)
        except PeerLost:
            return sent
        if sent % 10 == 0:
            await asyncio.sleep(0)


async def disconnected(node: Node, machine: int = 700) -> tuple[RawPeer, int]:
    """A peer that has been, and how many messages it can still read."""
    raw = await RawPeer.plain(node, machine, receive_buffer=4096)
    sent = await give_up(node, machine)
    return raw, sent - node.drops()[machine, CHANNEL]


async def read_all(raw: RawPeer) -> list[int]:
    """The numbers of what comes until the stream ends."""
    got = []
    try:
        while True:
            frame = await raw.frame()
            if frame.channel == CHANNEL:
                got.append(struct.unpack_from("<I", frame.data)[0])
    except EOFError:
        return got


def giver_up(registry_url: str) -> AbstractAsyncContextManager[list[Node]]:
    return nodes(registry_url, "a", queue_limit=LIMIT, when_full="disconnect")


async def test_what_the_sockets_took_is_read(registry_url: str) -> None:
    async with giver_up(registry_url) as (node,):
        raw, left = await disconnected(node)
        assert 700 not in node.peers
        assert left > 0
        assert await read_all(raw) == [*range(left)]
        assert node._router.lingers(700)
        raw.close()
        await until(lambda: not node._router.lingers(700))


async def test_it_may_write_meanwhile(registry_url: str) -> None:
    async with giver_up(registry_url) as (node,):
        raw, left = await disconnected(node)
        for _ in range(100):
            await raw.send(bytes(60_000))
        assert await read_all(raw) == [*range(left)]
        raw.close()


async def test_who_was_disconnected_may_come_again(registry_url: str) -> None:
    async with giver_up(registry_url) as (node,):
        raw, left = await disconnected(node)
        again, more = await disconnected(node)
        assert await read_all(raw) == [*range(left)]
        assert len(await read_all(again)) > 0
        assert more > 0
        raw.close()
        again.close()


async def test_it_ends_after_a_while(registry_url: str) -> None:
    async with giver_up(registry_url) as (node,):
        node._router.linger_time = 0.1
        before = descriptors()
        raw, _ = await disconnected(node)
        await until(lambda: not node._router.lingers(700))
        assert descriptors() == before + 1
        raw.close()


async def test_it_ends_with_the_node(registry_url: str) -> None:
    before = descriptors()
    async with giver_up(registry_url) as (node,):
        raw, left = await disconnected(node)
        assert node._router.lingers(700)
    assert descriptors() == before + 1
    # The kernel goes on with what it has.
    assert await read_all(raw) == [*range(left)]
    raw.close()


async def test_there_are_not_too_many(registry_url: str) -> None:
    async with giver_up(registry_url) as (node,):
        raws = [(await disconnected(node, 700 + number))[0] for number in range(66)]
        assert [number for number in range(66) if not node._router.lingers(700 + number)] == [0, 1]
        assert node.counters()["lingers_cut_short"] == 2
        for raw in raws:
            raw.close()
        await until(lambda: not any(node._router.lingers(700 + number) for number in range(66)))


async def test_guests_take_no_nodes_place(registry_url: str) -> None:
    async with giver_up(registry_url) as (node,):
        raw, left = await disconnected(node)
        guests = []
        for _ in range(70):
            guests.append(await RawPeer.connect(node.port, receive_buffer=4096))
            await guests[-1].send(guest_greeting() + reference.subscriptions(1, [CHANNEL]))
            await node.wait_subscribed(CHANNEL, timeout=5)
            while node._router.sessions():
                node.publish(CHANNEL, bytes(SIZE))
                await asyncio.sleep(0)
        assert len(node._router.lingers(-1)) == 63
        assert node.counters()["lingers_cut_short"] == 7
        assert await read_all(raw) == [*range(left)]
        for peer in (raw, *guests):
            peer.close()


async def check_a_node(
    registry_url: str, monkeypatch: pytest.MonkeyPatch, of_a: dict[str, Any], of_b: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"queue_limit": LIMIT, "when_full": "disconnect", **of_a}
    async with (
        Node("name", registry=registry_url, **settings) as a,
        Node("name", registry=registry_url, **of_b) as b,
    ):
        got: list[int] = []

        def take(ctx: Context) -> None:
            got.append(struct.unpack_from("<I", ctx.data)[0])

        b.subscribe(CHANNEL, take)
        await a.wait_subscribed(CHANNEL, 1)
        dialled: list[list[Any]] = []
        dial = transport.dial

        async def watched(host: str, port: int, path: str | None) -> int:
            dialled.append(a._router.lingers(b.id))
            return await dial(host, port, path)

        monkeypatch.setattr(transport, "dial", watched)
        its, loop = session(b, a.id), asyncio.get_running_loop()
        loop.remove_reader(its.descriptor)
        sent = await give_up(a, b.id)
        # Several times what it waits before it dials who was lost.
        await asyncio.sleep(0.3)
        (offer,) = a._router.lingers(b.id)
        assert a._mesh._members.view[b.id].is_of(offer)
        assert (a.id in b.peers, b.id in a.peers) == (True, False)
        loop.add_reader(its.descriptor, its.readable)
        await until(lambda: b.id in a.peers and a.id in b.peers)
        assert got == [*range(sent - a.drops()[b.id, CHANNEL])]
        assert dialled
        assert not any(dialled)


async def test_nobody_is_dialled_who_still_reads(
    registry_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await check_a_node(registry_url, monkeypatch, {}, {})


async def test_over_unix_sockets(
    registry_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths = str(tmp_path / "a"), str(tmp_path / "b")
    await check_a_node(registry_url, monkeypatch, {"unix_path": paths[0]}, {"unix_path": paths[1]})


async def test_over_tls(registry_url: str, monkeypatch: pytest.MonkeyPatch, tls: Tls) -> None:
    await check_a_node(registry_url, monkeypatch, {"tls": tls}, {"tls": tls})
