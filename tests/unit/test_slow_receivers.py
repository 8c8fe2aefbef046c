"""A receiver slower than its senders: what may wait for it, and what becomes of the rest."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import logging
import os
import pickle
import weakref
from collections import Counter
from typing import Any

import pytest

from domi_fast import (
    Context,
    Frame,
    Node,
    Overloaded,
    PeerLost,
    connect,
)
from domi_fast.metrics import rss
from tests import reference
from tests.slow import LIMIT, SENT, SIZE, deaf, fill, number_of, numbered, read, send, stuck
from tests.support import (
    RawPeer,
    endings,
    forget_records,
    guest_greeting,
    nodes,
    session,
    until,
)

SANITIZED = os.environ.get("DOMI_SANITIZE") == "1"


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO)
    yield
    forget_records(caplog)


def refusal(node: Node, size: int) -> Overloaded:
    """What is raised when its own queue is full, while the loop stands still."""
    try:
        while True:
            node.notify(50, bytes(size))
    except Overloaded as error:
        return error


def facts(error: Overloaded) -> tuple[object, ...]:
    return type(error), error.args, dict(vars(error))


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
