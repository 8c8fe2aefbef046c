"""Who is declared lost for its silence: after a fixed time, or by the rhythm of its answers."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator
from statistics import NormalDist
from typing import Any

import pytest

from domi_fast import LibraryChannel, Node, PeerLost, connect, encode_frame
from tests.proxy import Proxy
from tests.support import RawPeer, forget_records, nodes, until

ANSWER = encode_frame(LibraryChannel.HEARTBEAT_REPLY, b"")
INTERVAL = 0.1


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Any:
    yield
    forget_records(caplog)


@contextlib.asynccontextmanager
async def peer_of(registry_url: str, **settings: Any) -> AsyncIterator[tuple[Node, RawPeer]]:
    """A peer that answers nothing by itself."""
    async with nodes(registry_url, "a", **{"heartbeat_interval": INTERVAL, **settings}) as (a,):
        raw = await RawPeer.plain(a, 700)
        try:
            yield a, raw
        finally:
            raw.close()


async def answer(raw: RawPeer, count: int, late: float = 0.0) -> None:
    """Answer so many heartbeats, every second one of them late by so many seconds."""
    for number in range(count):
        await raw.frame_on(LibraryChannel.HEARTBEAT)
        await asyncio.sleep(late * (number % 2))
        await raw.send(ANSWER)


def phi_of(silence: float, mean: float, deviation: float) -> float:
    return -math.log10(NormalDist(mean, deviation).cdf(2 * mean - silence))


async def lost_after(node: Node) -> float:
    """Seconds from now until the peer is lost."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await until(lambda: 700 not in node.peers, timeout=20)
    return loop.time() - begun


async def test_a_regular_peer_is_lost_long_before_the_timeout(registry_url: str) -> None:
    async with peer_of(registry_url, heartbeat_timeout=60.0, phi_threshold=8) as (a, raw):
        await answer(raw, 10)
        # 2.4 intervals: with a standard deviation of a quarter, 5.6 of them above the mean.
        assert 2 * INTERVAL < await lost_after(a) < 10
        assert a.counters()["peers_silent"] == 1


async def test_without_a_threshold_the_timeout_alone_decides(registry_url: str) -> None:
    async with peer_of(registry_url, heartbeat_timeout=30.0) as (a, raw):
        await answer(raw, 3)
        await until(lambda: a.peers[700].phi > 50)
        await raw.send(ANSWER)
        await until(lambda: a.peers[700].phi < 1)


async def test_an_irregular_peer_is_borne_with(registry_url: str) -> None:
    """It answers now and again half a second late, and is not lost for being silent so long."""
    async with peer_of(registry_url, heartbeat_timeout=60.0, phi_threshold=8) as (a, raw):
        # Bytes that are no answers keep it alive until its rhythm is known.
        for _ in range(4):
            await answer(raw, 1)
            for _ in range(3):
                await raw.frame_on(LibraryChannel.HEARTBEAT)
                await raw.send(encode_frame(LibraryChannel.PONG, b"pong"))
            await answer(raw, 1)
        # Intervals of one beat and of four; a regular peer's patience would be 2.4 of them.
        assert await lost_after(a) > 6 * INTERVAL


async def test_the_timeout_is_the_most_that_is_borne(registry_url: str) -> None:
    settings: Any = {"heartbeat_interval": 1.0, "heartbeat_timeout": 1.1}
    async with peer_of(registry_url, phi_threshold=100, **settings) as (a, raw):
        await answer(raw, 1)
        # By its rhythm it would be borne with for 6.3 s.
        assert await lost_after(a) < 4


@pytest.mark.parametrize("silence", [0.05, 0.15, 0.25])
async def test_phi_is_that_of_a_normal_distribution(registry_url: str, silence: float) -> None:
    loop = asyncio.get_running_loop()
    before = loop.time()
    async with peer_of(registry_url, heartbeat_timeout=60.0) as (a, _):
        after = loop.time()
        assert a.peers[700].phi < phi_of(loop.time() - before, INTERVAL, INTERVAL / 4) + 1e-6
        await asyncio.sleep(silence)
        least = phi_of(loop.time() - after, INTERVAL, INTERVAL / 4)
        assert least - 1e-6 <= a.peers[700].phi
        assert a.peers[700].phi <= phi_of(loop.time() - before, INTERVAL, INTERVAL / 4) + 1e-6


async def test_any_byte_is_a_sign_of_life(registry_url: str) -> None:
    async with peer_of(registry_url, heartbeat_timeout=60.0, phi_threshold=8) as (a, raw):
        await answer(raw, 2)
        # Ten intervals, without one answer to a heartbeat.
        for _ in range(40):
            await raw.send(encode_frame(60, b""))
            await asyncio.sleep(INTERVAL / 4)
        assert 700 in a.peers
        assert await lost_after(a) < 10


async def test_a_slow_way_is_no_irregular_one(registry_url: str) -> None:
    """Answers that come later than the next heartbeats do, each as late as the others."""
    async with peer_of(registry_url, heartbeat_timeout=60.0, phi_threshold=8) as (a, raw):
        late = 3.5 * INTERVAL
        loop = asyncio.get_running_loop()
        for _ in range(30):
            await raw.frame_on(LibraryChannel.HEARTBEAT)
            loop.call_later(late, raw.sock.send, ANSWER)
        assert 700 in a.peers
        assert a.counters().get("peers_silent", 0) == 0
        await asyncio.sleep(late)
        assert await lost_after(a) < 10


async def test_answers_that_nobody_asked_for_say_nothing(registry_url: str) -> None:
    async with peer_of(registry_url, heartbeat_timeout=60.0, phi_threshold=8) as (a, raw):
        await answer(raw, 3)
        await raw.send(ANSWER * 10_000)
        await answer(raw, 10)
        assert a.counters().get("peers_silent", 0) == 0


@pytest.mark.parametrize("phi", [None, 8])
async def test_who_stood_still_asks_before_it_blames(registry_url: str, phi: float | None) -> None:
    """The peer says nothing unless it is asked, and it was not asked meanwhile."""
    async with peer_of(registry_url, heartbeat_timeout=0.5, phi_threshold=phi) as (a, raw):
        for _ in range(3):
            await answer(raw, 5)
            time.sleep(0.7)  # the node and its peer are of one loop
            await answer(raw, 3)
        assert a.counters().get("peers_silent", 0) == 0


async def test_phi_of_the_lost_is_infinite(registry_url: str) -> None:
    async with peer_of(registry_url, heartbeat_timeout=0.2) as (a, _):
        peer = a.peers[700]
        await lost_after(a)
        assert peer.phi == math.inf


async def test_a_guest_has_the_setting_too(registry_url: str) -> None:
    settings: Any = {"heartbeat_interval": INTERVAL, "heartbeat_timeout": 60.0}
    passed: list[bytes] = []

    def note(data: bytes) -> bytes:
        passed.append(data)
        return data

    async with nodes(registry_url, "a") as (a,), Proxy(a.port) as proxy:
        proxy.through = note
        guest = await connect(f"tcp://127.0.0.1:{proxy.port}", phi_threshold=8, **settings)
        try:
            await until(lambda: ANSWER in b"".join(passed))
            await until(lambda: guest._session is not None and guest._session.phi < 1)
            proxy.cut()
            with pytest.raises(PeerLost, match="silent for"):
                await asyncio.wait_for(guest.request(50, b"", timeout=30), 20)
        finally:
            proxy.mend()
            await guest.close()
