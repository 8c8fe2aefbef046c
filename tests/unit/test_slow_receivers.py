"""A receiver slower than its senders: what may wait for it, and what becomes of the rest."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import logging
import os
import pickle
import struct
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from domi_fast import (
    Context,
    DeadlineExceeded,
    DomiError,
    Frame,
    Node,
    Overloaded,
    PeerLost,
    Request,
    connect,
)
from domi_fast.metrics import rss
from tests import reference
from tests.support import (
    RawPeer,
    endings,
    forget_records,
    guest_greeting,
    nodes,
    session,
    until,
)

LIMIT = 256 << 10
SIZE = 10_000
SENT = 1_000
SANITIZED = os.environ.get("DOMI_SANITIZE") == "1"


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO)
    yield
    forget_records(caplog)


@contextlib.asynccontextmanager
async def stuck(node: Node, machine: int = 700) -> AsyncIterator[RawPeer]:
    """A peer that reads nothing until it is asked to."""
    raw = await RawPeer.plain(node, machine, receive_buffer=4096)
    try:
        yield raw
    finally:
        raw.close()


@contextlib.contextmanager
def deaf(node: Node, peer: Node) -> Iterator[None]:
    """The node reads nothing of the peer meanwhile."""
    its, loop = session(node, peer.id), asyncio.get_running_loop()
    loop.remove_reader(its.descriptor)
    yield
    if not its.closed:
        loop.add_reader(its.descriptor, its.readable)


def numbered(number: int, size: int = SIZE) -> bytes:
    return struct.pack("<I", number) + bytes(size - 4)


def number_of(data: bytes) -> int:
    return int(struct.unpack("<I", data[:4])[0])


async def send(node: Node, count: int = SENT, channel: int = 50, **to: int) -> None:
    for number in range(count):
        node.notify(channel, numbered(number), **(to or {"to": 700}))
        if number % 10 == 0:
            await asyncio.sleep(0)


async def fill(node: Node, machine: int, channel: int = 50) -> tuple[int, Overloaded]:
    """Send until there is no room, letting the loop go on; how many, and what was said then."""
    sent = 0
    try:
        while True:
            node.notify(channel, numbered(sent), to=machine)
            sent += 1
            await asyncio.sleep(0)
    except Overloaded as error:
        return sent, error


def fill_at_once(node: Node, size: int = 60_000) -> int:
    """Likewise, while the loop stands still."""
    sent = 0
    with contextlib.suppress(Overloaded):
        while True:
            node.notify(50, bytes(size))
            sent += 1
    return sent


def refusal(node: Node, size: int) -> Overloaded:
    """What is raised when its own queue is full, while the loop stands still."""
    try:
        while True:
            node.notify(50, bytes(size))
    except Overloaded as error:
        return error


def facts(error: Overloaded) -> tuple[object, ...]:
    return type(error), error.args, dict(vars(error))


def ask(node: Node, channel: int, size: int, **to: int) -> tuple[list[Request], Overloaded]:
    """Requests until no more may wait, and what was said then."""
    asked: list[Request] = []
    try:
        while True:
            asked.append(node.request(channel, bytes(size), **to))
    except Overloaded as error:
        return asked, error


async def read(raw: RawPeer, count: int, channel: int = 50) -> list[int]:
    return [number_of((await raw.frame_on(channel)).data) for _ in range(count)]


def warnings_of_slowness(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if " is slow: " in r.getMessage()]


# ---------------------------------------------------------------------------------------- policies


async def test_drop_newest(registry_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """What there is no room for is dropped without a word to its sender, and counted."""
    async with (
        nodes(registry_url, "a", queue_limit=LIMIT, when_full="drop_newest") as (a,),
        stuck(a) as raw,
    ):
        await send(a)
        assert LIMIT <= a.peers[700].queued < LIMIT + SIZE + 8
        dropped = a.drops()[700, 50]
        assert a.drops() == {(700, 50): dropped}
        assert a.counters()["dropped_slow_peer"] == dropped
        assert dropped > 100
        assert await read(raw, SENT - dropped) == [*range(SENT - dropped)]
        assert len(warnings_of_slowness(caplog)) == 1
        # It has caught up: there is room again. That it is slow is not told again so soon.
        a.notify(50, numbered(7), to=700)
        assert await read(raw, 1) == [7]
        await send(a)
        assert len(warnings_of_slowness(caplog)) == 1


async def test_drop_oldest(registry_url: str) -> None:
    """What has waited longest makes room, but for what is on its way."""
    async with (
        nodes(registry_url, "a", queue_limit=LIMIT, when_full="drop_oldest") as (a,),
        stuck(a) as raw,
    ):
        await send(a)
        assert LIMIT - LIMIT // 64 - SIZE - 8 <= a.peers[700].queued <= LIMIT
        dropped = a.drops()[700, 50]
        waited = a.peers[700].queued // (SIZE + 8)
        got = await read(raw, SENT - dropped)
        assert got == sorted(set(got))
        # But for one of which the socket has taken a part.
        assert got[1 - waited :] == [*range(SENT - waited + 1, SENT)]
        assert a.counters()["dropped_slow_peer"] == dropped > 100


async def test_disconnect(registry_url: str) -> None:
    """The session ends, and what it had not sent is counted and reported."""
    async with (
        nodes(registry_url, "a", queue_limit=LIMIT, when_full="disconnect") as (a,),
        stuck(a) as raw,
    ):
        lost: list[tuple[type[BaseException], int]] = []
        a.on_error = lambda error, frame: lost.append((type(error), number_of(frame.data)))
        with pytest.raises(PeerLost, match=r"slow: \d+ bytes wait for it") as caught:
            await send(a)
        assert caught.value.peer == 700
        assert 700 not in a.peers
        got = []
        with contextlib.suppress(EOFError):
            while True:
                got += await read(raw, 1)
        assert got == [*range(len(got))]
        numbers = [number for _, number in lost]
        assert {kind for kind, _ in lost} == {PeerLost}
        assert numbers == [*range(numbers[0], numbers[-1] + 1)]
        # Of those that were reported and the one that raised.
        assert a.drops() == {(700, 50): len(numbers) + 1}
        assert got[-1] == numbers[0] - 1


async def test_raise_is_what_a_node_does_unless_told(registry_url: str) -> None:
    async with nodes(registry_url, "a", queue_limit=LIMIT) as (a,), stuck(a):
        with pytest.raises(Overloaded):
            await send(a)
        assert a.drops() == {}


async def test_a_channel_or_a_peer_may_have_its_own(registry_url: str) -> None:
    """The channel's goes before the peer's, and that before the node's."""
    async with nodes(registry_url, "a", queue_limit=LIMIT) as (a,), stuck(a), stuck(a, 701):
        a.when_full("drop_newest", channel=50)
        await send(a)
        a.when_full("drop_newest", peer=701)
        await send(a, channel=51, to=701)
        assert [*a.drops()] == [(700, 50), (701, 51)]
        with pytest.raises(Overloaded):
            a.notify(51, b"", to=700)
        a.when_full("raise", channel=51)
        with pytest.raises(Overloaded):
            a.notify(51, b"", to=701)
        for taken_off in ({"channel": 50}, {"channel": 51}, {"peer": 701}):
            a.when_full(None, **taken_off)
        for machine in (700, 701):
            with pytest.raises(Overloaded):
                a.notify(50, b"", to=machine)
        a.when_full("drop_newest")
        for machine in (700, 701):
            a.notify(50, b"", to=machine)
        # One that has yet to come has the node's too, and the peer's before it.
        a.when_full("raise", peer=702)
        async with stuck(a, 702):
            with pytest.raises(Overloaded):
                await send(a, to=702)
        async with stuck(a, 703):
            await send(a, to=703)


@pytest.mark.parametrize(
    ("policy", "where", "text"),
    [
        ("drop", {}, "when_full 'drop': one of 'raise', 'drop_oldest'"),
        (None, {}, "when_full None"),
        (5, {"channel": 50}, "when_full 5"),
        ("raise", {"channel": 50, "peer": 1}, "one of them"),
        ("raise", {"channel": 70_000}, "channel 70000"),
        ("raise", {"peer": 1024}, "machine id 1024"),
    ],
)
def test_policies_that_are_refused(
    registry_url: str, policy: Any, where: dict[str, int], text: str
) -> None:
    node = Node("a", registry=registry_url)
    with pytest.raises(ValueError, match=text):
        node.when_full(policy, **where)
    if not where:
        with pytest.raises(ValueError, match="when_full"):
            Node("a", registry=registry_url, when_full=policy)


@pytest.mark.parametrize("policy", ["raise", "drop_oldest", "drop_newest"])
async def test_the_others_are_none_the_worse(registry_url: str, policy: Any) -> None:
    """All that was published reaches who reads; who does not has got, or is counted, the rest."""
    async with nodes(registry_url, "a", "b", "c", queue_limit=LIMIT, when_full=policy) as (a, b, c):
        a.on_error = lambda error, frame: None
        got: dict[Node, list[int]] = {b: [], c: []}
        for node, kept in got.items():
            node.subscribe(50, lambda ctx, kept=kept: kept.append(number_of(ctx.data)))
        await a.wait_subscribed(50, 2, timeout=5)
        sent = 3 * SENT  # more than the sockets have room for
        with deaf(c, a):
            for number in range(sent):
                a.publish(50, numbered(number))
                if number % 10 == 0:
                    await until(lambda number=number: len(got[b]) > number - 20)  # type: ignore[misc]
            await until(lambda: len(got[b]) == sent)
            assert got[b] == [*range(sent)]
        dropped = a.drops()[c.id, 50]
        assert [*a.drops()] == [(c.id, 50)]
        await until(lambda: len(got[c]) == sent - dropped)
        assert got[c] == sorted(set(got[c]))
        assert dropped > 100


async def test_a_publish_is_refused_with_what_a_notify_raises(registry_url: str) -> None:
    """Of many that are refused alike each has its own facts; kept, they hold nothing else."""
    told: list[tuple[Any, Frame]] = []
    said: list[str] = []
    async with nodes(registry_url, "a", queue_limit=64 << 10) as (a,):
        a.on_error = lambda error, frame: told.append((error, frame))
        for channel in (50, 51):
            a.subscribe(channel, lambda ctx: None)
        own = weakref.ref(session(a, a.id))
        for size in (1_000, 20_000):
            raised = facts(refusal(a, size))
            queued = session(a, a.id).queued
            text = (
                f"{queued} bytes wait for node {a.id}, as many as a session may queue"
                f": await node.drained({a.id}) or send less"
            )
            for channel in (50, 51, 50):
                assert a.publish(channel, b"%d" % channel) == 0
                error, frame = told[-1]
                assert type(error) is Overloaded
                assert error.args == (text,)
                assert (error.channel, error.peer, error.limit) == (channel, a.id, 64 << 10)
                assert error.advice == f": await node.drained({a.id}) or send less"
                assert frame == Frame(channel, b"%d" % channel)
                assert type(frame) is Frame
                said.append(text)
            last = told[-1][0]
            for twin in (last, copy.copy(last), pickle.loads(pickle.dumps(last))):
                assert facts(twin) == raised
            last.channel = 7  # who was told may write on it
            assert a.publish(50, b"50") == 0
            assert told.pop()[0].channel == 50
            await a.drained(a.id)
        assert said[0] != said[-1]
        assert a.drops() == {(a.id, 50): 6, (a.id, 51): 2}
        assert a.counters()["dropped_slow_peer"] == 8
        assert a.counters()["refused_queue_full"] == 10
    assert [str(error) for error, _ in told] == said
    gc.collect()
    assert own() is None


async def test_what_is_dropped_is_counted_by_then(registry_url: str) -> None:
    """Whenever it is asked for, of whichever channels in turn, and of who has gone meanwhile."""
    async with nodes(registry_url, "a", queue_limit=64 << 10, when_full="drop_newest") as (a,):
        expected: Counter[tuple[int, int]] = Counter()
        async with stuck(a), stuck(a, 701):
            while not a.drops():
                a.notify(50, bytes(60_000), to=700)
            expected[700, 50] = a.drops()[700, 50]
            while (701, 50) not in a.drops():
                a.notify(50, bytes(60_000), to=701)
            expected[701, 50] = a.drops()[701, 50]
            for channels in ((50,), (50, 51), (51, 51, 50, 52)):
                for channel in channels:
                    for machine in (700, 701):
                        a.notify(channel, bytes(60_000), to=machine)
                        expected[machine, channel] += 1
                assert a.counters()["dropped_slow_peer"] == expected.total()
                assert a.drops() == expected
            a.notify(53, bytes(60_000), to=700)
            session(a, 700).close("by the test")
            expected[700, 53] = 1
            assert a.drops() == expected
        assert a.counters()["dropped_slow_peer"] == expected.total()


async def test_the_library_goes_on_when_users_fill_the_queue(registry_url: str) -> None:
    """Requests, answers and what the library says itself are never dropped."""
    async with nodes(registry_url, "a", queue_limit=64 << 10, when_full="drop_oldest") as (a,):
        got: list[int] = []
        a.subscribe(50, lambda ctx: got.append(number_of(ctx.data)))
        a.subscribe(60, lambda ctx: ctx.reply(ctx.data))
        asked = []
        for number in range(SENT):
            a.notify(50, numbered(number, 1_000))
            if number % 50 == 0:
                asked.append(a.request(60, b"%d" % number))
        answers = await asyncio.gather(*asked)
        assert answers == [b"%d" % number for number in range(0, SENT, 50)]
        assert len(got) + a.drops()[a.id, 50] == SENT
        assert got[-1] == SENT - 1


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
async def test_a_handler_may_send_to_itself(registry_url: str, policy: Any) -> None:
    """The message in its hands is not the oldest that waits."""
    async with nodes(registry_url, "a", queue_limit=64 << 10, when_full=policy) as (a,):
        got: list[int] = []
        sent = 0

        def send(size: int) -> None:
            nonlocal sent
            a.notify(50, numbered(sent, size))
            sent += 1

        def handler(ctx: Context) -> None:
            got.append(number_of(ctx.data))
            if sent < SENT:
                send(3_000)

        a.subscribe(50, handler)
        for number in range(200):
            send(4 + number * 10)
        await until(lambda: len(got) + a.drops()[a.id, 50] == sent == SENT)
        assert got == sorted(set(got))


async def test_who_hears_that_a_peer_is_slow_may_end_its_session(registry_url: str) -> None:
    class Closes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if " is slow: " in record.getMessage():
                session(a, 700).close("a log handler ends it")

    closes = Closes()
    logging.getLogger("domi_fast.core").addHandler(closes)
    try:
        async with (
            nodes(registry_url, "a", queue_limit=LIMIT, when_full="drop_oldest") as (a,),
            stuck(a),
        ):
            a.on_error = lambda error, frame: None
            with pytest.raises(PeerLost):
                await send(a)
            assert 700 not in a.peers
    finally:
        logging.getLogger("domi_fast.core").removeHandler(closes)


async def test_a_channel_loses_nothing_to_the_policy_of_another(registry_url: str) -> None:
    """What was taken on a channel that raises stays, though another's makes room for itself."""
    async with nodes(registry_url, "a", queue_limit=LIMIT) as (a,), stuck(a) as raw:
        a.when_full("drop_oldest", channel=51)
        sent, _ = await fill(a, 700)
        for number in range(100):
            a.notify(51, numbered(number), to=700)
        assert a.drops() == {(700, 51): 100}
        assert await read(raw, sent) == [*range(sent)]


async def test_memory_is_bounded_whatever_is_kept(registry_url: str) -> None:
    """What may not be dropped lies between what was: no block is kept for a few bytes."""
    async with nodes(registry_url, "a", queue_limit=LIMIT) as (a,), stuck(a):
        a.when_full("drop_oldest", channel=51)
        before = rss()
        for _ in range(2_000):
            for number in range(32):
                a.notify(51, numbered(number, 1_000), to=700)
            with contextlib.suppress(Overloaded):
                a.notify(50, b"", to=700)
        assert a.peers[700].queued <= LIMIT + 1_008
        if not SANITIZED:  # it keeps what was freed
            assert rss() - before < 16 << 20


async def test_publish_says_to_how_many_it_was_sent(registry_url: str) -> None:
    async with nodes(registry_url, "a", queue_limit=64 << 10, when_full="drop_newest") as (a,):
        a.subscribe(50, lambda ctx: None)
        told = sum(a.publish(50, bytes(1_000)) for _ in range(100))
        assert told == 100 - a.drops()[a.id, 50]
        assert told < 100


# ------------------------------------------------------------------------------------------ guests


async def full_guest(node: Node, channel: int = 50) -> RawPeer:
    """A guest that has subscribed, and reads nothing more."""
    raw = await RawPeer.connect(node.port, receive_buffer=4096)
    await raw.send(guest_greeting() + reference.subscriptions(1, [channel]))
    await node.wait_subscribed(channel, timeout=5)
    return raw


@pytest.mark.parametrize("policy", ["raise", "drop_newest", "drop_oldest", "disconnect"])
async def test_a_slow_guest_harms_no_other(registry_url: str, policy: Any) -> None:
    """What it did not get is counted, and its node's own handler and other guests get all."""
    async with nodes(registry_url, "a", "b", queue_limit=LIMIT) as (a, b):
        a.when_full(policy, channel=50)
        b.on_error = lambda error, frame: None
        slow = await full_guest(a)
        got: list[list[int]] = [[], []]
        a.subscribe(50, lambda ctx: got[0].append(number_of(ctx.data)))
        async with await connect(f"tcp://127.0.0.1:{a.port}") as guest:
            guest.subscribe(50, lambda ctx: got[1].append(number_of(ctx.data)))
            await until(lambda: len(a._router.sessions()) == 3)
            await b.wait_subscribed(50, timeout=5)
            for number in range(SENT):
                b.publish(50, numbered(number))
                await until(lambda number=number: len(got[0]) == number + 1)  # type: ignore[misc]
            await until(lambda: len(got[1]) == SENT)
            assert got == [[*range(SENT)]] * 2
            assert a.drops()[-1, 50] > (20 if policy == "disconnect" else 100)
            assert b.drops() == {}
        slow.close()


async def test_a_request_through_a_guest_that_is_disconnected_ends_once(registry_url: str) -> None:
    """And who asked may ask again."""
    async with nodes(registry_url, "a", queue_limit=LIMIT) as (a,):
        slow = await full_guest(a)
        a.when_full("disconnect", channel=50)
        async with await connect(f"tcp://127.0.0.1:{a.port}") as guest:
            outcomes: list[list[str]] = []
            for _ in range(200):
                outcomes += [endings(guest.request(50, bytes(SIZE), 30)) for _ in range(10)]
                await asyncio.sleep(0)
                if not a.channels:
                    break
            await until(lambda: all(outcomes))
            assert {*map(tuple, outcomes)} <= {("PeerLost",), ("NoSubscriber",)}
            a.subscribe(60, lambda ctx: ctx.reply(b"again"))
            assert await guest.request(60, b"") == b"again"
            assert a.counters().get("late_answers", 0) == 0
            assert guest.counters().get("late_answers", 0) == 0
        slow.close()


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
            with contextlib.suppress(Overloaded):
                while True:
                    a.notify(50, bytes(60_000), to=other.id)
        asked, refused = ask(a, 50, 1000, to=others[1].id)
        assert "as many as the node has room for" in str(refused)
        assert refused.limit == 1 << 20
        for request in asked:
            request.cancel()
