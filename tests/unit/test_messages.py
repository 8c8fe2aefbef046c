"""Messages on their way: order, data of every kind and size, and the codec on its own."""

from __future__ import annotations

import array
import asyncio
import contextlib
import gc
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from domi_fast import (
    Context,
    DomiError,
    FrameError,
    Node,
    NoSubscriber,
    Overloaded,
    PeerLost,
)
from tests.property.test_codec import VECTORS, Vector, read_core, read_oracle, single_bytes
from tests.support import RawPeer, echo, forget_records, link, nodes, session, until

MIB = 1 << 20
STREAMS = [
    vector
    for vector in VECTORS
    if vector.kind in ("frame", "hello", "subscriptions", "fault", "fault_magic")
]


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


# -------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("receiver", ["other", "itself"])
async def test_order(registry_url: str, receiver: str) -> None:
    """notify, publish, call and request on one channel arrive in the order they were sent in."""
    async with nodes(registry_url, "a", "b") as (a, b):
        to = a if receiver == "itself" else b
        got: list[int] = []
        to.subscribe(50, lambda ctx: got.append(int.from_bytes(ctx.data[:4], "big")))
        a.subscribe(60, lambda ctx: None)
        await a.wait_subscribed(50, timeout=5)
        sizes = (4, 100, 8191, 8192, 20_000, 70_000, 300_000)
        total = 1500
        for number in range(total):
            data = number.to_bytes(4, "big").ljust(sizes[number * 7919 % 97 % len(sizes)], b".")
            kind = number * 31 % 4
            while True:
                try:
                    if kind == 0:
                        a.notify(50, data)
                    elif kind == 1:
                        if not a.publish(50, data):
                            raise Overloaded
                    elif kind == 2:
                        a.call(50, data, 60)
                    else:
                        a.request(50, data).add_done_callback(lambda r: r.exception())
                    break
                except Overloaded:
                    await a.drained(to.id)
            if number % 100 == 0:
                await asyncio.sleep(0)
        await until(lambda: len(got) == total, 20)
        assert got == list(range(total))


async def test_order_of_the_answers_to_calls(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        got: list[int] = []
        b.subscribe(50, echo)
        a.subscribe(60, lambda ctx: got.append(int(ctx.data)))
        await a.wait_subscribed(50, timeout=5)
        for number in range(2000):
            a.call(50, b"%d" % number, 60)
        await until(lambda: len(got) == 2000)
        assert got == list(range(2000))


async def test_a_message_to_oneself_is_not_handled_within_the_verb(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        got: list[bytes] = []
        a.subscribe(50, lambda ctx: got.append(ctx.data))
        a.notify(50, b"x")
        assert not got
        await until(lambda: got)


# ----------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize("size", [0, 1, 7, 8, 4096, 65_527, 65_536, 65_537, MIB, 15 * MIB])
async def test_data_of_any_size(registry_url: str, size: int) -> None:
    data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    async with nodes(registry_url, "a", "b") as (a, b):
        for node in (a, b):
            node.subscribe(50, echo)
        await a.wait_subscribed(50, 2, 5)
        for node in (a, b):
            assert await a.request(50, data, 20, to=node.id) == data


@pytest.mark.parametrize("size", [5, 9000, 100_000])
@pytest.mark.parametrize(
    "kind",
    [bytes, bytearray, memoryview, lambda data: memoryview(bytearray(data)), "array", "subclass"],
)
async def test_data_of_any_kind(registry_url: str, kind: Any, size: int) -> None:
    class Bytes(bytes):
        pass

    plain = bytes(range(256)) * (size // 256 + 1)
    plain = plain[:size]
    if kind == "array":
        data: Any = array.array("B", plain)
    elif kind == "subclass":
        data = Bytes(plain)
    else:
        data = kind(plain)
    async with nodes(registry_url, "a", "b") as (a, b):
        got: list[bytes] = []
        for node in (a, b):
            node.subscribe(50, lambda ctx: got.append(ctx.data))
            node.subscribe(51, lambda ctx: ctx.reply(data))
        await a.wait_subscribed(51, 2, 5)
        for node in (a, b):
            a.notify(50, data, to=node.id)
            a.publish(50, data, to=node.id)
            a.call(51, data, 50, to=node.id)
            answer = await a.request(51, data, to=node.id)
            assert answer == plain
            assert type(answer) is bytes
        assert a.publish(50, data) == 2
        await until(lambda: len(got) == 8)
        assert got == [plain] * 8
        assert {type(one) for one in got} == {bytes}


async def test_what_is_sent_does_not_change_any_more(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        got: list[bytes] = []
        for node in (a, b):
            node.subscribe(50, lambda ctx: got.append(ctx.data))
        await a.wait_subscribed(50, 2, 5)
        data = bytearray(b"x" * 300_000)
        for node in (a, b):
            a.notify(50, data, to=node.id)
        a.publish(50, data)
        data[:] = b"y" * 300_000
        data.clear()  # and no buffer is held any longer
        await until(lambda: len(got) == 4)
        assert set(got) == {b"x" * 300_000}


@pytest.mark.parametrize("data", ["text", None, 5, [b"x"], 1.5])
async def test_data_that_is_no_bytes(registry_url: str, data: Any) -> None:
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(50, echo)
        a.subscribe(51, echo)
        for verb in (
            lambda: a.notify(50, data),
            lambda: a.publish(50, data),
            lambda: a.publish(50, data, to=a.id),
            lambda: a.call(50, data, 51),
            lambda: a.request(50, data),
            lambda: a.ventilator([50], data),
        ):
            with pytest.raises(TypeError):
                verb()
        assert await a.request(51, b"fine") == b"fine"


async def test_a_memoryview_with_gaps_is_refused(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(50, echo)
        with pytest.raises(BufferError):
            a.notify(50, memoryview(bytes(100))[::2])


async def test_the_frame_limit(registry_url: str) -> None:
    limit = 100_000
    async with nodes(registry_url, "a", "b", frame_limit=limit) as (a, b):
        got: list[bytes] = []
        for node in (a, b):
            node.subscribe(50, lambda ctx: got.append(ctx.data))
        await a.wait_subscribed(50, 2, 5)
        ends = link(a, b)
        for node in (a, b):
            a.notify(50, bytes(limit - 8), to=node.id)
            for verb in (
                lambda node=node: a.notify(50, bytes(limit - 7), to=node.id),
                lambda node=node: a.publish(50, bytes(limit - 8), to=node.id),
                lambda node=node: a.call(50, bytes(limit - 8), 60, to=node.id),
                lambda node=node: a.request(50, bytes(limit - 8), to=node.id),
                lambda: a.publish(50, bytes(limit)),
            ):
                with pytest.raises(FrameError) as raised:
                    verb()
                assert (raised.value.limit, raised.value.channel) == (limit, 50)
        await until(lambda: len(got) == 2)
        a.notify(50, b"last", to=b.id)
        await until(lambda: len(got) == 3)
        assert link(a, b) == ends


async def test_a_frame_over_the_receivers_limit_ends_the_session_alone(registry_url: str) -> None:
    generous = Node("a", registry=registry_url)
    strict = Node("b", registry=registry_url, frame_limit=10_000)
    async with generous as a, strict as b:
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        with pytest.raises(PeerLost):
            await a.request(50, bytes(20_000))
        assert b.counters()["protocol_errors"] == 1
        await a.wait_subscribed(50, timeout=5)
        assert await a.request(50, b"again") == b"again"


async def test_many_subscriptions_fit_a_small_frame_limit(registry_url: str) -> None:
    """The library's own frames must not break the limit that a peer has set."""
    many = Node("a", registry=registry_url, frame_limit=4096, start_timeout=1)
    for channel in range(50, 4050):
        many.subscribe(channel, echo)
    async with many as a, Node("b", registry=registry_url, frame_limit=4096) as b:
        await b.wait_peers(1, 3)
        assert b.subscribers(4049) == [a.id]
        assert await b.request(4049, b"x") == b"x"


async def test_the_queue_limit_and_drained(registry_url: str) -> None:
    limit = 256 << 10
    async with nodes(registry_url, "a", queue_limit=limit) as (a,):
        raw = await RawPeer.plain(a, 700)
        try:
            assert a.drained(700).done()
            sent = 0

            async def fill() -> None:
                nonlocal sent
                while True:
                    a.notify(50, sent.to_bytes(4, "big") + bytes(9996), to=700)
                    sent += 1
                    await asyncio.sleep(0)

            with pytest.raises(Overloaded) as raised:
                await fill()
            assert (raised.value.peer, raised.value.channel) == (700, 50)
            assert raised.value.limit == limit
            assert limit <= a.peers[700].queued < limit + 10_008
            room = a.drained(700)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(room), 0.05)
            got = [(await raw.frame_on(50)).data[:4] for _ in range(sent)]
            assert got == [number.to_bytes(4, "big") for number in range(sent)]
            await asyncio.wait_for(room, 5)
            assert a.peers[700].queued <= limit // 4
            a.notify(50, b"again", to=700)
            assert (await raw.frame_on(50)).data == b"again"
            assert a.counters()["refused_queue_full"] == 1
        finally:
            raw.close()


async def test_drained_when_the_peer_goes(registry_url: str) -> None:
    async with nodes(registry_url, "a", queue_limit=64 << 10) as (a,):
        raw = await RawPeer.plain(a, 700, receive_buffer=4096)
        with contextlib.suppress(Overloaded):
            while True:
                a.notify(50, bytes(60_000), to=700)
                await asyncio.sleep(0)
        room = a.drained(700)
        raw.reset()
        with pytest.raises(PeerLost) as raised:
            await asyncio.wait_for(room, 5)
        assert raised.value.peer == 700
        with pytest.raises(PeerLost):
            await a.drained(700)


async def test_drained_for_oneself(registry_url: str) -> None:
    async with nodes(registry_url, "a", queue_limit=64 << 10) as (a,):
        got: list[int] = []
        a.subscribe(50, lambda ctx: got.append(1))
        sent = 0

        def fill() -> None:
            nonlocal sent
            while True:
                a.notify(50, bytes(1000))
                sent += 1

        for _ in range(5):
            with pytest.raises(Overloaded):
                fill()
            await asyncio.wait_for(a.drained(a.id), 5)
        await until(lambda: len(got) == sent)


async def test_close_gives_up_on_a_peer_that_does_not_read(registry_url: str) -> None:
    """And nobody hears of a future that no one has waited for."""
    async with nodes(registry_url, "a", drain_timeout=0.1) as (a,):
        raw = await RawPeer.plain(a, 700, receive_buffer=4096)
        try:
            while a.peers[700].queued < MIB:
                a.notify(50, bytes(60_000), to=700)
                await asyncio.sleep(0)
            begun = time.monotonic()
            await a.close()
            assert 0.05 < time.monotonic() - begun < 2
            gc.collect()
            await asyncio.sleep(0)
        finally:
            raw.close()


async def test_close_sends_what_is_queued(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        got: list[int] = []
        b.subscribe(50, lambda ctx: got.append(len(ctx.data)))
        await a.wait_subscribed(50, timeout=5)
        for _ in range(12):
            a.notify(50, bytes(MIB))
        await a.close()
        await b.wait_peers(0, 5)
        assert got == [MIB] * 12


async def test_publish_takes_what_notify_takes(registry_url: str) -> None:
    """Also when nobody subscribes, and it would not be sent."""
    async with nodes(registry_url, "a") as (a,):
        for handler in (None, print):
            if handler is not None:
                a.subscribe(60, handler)
            for data, error in ((memoryview(b"gapped")[::2], BufferError), ("text", TypeError)):
                for verb in (a.notify, a.publish):
                    if handler is None and verb == a.notify:
                        continue
                    with pytest.raises(error):
                        verb(60, data)  # type: ignore[arg-type]
            assert a.publish(60, array.array("H", [1, 2])) == (0 if handler is None else 1)


# ---------------------------------------------------------------------------------------- the codec


@pytest.mark.parametrize("vector", STREAMS, ids=lambda vector: vector.name)
def test_a_vector_cut_anywhere_is_read_alike(vector: Vector) -> None:
    """Byte by byte, and split at every boundary: the core and the reference agree."""
    magic = vector.kind in ("hello", "fault_magic")
    whole = read_oracle([vector.raw], magic=magic)
    for pieces in (
        single_bytes(vector.raw),
        *([vector.raw[:place], vector.raw[place:]] for place in range(len(vector.raw) + 1)),
    ):
        found = read_core(pieces, magic=magic)
        assert found == read_oracle(pieces, magic=magic)
        assert found.fault == whole.fault
        # Of one piece that ends in a fault, the frames before it are not returned.
        assert found == whole or found.fault is not None


# ----------------------------------------------------------------------------------------- delivery


async def test_nothing_arrives_twice_or_out_of_order_when_sessions_are_cut(
    registry_url: str,
) -> None:
    """What is lost with a session is not sent again, and the next one does not overtake it."""
    async with nodes(registry_url, "a", "b") as (a, b):
        got: list[int] = []
        b.subscribe(50, lambda ctx: got.append(int.from_bytes(ctx.data[:4], "big")))
        b.subscribe(51, echo)
        sent = 0
        for cut in range(25):
            await a.wait_subscribed(51, timeout=10)
            for _ in range(200):
                with suppress(DomiError):
                    a.notify(50, sent.to_bytes(4, "big") + bytes(sent % 7 * 3000), to=b.id)
                sent += 1
            # From either end, orderly or not, with much of it still on its way.
            mine, theirs = session(a, b.id), session(b, a.id)
            end = (mine, theirs)[cut % 2]
            if cut % 3 == 0:
                end.close("for the test")
            else:
                sock = socket.socket(fileno=os.dup(end.descriptor))
                sock.shutdown((socket.SHUT_RDWR, socket.SHUT_WR)[cut % 3 - 1])
                sock.close()
            await until(lambda mine=mine: mine.closed)
        await a.wait_subscribed(51, timeout=10)
        assert await a.request(51, b"last") == b"last"
        assert got
        assert len(got) < sent, "nothing was lost, so nothing was shown"
        assert got == sorted(set(got))


async def test_a_lost_node_is_out_of_every_table_when_its_requests_end(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c") as (a, b, c):
        kept: list[Context] = []
        b.subscribe(50, kept.append)
        c.subscribe(50, echo)
        b.subscribe(51, kept.append)
        await a.wait_subscribed(50, 2, 5)
        await a.wait_subscribed(51, timeout=5)
        found: list[tuple[Any, ...]] = []

        def ended(request: Any) -> None:
            with pytest.raises(PeerLost):
                a.notify(50, b"", to=lost)
            with pytest.raises(NoSubscriber):
                a.notify(51, b"")
            found.append((type(request.exception()), a.subscribers(50), list(a.peers)))

        lost = b.id
        request = a.request(50, b"", None, to=lost)
        request.add_done_callback(ended)
        await until(lambda: kept)
        session(b, a.id).close("for the test")
        await until(lambda: found)
        assert found == [(PeerLost, [c.id], [c.id])]
        # Round robin goes on with those that are left.
        assert await asyncio.gather(*(a.request(50, b"%d" % n) for n in range(4))) == [
            b"%d" % n for n in range(4)
        ]
