"""Room in the queues: what waits for it, in its turn, and what a whole node may queue."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
import time
from collections import Counter
from typing import Any

import pytest

from domi_fast import (
    Context,
    DeadlineExceeded,
    DomiError,
    Node,
    Overloaded,
    PeerLost,
)
from tests.slow import LIMIT, SENT, SIZE, ask, deaf, fill, number_of, numbered, read, send, stuck
from tests.support import (
    forget_records,
    nodes,
    until,
)


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO)
    yield
    forget_records(caplog)


def fill_at_once(node: Node, **to: int) -> int:
    """Send until there is no room, while the loop stands still; how many."""
    sent = 0
    with contextlib.suppress(Overloaded):
        while True:
            node.notify(50, bytes(60_000), **to)
            sent += 1
    return sent


# ---------------------------------------------------------------------------- requests that wait


async def test_nothing_passes_a_request_that_waits(registry_url: str) -> None:
    """Of a peer that reads steadily and more slowly than is sent: there is always a little room."""
    async with nodes(registry_url, "a", "b", queue_limit=LIMIT) as (a, b):
        got: list[bytes] = []

        def handler(ctx: Context) -> Any:
            time.sleep(0.0002)
            got.append(ctx.data[:4])
            if ctx.is_request:
                ctx.reply(b"")

        b.subscribe(50, handler)
        await a.wait_subscribed(50, timeout=5)
        a.when_full("drop_newest", channel=50)
        while not a.drops():
            a.notify(50, numbered(0))
        request = a.request(50, b"wait" + bytes(SIZE))
        after = 1
        while not request.done():
            # More than goes out: what is sent now is dropped, or goes behind the request.
            for _ in range(20):
                a.notify(50, numbered(after))
                after += 1
            await asyncio.sleep(0)
        assert request.result() == b""
        first = next(n for n, data in enumerate(got) if data == b"wait")
        assert {number_of(data) for data in got[:first]} == {0}
        # Then there is an end to all of it.
        await asyncio.wait_for(a.drained(b.id), 10)


async def test_what_waits_counts_for_the_node(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", queue_limit=LIMIT, node_queue_limit=LIMIT) as (a, b):
        b.subscribe(50, lambda ctx: ctx.reply(b"") if ctx.is_request else None)
        await a.wait_subscribed(50, timeout=5)
        a.subscribe(60, lambda ctx: ctx.reply(b""))
        with deaf(b, a):
            asked, _ = ask(a, 50, SIZE)
            others, _ = ask(a, 60, SIZE)
            assert len(others) * SIZE < 2 * (64 << 10)
        await asyncio.gather(*asked, *others)
        # The first that waits of a session may be more than what the node has left, and no other.
        with deaf(b, a):
            fill_at_once(a)
            large = a.request(50, bytes(LIMIT))
            others, _ = ask(a, 60, SIZE)
            assert len(others) * SIZE < 2 * (64 << 10)
        await asyncio.gather(large, *others)
        assert a.counters()["in_flight"] == 0
        # All of it has come back.
        with deaf(b, a):
            again, _ = ask(a, 50, SIZE)
            assert len(again) > len(asked) // 2
        await asyncio.gather(*again)


async def test_what_has_ended_waits_no_more(registry_url: str) -> None:
    """Requests to a peer that is stuck, once they have ended, leave their room to others."""
    settings: dict[str, Any] = {"queue_limit": LIMIT, "node_queue_limit": 2 * LIMIT}
    async with nodes(registry_url, "a", "b", **settings) as (a, b), stuck(a):
        b.subscribe(50, lambda ctx: None)
        await a.wait_subscribed(50, timeout=5)
        with deaf(b, a):
            fill_at_once(a)
            asked = [a.request(50, bytes(SIZE)) for _ in range(20)]
            short, error = await fill(a, 700)
            for request in asked:
                request.cancel()
            more, again = await fill(a, 700)
            assert "as many as the node may queue" in str(error)
            assert "as many as a session may queue" in str(again)
            assert short > 0 < more
            assert a.peers[700].queued >= LIMIT
        await asyncio.wait_for(a.drained(b.id), 5)


async def test_what_is_past_its_deadline_waits_no_more(registry_url: str) -> None:
    settings: dict[str, Any] = {"queue_limit": LIMIT, "node_queue_limit": 2 * LIMIT}
    async with nodes(registry_url, "a", "b", **settings) as (a, b), stuck(a):
        b.subscribe(50, lambda ctx: None)
        await a.wait_subscribed(50, timeout=5)
        with deaf(b, a):
            fill_at_once(a)
            for request in [a.request(50, bytes(SIZE), timeout=0.05) for _ in range(20)]:
                with pytest.raises(DeadlineExceeded):
                    await request
            _, error = await fill(a, 700)
            assert "as many as a session may queue" in str(error)
        await asyncio.wait_for(a.drained(b.id), 5)


async def test_nobody_is_disconnected_for_what_waits(registry_url: str) -> None:
    """A queue that is not full is no reason, though a request waits and the node has no room."""
    settings: dict[str, Any] = {"queue_limit": 4 * LIMIT, "node_queue_limit": 4 * LIMIT}
    async with nodes(registry_url, "a", "b", **settings) as (a, b), stuck(a):
        b.subscribe(50, lambda ctx: ctx.reply(b"") if ctx.is_request else None)
        await a.wait_subscribed(50, timeout=5)
        await fill(a, 700)
        a.when_full("disconnect", channel=50)
        with deaf(b, a):
            fill_at_once(a)
            assert b.id in a.peers
            request = a.request(50, b"waits")
            with pytest.raises(Overloaded, match="as many as the node may queue"):
                a.notify(50, b"")
            assert b.id in a.peers
        assert await request == b""


async def test_a_request_waits_for_room(registry_url: str) -> None:
    """In its turn: what is sent after it on its channel does not pass it."""
    async with nodes(registry_url, "a", queue_limit=64 << 10) as (a,):
        got: list[bytes] = []

        def answer(ctx: Any) -> None:
            got.append(ctx.data[:4])
            if ctx.is_request:
                ctx.reply(ctx.data)

        a.subscribe(50, answer)
        sent = [numbered(number, 1_000) for number in range(120)]
        asked = [a.request(50, data) for data in sent]
        with pytest.raises(Overloaded):
            a.notify(50, numbered(120))
        assert await asyncio.gather(*asked) == sent
        a.notify(50, numbered(120))
        await until(lambda: len(got) == 121)
        assert got == [struct.pack("<I", number) for number in range(121)]
        assert a.counters()["in_flight"] == 0


async def test_what_waits_may_be_as_much_again_as_the_queue(registry_url: str) -> None:
    async with nodes(registry_url, "a", queue_limit=64 << 10) as (a,):
        a.subscribe(50, lambda ctx: ctx.reply(b""))
        asked, error = ask(a, 50, 979)
        assert "requests wait for room" in str(error)
        assert (error.limit, error.peer, error.channel) == (64 << 10, a.id, 50)
        assert len(asked) == 66 + 66
        # Those that were given up make room for others.
        for request in asked[100:]:
            request.cancel()
        asked[100:] = [a.request(50, bytes(979)) for _ in range(20)]
        assert await asyncio.gather(*asked) == [b""] * len(asked)
        assert a.counters()["refused_queue_full"] == 1


async def test_a_mutable_message_is_what_it_was_when_it_was_sent(registry_url: str) -> None:
    async with nodes(registry_url, "a", queue_limit=64 << 10) as (a,):
        a.subscribe(50, lambda ctx: ctx.reply(ctx.data))
        filling = [a.request(50, bytes(10_000)) for _ in range(8)]
        data = bytearray(b"before")
        request = a.request(50, data)
        data[:] = b"after!"
        assert await request == b"before"
        await asyncio.gather(*filling)


async def test_how_a_request_that_waits_may_end(registry_url: str) -> None:
    """Its deadline passes, or it is cancelled, and it is never sent; or its peer goes."""
    async with nodes(registry_url, "a", "b", queue_limit=LIMIT) as (a, b):
        got: Counter[bytes] = Counter()

        def handler(ctx: Any) -> None:
            got[ctx.data[:4]] += 1

        b.subscribe(50, handler)
        await a.wait_subscribed(50, timeout=5)
        # The loop of both is held: nothing is read meanwhile.
        sent = fill_at_once(a)
        late = a.request(50, b"late" + bytes(1_000), timeout=0.01)
        given_up = a.request(50, b"gone" + bytes(1_000))
        given_up.cancel()
        too_large = bytes(a.config.frame_limit)
        with pytest.raises(DomiError, match="frame_limit"):
            a.request(50, too_large)
        time.sleep(0.05)
        with pytest.raises(DeadlineExceeded):
            await late
        with pytest.raises(asyncio.CancelledError):
            await given_up
        await until(lambda: sum(got.values()) == sent)
        await asyncio.sleep(0)
        assert got[b"late"] == got[b"gone"] == 0
        with deaf(b, a):
            fill_at_once(a)
            waiting = a.request(50, b"lost" + bytes(1_000))
            await b.close()
            with pytest.raises(PeerLost):
                await waiting
        assert got[b"lost"] == 0


# --------------------------------------------------------------------------------- the whole node


async def test_a_node_queues_so_much_for_all_of_them(registry_url: str) -> None:
    """Beyond 64 KiB for each; who is short of room hears when others have given some back."""
    async with (
        nodes(registry_url, "a", queue_limit=4 * LIMIT, node_queue_limit=4 * LIMIT) as (a,),
        stuck(a) as one,
        stuck(a, 701) as other,
    ):
        sent, _ = await fill(a, 700)
        short, error = await fill(a, 701)
        assert "as many as the node may queue" in str(error)
        queued = [a.peers[machine].queued for machine in (700, 701)]
        assert sum(queued) < 4 * LIMIT + (64 << 10) * 2 + 2 * (SIZE + 8)
        assert (error.peer, error.limit) == (701, 4 * LIMIT)
        # There is little in its queue, and still no room.
        room = a.drained(701)
        await asyncio.sleep(0.05)
        assert not room.done()
        assert await read(one, sent) == [*range(sent)]
        await asyncio.wait_for(room, 5)
        a.notify(50, numbered(short), to=701)
        assert await read(other, short + 1) == [*range(short + 1)]
        # All that was granted has come back.
        for machine, raw in ((701, other), (700, one)):
            count, _ = await fill(a, machine)
            assert a.peers[machine].queued >= 4 * LIMIT
            assert await read(raw, count) == [*range(count)]


async def test_a_session_that_goes_gives_its_room_back(registry_url: str) -> None:
    async with (
        nodes(registry_url, "a", queue_limit=4 * LIMIT, node_queue_limit=4 * LIMIT) as (a,),
        stuck(a) as one,
        stuck(a, 701),
    ):
        a.on_error = lambda error, frame: None
        with pytest.raises(Overloaded):
            await send(a, 10 * SENT)
        with pytest.raises(Overloaded):
            await send(a, 10 * SENT, to=701)
        room = a.drained(701)
        assert not room.done()
        one.reset()
        await asyncio.wait_for(room, 5)


@pytest.mark.parametrize("limit", [LIMIT - 1, 0, "1", 1.5])
def test_limits_that_are_refused(registry_url: str, limit: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="node_queue_limit"):
        Node("a", registry=registry_url, queue_limit=LIMIT, node_queue_limit=limit)


async def test_a_request_that_the_node_has_no_room_for_says_so(registry_url: str) -> None:
    limits = {"queue_limit": 1 << 20, "node_queue_limit": 1 << 20}
    async with (
        nodes(registry_url, "a", **limits) as (a,),
        Node("b", registry=registry_url) as b,
        Node("c", registry=registry_url) as c,
    ):
        others = [b, c]
        for other in others:
            other.subscribe(50, lambda ctx: None)
        await a.wait_subscribed(50, 2, timeout=5)
        for other in others:
            fill_at_once(a, to=other.id)
        asked, refused = ask(a, 50, 1000, to=others[1].id)
        assert "as many as the node has room for" in str(refused)
        assert refused.limit == 1 << 20
        for request in asked:
            request.cancel()
