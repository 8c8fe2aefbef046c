"""A publish to many: what goes to the kernel at once, and what is queued."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import socket
import statistics
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from domi_fast import Context, Node, PeerLost, connect
from domi_fast.limiter import RateLimit
from tests import reference
from tests.strangers import Stranger, extended
from tests.support import session, until

FEED = 60
TAG = reference.publish_extend()


@asynccontextmanager
async def subscribers(
    url: str, count: int, **settings: Any
) -> AsyncIterator[tuple[Node, list[Stranger]]]:
    """A node, and so many peers by hand that subscribe to FEED: machines 7, 8 and so on."""
    async with (
        Node("publisher", registry=url, **settings) as node,
        contextlib.AsyncExitStack() as s,
    ):
        peers = [
            await s.enter_async_context(extended(node, url, 7 + number, (FEED,)))
            for number in range(count)
        ]
        for peer in peers:
            await peer.settled()
        yield node, peers


def there(peer: Stranger) -> list[reference.Frame]:
    """What the kernel has for this peer now: the loop has no turn meanwhile."""
    with contextlib.suppress(BlockingIOError):
        while raw := peer.sock.recv(1 << 16):
            peer.decoder.feed(raw)
    found = [frame for frame in peer.decoder.frames if frame.channel == FEED]
    peer.decoder.frames.clear()
    return found


async def next_of_feed(peer: Stranger) -> bytes:
    while (frame := await peer.hear()).channel != FEED:
        pass
    return frame.data


def published(*data: bytes) -> list[reference.Frame]:
    return [reference.Frame(FEED, each, TAG) for each in data]


async def test_the_first_of_a_turn_is_with_the_kernel_when_publish_returns(
    registry_url: str,
) -> None:
    async with subscribers(registry_url, 3) as (node, peers):
        assert node.publish(FEED, b"at once") == 3
        assert [there(peer) for peer in peers] == [published(b"at once")] * 3
        assert node.publish(FEED, b"later") == node.publish(FEED, b"last") == 3
        assert [there(peer) for peer in peers] == [[]] * 3
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert [there(peer) for peer in peers] == [published(b"later", b"last")] * 3


async def test_the_first_of_a_turn_waits_where_the_turn_before_had_several(
    registry_url: str,
) -> None:
    async with subscribers(registry_url, 3) as (node, peers):
        for number in range(3):
            node.publish(FEED, b"one")
            node.publish(FEED, b"two")
            # As many system calls with the first at once as without: it was known too late.
            assert [there(peer) for peer in peers] == [[published(b"one"), []][number > 0]] * 3
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            left = [published(b"two"), published(b"one", b"two")][number > 0]
            assert [there(peer) for peer in peers] == [left] * 3
        # Of a turn with one alone that is known when it is over.
        node.publish(FEED, b"alone")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert [there(peer) for peer in peers] == [published(b"alone")] * 3
        node.publish(FEED, b"at once")
        assert [there(peer) for peer in peers] == [published(b"at once")] * 3


async def test_what_handlers_publish_does_not_hold_up_the_first_of_a_turn(
    registry_url: str,
) -> None:
    async with subscribers(registry_url, 2) as (node, peers):
        node.subscribe(61, lambda ctx: [node.publish(FEED, ctx.data) for _ in range(3)])
        await peers[0].say(reference.encode(61, b"x"))
        for peer in peers:
            assert [await next_of_feed(peer) for _ in range(3)] == [b"x"] * 3
            there(peer)
        for _ in range(2):
            node.publish(FEED, b"at once")
            assert [there(peer) for peer in peers] == [published(b"at once")] * 2
            await asyncio.sleep(0)
            await asyncio.sleep(0)


async def test_of_a_handler_too_all_goes_out_before_the_loop_waits(registry_url: str) -> None:
    async with subscribers(registry_url, 2) as (node, peers):
        node.subscribe(61, lambda ctx: [node.publish(FEED, ctx.data) for _ in range(3)])
        await peers[0].say(reference.encode(61, b"x"))
        for peer in peers:
            assert [await next_of_feed(peer) for _ in range(3)] == [b"x"] * 3


@pytest.mark.parametrize("size", [0, 1, 440, 447, 448, 2038, 2039, 2040, 9000, 70_000])
async def test_data_of_any_size(registry_url: str, size: int) -> None:
    async with subscribers(registry_url, 2) as (node, peers):
        data = bytes(range(256)) * (size // 256 + 1)
        before = node.counters()
        node.publish(FEED, data[:size])
        for peer in peers:
            assert await peer.hear() == reference.Frame(FEED, data[:size], TAG)
        after = node.counters()
        assert after["frames_out"] - before["frames_out"] == 2
        assert after["bytes_out"] - before["bytes_out"] == 2 * (9 + size)


async def test_what_is_queued_is_not_overtaken(registry_url: str) -> None:
    async with subscribers(registry_url, 2) as (node, peers):
        node.notify(FEED, b"first", to=7)
        node.notify(FEED, b"second", to=7)
        node.publish(FEED, b"third")
        node.publish(FEED, b"fourth")
        assert [(await peers[0].hear()).data for _ in range(4)] == [
            *(b"first", b"second"),
            *(b"third", b"fourth"),
        ]
        assert [(await peers[1].hear()).data for _ in range(2)] == [b"third", b"fourth"]


async def test_what_the_kernel_does_not_take_follows(registry_url: str) -> None:
    """One that does not read, until its queue holds some; then it reads, and has all in order."""
    async with subscribers(registry_url, 2) as (node, peers):
        count = 0
        while not session(node, 7).queued:
            assert node.publish(FEED, struct.pack("<I", count) + bytes(1500)) == 2
            count += 1
            await asyncio.sleep(0)
        for _ in range(20):
            node.publish(FEED, struct.pack("<I", count) + bytes(1500))
            count += 1
        for peer in peers:
            numbers = [struct.unpack_from("<I", (await peer.hear()).data)[0] for _ in range(count)]
            assert numbers == list(range(count))
        await until(lambda: session(node, 7).queued == 0)


async def test_a_peer_that_has_gone_is_told_of_and_the_others_are_served(
    registry_url: str,
) -> None:
    lost: list[bytes] = []
    async with subscribers(
        registry_url, 3, on_error=lambda error, frame: lost.append(frame.data)
    ) as (node, peers):
        linger = struct.pack("ii", 1, 0)
        peers[1].sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        peers[1].sock.close()
        # Its reset is there, and the loop has not looked yet.
        assert node.publish(FEED, b"to whoever lives") == 3
        for peer in (peers[0], peers[2]):
            assert there(peer) == published(b"to whoever lives")
        await until(lambda: 8 not in node.peers)
        assert lost == [b"to whoever lives"]
        assert node.publish(FEED, b"the next") == 2


async def test_the_node_itself_is_among_them(registry_url: str) -> None:
    async with subscribers(registry_url, 1) as (node, peers):
        came: list[bytes] = []

        def own(ctx: Context) -> None:
            came.append(ctx.data)

        node.subscribe(FEED, own)
        await peers[0].settled()
        assert node.publish(FEED, b"to all") == 2
        assert there(peers[0]) == published(b"to all")
        assert came == []
        await until(lambda: came == [b"to all"])


async def test_a_rate_limit_counts_it(registry_url: str) -> None:
    async with subscribers(registry_url, 2, peer_rate_limit=RateLimit(1000, 100)) as (node, _):
        assert node.publish(FEED, bytes(200)) == 2
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert node.publish(FEED, b"as much as may be was sent") == 0


async def test_who_is_left_out_may_be_answered_by_another_publish(registry_url: str) -> None:
    """``on_error`` publishes while queues are full, which ends the sessions of those that are next:
    they are left out, and whoever reads gets all of it, in order."""
    limits = {"queue_limit": 256 << 10, "when_full": "disconnect"}
    async with subscribers(registry_url, 4, **limits) as (node, peers):
        reader = peers[-1]
        count = 0
        lost: list[type[Exception]] = []

        def publish(size: int) -> None:
            nonlocal count
            count += 1
            node.publish(FEED, struct.pack("<I", count) + bytes(size))

        def again(error: Exception, frame: Any) -> None:
            lost.append(type(error))
            if len(lost) % 10 == 1:
                publish(60_000)

        node.on_error = again
        got: list[int] = []

        async def read() -> None:
            while True:
                (number,) = struct.unpack_from("<I", await next_of_feed(reader))
                got.append(number)

        reading = asyncio.ensure_future(read())
        while len(node.peers) > 1:
            publish(20_000)
            await until(lambda: session(node, 10).queued == 0)
        await until(lambda: len(got) == count)
        reading.cancel()
        assert got == [*range(1, count + 1)]
        assert PeerLost in lost
        assert 10 in node.peers


async def test_on_error_does_not_hear_of_its_own_publishes(registry_url: str) -> None:
    """Two that are full, and an ``on_error`` that publishes to both: once for each, and no more."""
    async with subscribers(registry_url, 2, queue_limit=65_536) as (node, _):
        told: list[bytes] = []

        def again(error: Exception, frame: Any) -> None:
            told.append(frame.data[:5])
            node.publish(FEED, b"alarm" + bytes(1000))

        node.on_error = again
        while node.publish(FEED, b"first" + bytes(60_000)):
            pass
        assert len(told) < 5
        told.clear()
        refused = node.counters()["refused_queue_full"]
        assert node.publish(FEED, b"later" + bytes(60_000)) == 0
        assert told == [b"later"] * 2
        assert node.counters()["refused_queue_full"] - refused == 2 + 2 * 2


async def test_what_the_collector_runs_may_unsubscribe(registry_url: str) -> None:
    """While the list is made of those that it goes to."""

    class Last:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            if armed:
                armed.clear()
                node.unsubscribe(FEED)
                kept.append([bytearray(size) for size in (24, 32, 40, 64, 96) for _ in range(50)])

    async with Node("publisher", registry=registry_url) as node:
        armed: list[bool] = []
        kept: list[list[bytearray]] = []
        thresholds = gc.get_threshold()
        for _ in range(300):
            node.subscribe(FEED, lambda ctx: None)
            Last()
            young = [[] for _ in range(100)]  # type: ignore[var-annotated]
            gc.set_threshold(1, 1, 1)
            armed.append(True)
            try:
                assert node.publish(FEED, b"x") in {0, 1}
            finally:
                armed.clear()
                gc.set_threshold(*thresholds)
            del young
            if node._router.handlers():
                node.unsubscribe(FEED)
        assert kept


async def test_a_publish_to_one_that_is_dropped_is_not_sent(registry_url: str) -> None:
    async with subscribers(registry_url, 1, queue_limit=65_536, when_full="drop_newest") as (
        node,
        _,
    ):
        while node.publish(FEED, bytes(30_000)):
            pass
        assert node.publish(FEED, b"x", to=7) == 0
        assert node.publish_many(FEED, [b"x"] * 10, to=7) == 0


async def test_what_is_published_to_many_guests_goes_out_together(registry_url: str) -> None:
    """Sending to 200 takes as long as six turns of 70 us, and there is as much time for what comes
    next and is for the same many."""
    async with Node("publisher", registry=registry_url) as node, contextlib.AsyncExitStack() as s:
        for _ in range(200):
            guest = await s.enter_async_context(await connect(f"tcp://127.0.0.1:{node.port}"))
            guest.subscribe(FEED, lambda ctx: None)
        [first, *_] = sessions = node._router.sessions()
        await until(lambda: all(FEED in session.subscribed for session in sessions))
        delivered: list[tuple[int, int]] = []
        node.subscribe(FEED, lambda ctx: delivered.append((first.queued, time.perf_counter_ns())))
        for _ in range(1000):
            node.publish(FEED, b"sixteen bytes!!!")
        await until(lambda: len(delivered) == 1000)
        # What waits grows until it goes out.
        spans = []
        began = delivered[0][1]
        for (queued, then), (following, now) in itertools.pairwise(delivered):
            if following <= queued:
                spans.append(then - began)
                began = now
        assert len(spans) > 3
        assert statistics.median(spans[1:]) > 250_000
