"""Guests: the same verbs through one node, as the one who asks and as the one who answers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from domi_fast import (
    AlreadyReplied,
    Client,
    Context,
    DeadlineExceeded,
    DomiError,
    FrameError,
    Node,
    NodeConfig,
    NoSubscriber,
    Overloaded,
    PeerLost,
    RemoteError,
    connect,
    encode_frame,
)
from domi_fast.config import GuestConfig
from tests.support import RawPeer, echo, forget_records, nodes, slowness, until


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


def url(node: Node) -> str:
    return f"tcp://127.0.0.1:{node.port}"


@asynccontextmanager
async def guests(*hosts: Node, **settings: Any) -> AsyncIterator[list[Client]]:
    """A guest at each of these nodes."""
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(await connect(url(host), **settings)) for host in hosts
        ]


def fail(ctx: Context) -> None:
    raise ValueError("no luck")


# -------------------------------------------------------------------------------- a guest that asks


async def test_every_verb_of_a_guest(registry_url: str) -> None:
    """To the guest's own node and to another one."""
    async with nodes(registry_url, "a", "b") as (a, b), guests(a) as (guest,):
        got: list[tuple[int, bytes, int]] = []
        replies: list[tuple[bytes, int]] = []
        for node in (a, b):
            node.subscribe(60, lambda ctx, me=node.id: got.append((me, ctx.data, ctx.sender)))
            node.subscribe(61, lambda ctx, me=node.id: ctx.reply(b"%d " % me + ctx.data))
        a.subscribe(62, lambda ctx: ctx.next(ctx.data + b" a"))
        b.subscribe(63, lambda ctx: got.append((b.id, ctx.data, ctx.sender)))
        guest.subscribe(70, lambda ctx: replies.append((ctx.data, ctx.sender)))
        for channel, count in ((60, 2), (61, 2), (63, 1)):
            await a.wait_subscribed(channel, count, 5)
        assert guest.connected
        assert guest.node_id == a.id

        for node in (a, b):
            guest.notify(60, b"notify", to=node.id)
            assert await guest.request(61, b"request", to=node.id) == b"%d request" % node.id
            guest.call(61, b"call", 70, to=node.id)
            guest.publish(60, b"publish to", to=node.id)
        guest.publish(60, b"publish")
        guest.ventilator([62, 63], b"pipeline")
        await until(lambda: len(got) == 7 and len(replies) == 2)
        # For the others the guest's node is who sent it.
        assert Counter(got) == Counter(
            [(n.id, text, a.id) for n in (a, b) for text in (b"notify", b"publish to", b"publish")]
            + [(b.id, b"pipeline a", a.id)]
        )
        assert Counter(replies) == Counter((b"%d call" % n.id, n.id) for n in (a, b))


async def test_a_guests_requests_take_turns(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b), guests(a) as (guest,):
        for node in (a, b):
            node.subscribe(60, lambda ctx, me=node.id: ctx.reply(b"%d" % me))
        await a.wait_subscribed(60, 2, 5)
        answers = [await guest.request(60, b"") for _ in range(6)]
        assert answers == answers[:2] * 3
        assert set(answers) == {b"%d" % a.id, b"%d" % b.id}


async def test_the_outcomes_of_a_guests_request(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b), guests(a) as (guest,):
        kept: list[Context] = []

        def full(ctx: Context) -> None:
            raise Overloaded("too much")

        for node, first in ((a, 100), (b, 200)):
            node.subscribe(first, echo)
            node.subscribe(first + 1, fail)
            node.subscribe(first + 2, kept.append)
            node.subscribe(first + 3, full)
            node.subscribe(first + 4, lambda ctx: None)
        await a.wait_subscribed(204, timeout=5)
        for first in (100, 200):
            assert await guest.request(first, b"x") == b"x"
            with pytest.raises(RemoteError) as remote:
                await guest.request(first + 1, b"")
            assert (remote.value.type, remote.value.message) == ("ValueError", "no luck")
            assert remote.value.channel == first + 1
            begun = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await guest.request(first + 2, b"", 0.05)
            assert 0.05 <= time.monotonic() - begun < 0.05 + 0.3 * slowness()
            with pytest.raises(Overloaded, match="too much"):
                await guest.request(first + 3, b"", None)
            with pytest.raises(RemoteError) as forgotten:
                await guest.request(first + 4, b"", None)
            assert forgotten.value.type == "NoAnswer"
            cancelled = guest.request(first + 2, b"", None)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
        with pytest.raises(NoSubscriber) as nobody:
            await guest.request(300, b"", None)
        assert nobody.value.channel == 300
        with pytest.raises(PeerLost):
            await guest.request(100, b"", None, to=1000)
        with pytest.raises(NoSubscriber):
            await guest.request(200, b"", None, to=a.id)
        assert guest.counters()["in_flight"] == 0
        for ctx in kept:
            with contextlib.suppress(DomiError):
                ctx.reply(b"late")
        await until(lambda: a.counters()["in_flight"] == 0)


async def test_what_a_guest_hears_later(registry_url: str) -> None:
    told: list[tuple[DomiError, Any]] = []
    async with (
        nodes(registry_url, "a") as (a,),
        guests(a, on_error=lambda error, frame: told.append((error, frame))) as (guest,),
    ):
        guest.notify(300, b"notify")
        guest.call(300, b"call", 301)
        guest.ventilator([300, 301], b"pipeline")
        guest.publish(300, b"publish")
        guest.notify(300, b"to", to=1000)
        await until(lambda: len(told) == 4)
        assert [frame.data for _, frame in told] == [b"notify", b"call", b"pipeline", b"to"]
        assert [type(error) for error, _ in told] == [NoSubscriber] * 3 + [PeerLost]
        assert {frame.channel for _, frame in told} == {300}


async def test_a_guest_refuses_at_once_what_it_can(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,), guests(a, frame_limit=10_000) as (guest,):
        for channel in (49, 65500, 65512, -1, 70000):
            for verb in (
                lambda channel=channel: guest.notify(channel, b""),
                lambda channel=channel: guest.publish(channel, b""),
                lambda channel=channel: guest.request(channel, b""),
                lambda channel=channel: guest.call(channel, b"", 60),
                lambda channel=channel: guest.call(60, b"", channel),
                lambda channel=channel: guest.ventilator([60, channel], b""),
                lambda channel=channel: guest.subscribe(channel, echo),
            ):
                with pytest.raises(ValueError, match=str(channel)):
                    verb()
        for data, kind in (("text", TypeError), (bytes(10_000), FrameError)):
            for verb in (
                lambda data=data: guest.notify(60, data),
                lambda data=data: guest.publish(60, data),
                lambda data=data: guest.request(60, data),
                lambda data=data: guest.call(60, data, 61),
                lambda data=data: guest.ventilator([60], data),
            ):
                with pytest.raises(kind):
                    verb()
        with pytest.raises(DeadlineExceeded):
            guest.request(60, b"", 0)
        with pytest.raises(ValueError, match="timeout"):
            guest.request(60, b"", float("nan"))
        for verb in (
            lambda: guest.notify(60, b""),
            lambda: guest.request(60, b""),
            lambda: guest.subscribe(60, echo),
        ):
            with pytest.raises(DomiError, match="thread"):
                await asyncio.to_thread(verb)
        assert guest.counters()["in_flight"] == 0


# ----------------------------------------------------------------------------- a guest that answers


async def test_a_guest_serves_everybody(registry_url: str) -> None:
    """Its node, another node, a guest of the same node, a guest of another one, itself."""
    async with (
        nodes(registry_url, "a", "b") as (a, b),
        guests(a, a, b) as (server, near, far),
    ):
        got: list[tuple[bytes, int]] = []
        replies: list[tuple[str, bytes]] = []
        server.subscribe(60, lambda ctx: ctx.reply(b"served " + ctx.data))
        server.subscribe(61, lambda ctx: got.append((ctx.data, ctx.sender)))
        server.subscribe(62, fail)
        for node in (a, b):
            await node.wait_subscribed(62, timeout=5)
        for name, sender, node in (
            ("a", a, a),
            ("b", b, b),
            ("near", near, a),
            ("far", far, b),
            ("server", server, a),
        ):
            text = name.encode()
            sender.subscribe(70, lambda ctx, name=name: replies.append((name, ctx.data)))
            assert await sender.request(60, text) == b"served " + text
            with pytest.raises(RemoteError, match="no luck"):
                await sender.request(62, text)
            sender.call(60, text, 70)
            sender.notify(61, text + b" notify")
            sender.publish(61, text + b" publish")
            await until(lambda: len(replies) == 1)
            assert replies == [(name, b"served " + text)]
            replies.clear()
            await until(lambda: len(got) == 2)
            assert got == [(text + b" notify", node.id), (text + b" publish", node.id)]
            got.clear()
            sender.unsubscribe(70)


async def test_two_guests_with_one_reply_channel(registry_url: str) -> None:
    """Each gets the replies to its own calls, whoever answers."""
    async with nodes(registry_url, "a", "b") as (a, b), guests(a, a, b) as (one, two, three):
        await replies_come_home(a, b, two, {"one": one, "two": two, "three": three})


async def test_a_guest_and_its_node_with_one_reply_channel(registry_url: str) -> None:
    """The node's own replies are not for the guest that subscribes to the same channel."""
    async with nodes(registry_url, "a", "b") as (a, b), guests(a, b) as (one, two):
        await replies_come_home(a, b, two, {"one": one, "a": a})


async def replies_come_home(a: Node, b: Node, server: Client, callers: dict[str, Any]) -> None:
    got: dict[str, list[bytes]] = {name: [] for name in callers}
    for name, each in callers.items():
        each.subscribe(70, lambda ctx, name=name: got[name].append(ctx.data))
    a.subscribe(60, echo)
    b.subscribe(60, echo)
    server.subscribe(61, echo)
    for node in (a, b):
        await node.wait_subscribed(60, 2, 5)
        await node.wait_subscribed(61, timeout=5)
    for number in range(20):
        for name, each in callers.items():
            each.call(60, b"%s %d" % (name.encode(), number), 70)
            each.call(61, b"%s %d guest" % (name.encode(), number), 70)
    await until(lambda: sum(len(texts) for texts in got.values()) == 40 * len(callers))
    for name, texts in got.items():
        assert {text.split()[0] for text in texts} == {name.encode()}
        assert len(set(texts)) == 40


async def test_guests_and_their_node_take_turns(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b), guests(a, a) as (one, two):
        served: Counter[str] = Counter()
        for name, each in (("a", a), ("one", one), ("two", two)):

            def handler(ctx: Context, name: str = name) -> None:
                served[name] += 1
                ctx.reply(name.encode())

            each.subscribe(60, handler)
        await until(lambda: len(a._router.sessions()) == 3)
        await b.wait_subscribed(60, timeout=5)
        await until(lambda: sum(60 in s.subscribed for s in a._router.sessions()) == 2)
        await asyncio.gather(*(b.request(60, b"") for _ in range(30)))
        assert served == {"a": 10, "one": 10, "two": 10}
        got: list[str] = []
        for name, each in (("a", a), ("one", one), ("two", two)):
            each.subscribe(61, lambda ctx, name=name: got.append(name))
        await b.wait_subscribed(61, timeout=5)
        await until(lambda: sum(61 in s.subscribed for s in a._router.sessions()) == 2)
        # One node, three subscribers: a publish reaches all of them.
        assert b.publish(61, b"") == 1
        await until(lambda: len(got) == 3)
        assert sorted(got) == ["a", "one", "two"]


async def test_a_guest_in_a_pipeline(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b), guests(a, b) as (one, other):
        results: list[tuple[bytes, int]] = []
        failed: list[BaseException] = []
        one.subscribe(60, lambda ctx: ctx.next(ctx.data + b" one"))
        b.subscribe(61, lambda ctx: ctx.next(ctx.data + b" b"))

        async def later(ctx: Context) -> None:
            await asyncio.sleep(0)
            ctx.next(ctx.data + b" other")

        other.subscribe(62, later)
        one.subscribe(63, lambda ctx: results.append((ctx.data, ctx.sender)))

        def last(ctx: Context) -> None:
            try:
                ctx.next(b"")
            except DomiError as error:
                failed.append(error)

        one.subscribe(64, last)
        for node in (a, b):
            for channel in range(60, 65):
                await node.wait_subscribed(channel, timeout=5)
        for sender in (a, b, one, other):
            sender.ventilator([60, 61, 62, 63], b"start")
            await until(lambda: results)
            assert results.pop() == (b"start one b other", b.id)
        a.ventilator([64], b"")
        await until(lambda: failed)
        assert "last stage" in str(failed[0])


async def test_a_guest_stage_whose_next_has_no_subscriber(registry_url: str) -> None:
    told: list[tuple[DomiError, Any]] = []
    async with (
        nodes(registry_url, "a") as (a,),
        guests(a, on_error=lambda error, frame: told.append((error, frame))) as (guest,),
    ):
        guest.subscribe(60, lambda ctx: ctx.next(b"onwards"))
        await a.wait_subscribed(60, timeout=5)
        a.ventilator([60, 300], b"")
        await until(lambda: told)
        error, frame = told[0]
        assert isinstance(error, NoSubscriber)
        assert (error.channel, frame.channel, frame.data) == (300, 300, b"onwards")


async def test_a_context_at_a_guest(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b), guests(a) as (guest,):
        kept: list[Context] = []
        guest.subscribe(60, kept.append)
        await b.wait_subscribed(60, timeout=5)
        begun = time.monotonic()
        requests = [b.request(60, b"x", 3.0), a.request(60, b"y", None)]
        b.notify(60, b"z")
        await until(lambda: len(kept) == 3)
        by_data = {ctx.data: ctx for ctx in kept}
        first, second, third = by_data[b"x"], by_data[b"y"], by_data[b"z"]
        assert (first.sender, second.sender, third.sender) == (b.id, a.id, b.id)
        assert (first.is_request, second.is_request, third.is_request) == (True, True, False)
        assert first.deadline is not None
        assert begun + 2.5 < first.deadline < time.monotonic() + 3.1
        assert (second.deadline, third.deadline) == (None, None)
        with pytest.raises(DomiError):
            third.reply(b"")
        await asyncio.to_thread(first.reply, b"from a thread")
        second.error("not now")
        assert await requests[0] == b"from a thread"
        with pytest.raises(RemoteError, match="not now"):
            await requests[1]
        with pytest.raises(AlreadyReplied):
            second.reply(b"")


async def test_deadlines_across_guests(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b), guests(a, b) as (asker, server):
        kept: list[Context] = []
        server.subscribe(60, kept.append)
        await a.wait_subscribed(60, timeout=5)
        begun = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await asker.request(60, b"", 0.1)
        assert 0.1 <= time.monotonic() - begun < 0.1 + 0.3 * slowness()
        assert kept[0].deadline is not None
        assert kept[0].deadline < begun + 0.1 + 0.2 * slowness()
        # On the way the request is forgotten too.
        await until(lambda: all(n.counters()["in_flight"] == 0 for n in (a, b)))
        kept[0].reply(b"late")
        server.subscribe(61, echo)
        await a.wait_subscribed(61, timeout=5)
        assert await asker.request(61, b"fine") == b"fine"


async def test_a_guest_that_unsubscribes_with_requests_under_way(registry_url: str) -> None:
    """What its node has sent on before it knew is refused as a node would refuse it."""
    async with nodes(registry_url, "a", "b") as (a, b), guests(a) as (guest,):

        def once(ctx: Context) -> None:
            guest.unsubscribe(60)
            ctx.reply(b"once")

        guest.subscribe(60, once)
        await b.wait_subscribed(60, timeout=5)
        requests = [b.request(60, b"", None) for _ in range(3)]
        _, pending = await asyncio.wait(requests, timeout=2)
        assert not pending, "a request that nobody took has no end"
        assert requests[0].result() == b"once"
        for request in requests[1:]:
            assert isinstance(request.exception(), NoSubscriber)
        await until(lambda: not b.subscribers(60))
        with pytest.raises(NoSubscriber):
            b.notify(60, b"")


async def test_a_notify_that_a_guest_does_not_take_is_told_to_its_sender(registry_url: str) -> None:
    told: list[tuple[DomiError, Any]] = []
    async with nodes(registry_url, "a", "b") as (a, b), guests(a) as (guest,):
        b.on_error = lambda error, frame: told.append((error, frame))
        guest.subscribe(60, echo)
        await b.wait_subscribed(60, timeout=5)
        guest.unsubscribe(60)
        b.notify(60, b"lost")
        await until(lambda: told)
        error, frame = told[0]
        assert isinstance(error, NoSubscriber)
        assert (frame.channel, frame.data) == (60, b"lost")


async def test_watch_channel_of_a_guest(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,), guests(a) as (guest,):
        async with guest.watch_channel(60, maxsize=3) as messages:
            await a.wait_subscribed(60, timeout=5)
            for number in range(3):
                a.notify(60, b"%d" % number)
            with pytest.raises(Overloaded):
                await a.request(60, b"")
            got = [(await messages.__anext__()).data for _ in range(3)]
            assert got == [b"0", b"1", b"2"]
        await until(lambda: not a.subscribers(60))


async def test_order_through_a_guest(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b), guests(a, b) as (sender, receiver):
        got: list[int] = []
        receiver.subscribe(60, lambda ctx: got.append(int.from_bytes(ctx.data[:4], "big")))
        await a.wait_subscribed(60, timeout=5)
        total = 1000
        for number in range(total):
            data = number.to_bytes(4, "big") + bytes((0, 10, 9000, 70_000)[number % 4])
            while True:
                try:
                    if number % 3:
                        sender.notify(60, data)
                    else:
                        sender.publish(60, data)
                    break
                except Overloaded:
                    await sender.drained()
            if number % 20 == 0:
                # A guest's node drops what the next one has no room for: leave it some time.
                await until(lambda number=number: len(got) >= number - 100)
        await until(lambda: len(got) == total, 10)
        assert got == list(range(total))


@pytest.mark.parametrize("size", [0, 1, 65_536, 1 << 20, 15 << 20])
async def test_large_data_through_guests(registry_url: str, size: int) -> None:
    data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    async with nodes(registry_url, "a", "b") as (a, b), guests(a, b) as (one, other):
        other.subscribe(60, echo)
        await a.wait_subscribed(60, timeout=5)
        assert await one.request(60, bytearray(data), 30) == data


# -------------------------------------------------------------------------------------------- death


async def test_a_guest_dies_with_requests_both_ways(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b), guests(a, a) as (guest, other):
        asked: list[Context] = []
        kept: list[Context] = []
        guest.subscribe(60, asked.append)
        b.subscribe(61, kept.append)
        b.subscribe(62, echo)
        await b.wait_subscribed(60, timeout=5)
        await a.wait_subscribed(62, timeout=5)
        own = [guest.request(61, b"", None) for _ in range(2)]
        others = [sender.request(60, b"", None) for sender in (a, b, other)]
        await until(lambda: len(asked) == 3 and len(kept) == 2)
        [mine] = [s for s in a._router.sessions() if s.is_guest and 60 in s.subscribed]
        mine.close("for the test")
        for request in (*own, *others):
            with pytest.raises(PeerLost):
                await asyncio.wait_for(request, 2)
        assert not guest.connected
        await until(lambda: not b.subscribers(60))
        # Its contexts cannot be answered any more, and nobody minds what comes for it.
        for ctx in asked:
            with pytest.raises(PeerLost):
                ctx.reply(b"")
        for ctx in kept:
            ctx.reply(b"for the dead")
        assert await other.request(62, b"alive") == b"alive"
        assert [n.counters()["in_flight"] for n in (a, b)] == [0, 0]


async def test_every_verb_of_a_guest_without_its_node_says_so(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,), guests(a) as (guest,):
        request = guest.request
        guest.subscribe(60, echo)
        await a.close()
        await until(lambda: not guest.connected)
        for verb in (
            lambda: guest.notify(60, b""),
            lambda: guest.publish(60, b""),
            lambda: guest.call(60, b"", 61),
            lambda: request(60, b""),
            lambda: guest.ventilator([60], b""),
            guest.drained,
        ):
            with pytest.raises(PeerLost):
                verb()
        guest.unsubscribe(60)


async def test_a_node_dies_with_requests_of_its_guest(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b), guests(a) as (guest,):
        kept: list[Context] = []
        asked: list[Context] = []
        b.subscribe(60, kept.append)
        guest.subscribe(61, asked.append)
        await a.wait_subscribed(60, timeout=5)
        await b.wait_subscribed(61, timeout=5)
        own = guest.request(60, b"", None)
        other = b.request(61, b"", None)
        await until(lambda: kept and asked)
        died = time.monotonic()
        a._router.stop("killed by the test")
        for request in (own, other):
            with pytest.raises(PeerLost):
                await asyncio.wait_for(request, 2)
        assert time.monotonic() - died < 0.1 * slowness()
        with pytest.raises(PeerLost):
            asked[0].reply(b"")
        with pytest.raises(PeerLost):
            kept[0].reply(b"")


async def test_a_guest_closes(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        got: list[int] = []
        a.subscribe(60, lambda ctx: got.append(len(ctx.data)))
        guest = await connect(url(a))
        for _ in range(10):
            guest.notify(60, bytes(1 << 20))
        request = guest.request(60, b"", None)
        await guest.close()
        await guest.close()
        assert not guest.connected
        with pytest.raises((PeerLost, RemoteError)):
            await request
        await until(lambda: not a._router.sessions())
        assert got[:10] == [1 << 20] * 10
        with pytest.raises(DomiError):
            guest.notify(60, b"")


async def test_a_guest_gives_up_on_a_node_that_does_not_read(registry_url: str) -> None:
    """Closing takes its two seconds at most, and leaves no exception that nobody asked for."""
    async with nodes(registry_url, "a") as (a,):
        guest = await connect(url(a))
        # The node stops reading: its reader is taken off the loop.
        [mine] = a._router.sessions()
        asyncio.get_running_loop().remove_reader(mine.descriptor)
        with contextlib.suppress(Overloaded):
            while True:
                guest.notify(60, bytes(1 << 20))
                await asyncio.sleep(0)
        begun = time.monotonic()
        await guest.close()
        assert time.monotonic() - begun < 2.0 + 1.0 * slowness()
        del guest
        gc.collect()
        await asyncio.sleep(0)


# --------------------------------------------------------------------------------------- connecting


async def test_a_guest_on_a_unix_socket(registry_url: str, tmp_path: Path) -> None:
    path = str(tmp_path / "node.sock")
    async with nodes(registry_url, "a", unix_path=path) as (a,):
        a.subscribe(60, echo)
        async with await connect(f"unix://{path}") as guest:
            assert guest.node_id == a.id
            assert await guest.request(60, bytes(200_000)) == bytes(200_000)


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "127.0.0.1:7000",
        "tcp://",
        "tcp://127.0.0.1",
        "tcp://:7000",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:70000",
        "tcp://127.0.0.1:port",
        "tcp://127.0.0.1:7000/path",
        "tcp://user@127.0.0.1:7000",
        "tcp://127.0.0.1:7000?x=1",
        "http://127.0.0.1:7000",
        "unix://relative/path",
        "unix://",
        "unix:///",
        "unix:///tmp/a.sock?x=1",
        "memory://name",
        "tcp://[::1",
    ],
)
async def test_bad_urls(bad: str) -> None:
    with pytest.raises(ValueError, match="tcp://host:port"):
        await connect(bad)


@pytest.mark.parametrize(
    "bad",
    [
        "tcp://:s3cret@127.0.0.1:7000",
        "tcp://me:s3cret@127.0.0.1:7000",
        "tcp://me:s3cret/a@127.0.0.1:7000",
        "tcp://me:[s3cret@127.0.0.1:7000",
        "me:s3cret@127.0.0.1:7000",
        "tcp://127.0.0.1:7000?secret=s3cret",
        b"tcp://me:s3cret@127.0.0.1:7000",
    ],
)
async def test_a_bad_url_gives_no_secret_away(bad: Any) -> None:
    with pytest.raises(ValueError, match="tcp://host:port") as refused:
        await connect(bad)
    assert "s3cret" not in str(refused.value)


async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(ConnectionRefusedError):
        await connect("tcp://127.0.0.1:1")
    with pytest.raises(FileNotFoundError):
        await connect(f"unix://{tmp_path}/nothing.sock")


async def test_whoever_listens_is_no_node(registry_url: str) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def wrong(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read()
        writer.close()

    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    for behaviour in (silent, wrong, closing):
        server = await asyncio.start_server(behaviour, "127.0.0.1")
        port = server.sockets[0].getsockname()[1]
        begun = time.monotonic()
        with pytest.raises((PeerLost, asyncio.TimeoutError)):
            await connect(f"tcp://127.0.0.1:{port}", timeout=0.3)
        assert time.monotonic() - begun < 0.3 + 0.5 * slowness()
        server.close()
        await server.wait_closed()


async def test_a_guest_of_another_cluster(registry_url: str) -> None:
    async with nodes(registry_url, "a", cluster="one") as (a,):
        with pytest.raises(PeerLost, match="one"):
            await connect(url(a), cluster="two")
        async with await connect(url(a), cluster="one") as guest:
            assert guest.connected
        await until(lambda: not a._router.sessions())


async def test_settings_of_a_guest(registry_url: str) -> None:
    with pytest.raises(TypeError):
        await connect("tcp://127.0.0.1:7000", colour="red")
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(60, [].append)
        async with guests(a, request_timeout=0.05) as (guest,):
            with pytest.raises(DeadlineExceeded):
                await guest.request(60, b"")


class Awaited:
    async def __call__(self, error: DomiError, frame: Any) -> None:
        """Nobody awaits it."""


async def awaited(error: DomiError, frame: Any) -> None:
    """Nobody awaits it."""


@contextlib.contextmanager
def listening() -> Iterator[tuple[socket.socket, str]]:
    """A socket that takes connections and never answers, and its URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server, f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("setting", "value", "kind"),
    [
        ("timeout", 0, ValueError),
        ("timeout", -1, ValueError),
        ("timeout", float("nan"), ValueError),
        ("timeout", float("inf"), ValueError),
        ("timeout", None, ValueError),
        ("timeout", "5", ValueError),
        ("timeout", True, ValueError),
        ("timeout", 10**400, ValueError),
        ("request_timeout", -1, ValueError),
        ("request_timeout", 0, ValueError),
        ("request_timeout", float("nan"), ValueError),
        ("request_timeout", None, ValueError),
        ("heartbeat_interval", 0, ValueError),
        ("heartbeat_interval", -1, ValueError),
        ("heartbeat_interval", float("nan"), ValueError),
        ("heartbeat_interval", 10, ValueError),
        ("heartbeat_timeout", 5, ValueError),
        ("heartbeat_timeout", 1, ValueError),
        ("heartbeat_timeout", float("nan"), ValueError),
        ("queue_limit", 0, ValueError),
        ("queue_limit", -1, ValueError),
        ("queue_limit", 1e6, TypeError),
        ("frame_limit", 4095, ValueError),
        ("frame_limit", 1 << 32, ValueError),
        ("frame_limit", None, TypeError),
        ("on_error", 5, TypeError),
        ("on_error", awaited, TypeError),
        ("on_error", functools.partial(awaited), TypeError),
        ("on_error", Awaited(), TypeError),
        ("name", "", ValueError),
        ("name", "x" * 256, ValueError),
        ("name", "é" * 128, ValueError),
        ("name", "\ud800", ValueError),
        ("name", b"guest", ValueError),
        ("name", None, ValueError),
        ("cluster", "a b", ValueError),
        ("cluster", "x" * 65, ValueError),
        ("cluster", None, ValueError),
        ("cluster", 0, ValueError),
        ("secret", "hush", ValueError),
        ("secret", b"", ValueError),
        ("secret", 5, TypeError),
        ("colour", "red", TypeError),
        ("version", "1.0", TypeError),
    ],
)
async def test_settings_of_a_guest_that_are_refused(
    setting: str, value: Any, kind: type[Exception]
) -> None:
    """Before anything is dialled, and by a message that names the setting."""
    with listening() as (server, address):
        with pytest.raises(kind, match=setting):
            await connect(address, **{setting: value})
        await asyncio.sleep(0)
        with pytest.raises(BlockingIOError):
            server.accept()


async def test_a_keyword_that_a_guest_does_not_have_is_answered_with_those_that_it_has() -> None:
    with pytest.raises(TypeError) as refused:
        await connect("tcp://127.0.0.1:1", shape="round", colour="red")
    text = str(refused.value)
    assert text.startswith("Client has no setting colour, shape; it has name, cluster, secret")
    assert all(field.name in text for field in fields(GuestConfig))


def test_a_guest_has_the_defaults_of_a_node() -> None:
    node, guest = NodeConfig("guest"), GuestConfig()
    for field in fields(GuestConfig):
        if field.name not in {"cluster", "node"}:
            assert getattr(guest, field.name) == getattr(node, field.name)


async def test_the_longest_name_of_a_guest(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,), guests(a, name="x" * 255) as (guest,):
        assert guest.connected
        assert guest.config.name == "x" * 255
        assert [session.info.name for session in a._router.sessions()] == ["x" * 255]


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


async def test_a_guest_that_cannot_connect_leaves_nothing_behind(registry_url: str) -> None:
    """No session, no descriptor, no exception that nobody asked for (conftest looks for those)."""
    async with nodes(registry_url, "a") as (a,):
        with listening() as (server, address):
            open_before = descriptors()
            for _ in range(3):
                with pytest.raises(asyncio.TimeoutError, match=r"did not answer within 0\.05 s"):
                    await connect(address, timeout=0.05)
                # The other end sees it end.
                accepted, _ = server.accept()
                with accepted:
                    accepted.settimeout(5)
                    while accepted.recv(1 << 16):
                        pass
            for _ in range(3):
                with pytest.raises(PeerLost):
                    await connect(url(a), cluster="another")
                with pytest.raises(ConnectionRefusedError):
                    await connect("tcp://127.0.0.1:1")
            await until(lambda: not a._router.sessions())
            assert descriptors() == open_before


async def test_connecting_is_cancelled_at_any_step(registry_url: str) -> None:
    """Either the guest is the caller's, or nobody's; a cancellation does not get lost."""
    async with nodes(registry_url, "a") as (a,):
        open_before = descriptors()
        steps = 0
        while True:
            connecting = asyncio.ensure_future(connect(url(a)))
            for _ in range(steps):
                await asyncio.sleep(0)
            if not connecting.cancel():
                break
            with pytest.raises(asyncio.CancelledError):
                await connecting
            steps += 1
        await (await connecting).close()
        assert steps > 3
        await until(lambda: not a._router.sessions())
        assert descriptors() == open_before


async def test_a_session_that_cannot_begin_is_closed(
    registry_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unspeakable:
        def encode(self) -> bytes:
            raise DomiError("no offer")

    async with nodes(registry_url, "a") as (a,):
        guest = Client(url(a))
        monkeypatch.setattr(guest, "_offer", Unspeakable())
        with pytest.raises(DomiError, match="no offer"):
            await guest._connect(5)
        assert not guest.connected
        await until(lambda: not a._router.sessions())
        del guest
        gc.collect()


async def test_connect_is_the_only_way_to_connect() -> None:
    assert not hasattr(Client, "start")
    guest = Client("tcp://127.0.0.1:1")
    with pytest.raises(DomiError):
        guest.notify(60, b"")
    await guest.close()


async def test_a_guest_takes_no_machine_id(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,), guests(a, a, a):
        assert not a.peers
        assert len(a._router.sessions()) == 3
        async with Node("b", registry=registry_url) as b:
            assert b.id == 1
            await b.wait_peers(1, 5)


async def test_a_guest_cannot_send_what_is_not_its_own(registry_url: str) -> None:
    """Frames on users' channels come from nodes only; a guest's are dropped and counted."""
    async with nodes(registry_url, "a") as (a,):
        got: list[Context] = []
        a.subscribe(60, got.append)
        raw = await RawPeer.guest(a)
        try:
            await raw.send(encode_frame(60, b"forged", b"\x05\x00\x3c\x00"))
            await until(lambda: a.counters().get("dropped_not_negotiated") == 1)
            assert not got
        finally:
            raw.close()


async def test_subscriptions_made_before_and_after_connecting(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        guest = Client(url(a))
        guest.subscribe(60, echo)
        await guest._connect(5)
        try:
            guest.subscribe(61, echo)
            await a.wait_subscribed(60, timeout=5)
            await a.wait_subscribed(61, timeout=5)
            assert await a.request(60, b"x") == b"x"
            guest.unsubscribe(60)
            await until(lambda: not a.subscribers(60))
            with pytest.raises(DomiError):
                guest.subscribe(61, echo)
        finally:
            await guest.close()
        await until(lambda: not a.subscribers(61))
