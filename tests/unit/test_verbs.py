"""The verbs that send, clause by clause: who gets a message, and how sending can fail."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from domi_fast import (
    AlreadyReplied,
    Context,
    DomiError,
    FrameError,
    Node,
    NoSubscriber,
    Overloaded,
    PeerLost,
)
from tests.support import RawPeer, echo, forget_records, nodes, session, until

MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


# ------------------------------------------------------------------------------------------- notify


async def test_notify_reaches_one_subscriber(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c") as (a, b, c):
        got: list[tuple[int, Context]] = []
        b.subscribe(50, lambda ctx: got.append((b.id, ctx)))
        c.subscribe(50, lambda ctx: got.append((c.id, ctx)))
        await a.wait_subscribed(50, 2, 5)
        assert a.notify(50, b"hello") is None
        await until(lambda: got)
        # A second one goes to the other, so that both have certainly seen all there is.
        a.notify(50, b"again")
        await until(lambda: len(got) == 2)
        assert [ctx.data for _, ctx in got] == [b"hello", b"again"]
        assert {machine for machine, _ in got} == {b.id, c.id}
        ctx = got[0][1]
        assert (ctx.channel, ctx.sender, ctx.deadline, ctx.is_request) == (50, a.id, None, False)
        assert type(ctx.data) is bytes


async def test_without_a_subscriber_the_verbs_say_so(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, _):
        for verb in (
            lambda: a.notify(70, b""),
            lambda: a.call(70, b"", 71),
            lambda: a.request(70, b""),
            lambda: a.ventilator([70], b""),
        ):
            with pytest.raises(NoSubscriber) as refused:
                verb()
            assert refused.value.channel == 70
        assert a.counters()["in_flight"] == 0


# ------------------------------------------------------------------------------------------ publish


async def test_publish_reaches_every_subscriber_exactly_once(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c", "d") as (a, b, c, d):
        got: Counter[tuple[int, bytes]] = Counter()
        for node in (a, b, c):
            node.subscribe(50, lambda ctx, me=node.id: got.update([(me, ctx.data)]))
        d.subscribe(51, lambda ctx: got.update([(d.id, ctx.data)]))
        await a.wait_subscribed(50, 3, 5)
        for number in range(100):
            assert a.publish(50, b"%d" % number) == 3
        await until(lambda: got.total() == 300)
        for node in (b, c):
            # What came after the publishes shows that nothing more was under way.
            assert a.publish(50, b"last", to=node.id) == 1
        await until(lambda: got.total() == 302)
        assert got == Counter(
            [(n.id, b"%d" % i) for n in (a, b, c) for i in range(100)]
            + [(b.id, b"last"), (c.id, b"last")]
        )


async def test_publish_to_nobody_counts_nobody(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, _):
        assert a.publish(50, b"") == 0


async def test_publish_goes_on_when_one_subscriber_is_full(registry_url: str) -> None:
    errors: list[tuple[DomiError, Any]] = []
    async with nodes(registry_url, "a", "b", queue_limit=64 << 10) as (a, b):
        a.on_error = lambda error, frame: errors.append((error, frame))
        got: list[bytes] = []
        a.subscribe(50, lambda ctx: None)
        b.subscribe(50, lambda ctx: got.append(ctx.data))
        await a.wait_subscribed(50, 2, 5)
        # The node's own queue is emptied only when the loop turns.
        with contextlib.suppress(Overloaded):
            while True:
                a.notify(50, bytes(4096), to=a.id)
        assert a.publish(50, b"news") == 1
        await until(lambda: got)
        assert got == [b"news"]
        assert len(errors) == 1
        error, frame = errors[0]
        assert isinstance(error, Overloaded)
        assert (error.peer, error.channel) == (a.id, 50)
        assert (frame.channel, frame.data) == (50, b"news")


# --------------------------------------------------------------------------------------------- call


async def test_call_is_answered_on_the_reply_channel(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        replies: list[tuple[bytes, int]] = []
        for node in (a, b):
            node.subscribe(50, lambda ctx, me=node.id: ctx.reply(b"%d to " % me + ctx.data))
        a.subscribe(60, lambda ctx: replies.append((ctx.data, ctx.sender)))
        await a.wait_subscribed(50, 2, 5)
        for node in (a, b):
            assert a.call(50, b"x", 60, to=node.id) is None
        await until(lambda: len(replies) == 2)
        assert sorted(replies) == sorted((b"%d to x" % n.id, n.id) for n in (a, b))


async def test_a_call_may_be_answered_where_nobody_subscribes(registry_url: str) -> None:
    """The reply of a call whose asker has no handler is refused, and nobody is hurt."""
    async with nodes(registry_url, "a", "b") as (a, b):
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        a.call(50, b"x", 60)
        await until(lambda: a.counters().get("dropped_no_subscriber"))
        assert await a.request(50, b"y") == b"y"


# ---------------------------------------------------------------------------------------- pipelines


async def test_a_pipeline_across_nodes(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c") as (a, b, c):
        results: list[tuple[bytes, int]] = []
        b.subscribe(60, lambda ctx: ctx.next(ctx.data + b" b"))
        c.subscribe(61, lambda ctx: ctx.next(ctx.data + b" c"))

        async def later(ctx: Context) -> None:
            await asyncio.sleep(0)
            ctx.next(ctx.data + b" a")

        a.subscribe(62, later)
        c.subscribe(63, lambda ctx: results.append((ctx.data, ctx.sender)))
        for node in (a, b, c):
            for channel in range(60, 64):
                await node.wait_subscribed(channel, timeout=5)
        assert a.ventilator([60, 61, 62, 63], b"start") is None
        await until(lambda: results)
        assert results == [(b"start b c a", a.id)]
        b.ventilator((63,), b"one stage")
        await until(lambda: len(results) == 2)
        assert results[1] == (b"one stage", b.id)


async def test_a_pipeline_may_visit_a_stage_again(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        result: list[bytes] = []
        b.subscribe(60, lambda ctx: ctx.next(b"%d" % (int(ctx.data) + 1)))
        a.subscribe(61, lambda ctx: result.append(ctx.data))
        await a.wait_subscribed(60, timeout=5)
        await b.wait_subscribed(61, timeout=5)
        a.ventilator([60] * 500 + [61], b"0")
        await until(lambda: result)
        assert result == [b"500"]


async def test_what_is_not_a_pipeline(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(60, echo)
        with pytest.raises(ValueError, match="at least one"):
            a.ventilator([], b"")
        with pytest.raises(ValueError, match="16384"):
            a.ventilator([60] * 16385, b"")
        with pytest.raises(TypeError):
            a.ventilator(60, b"")


async def test_next_without_a_subscriber_tells_the_stage(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        told: list[NoSubscriber] = []

        def stage(ctx: Context) -> None:
            try:
                ctx.next(ctx.data)
            except NoSubscriber as error:
                told.append(error)

        b.subscribe(60, stage)
        await a.wait_subscribed(60, timeout=5)
        a.ventilator([60, 61], b"x")
        await until(lambda: told)
        assert told[0].channel == 61


async def test_a_stage_that_went_meanwhile_is_told_to_who_called_next(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c") as (a, b, c):
        told: dict[str, list[tuple[DomiError, Any]]] = {"a": [], "b": []}
        a.on_error = lambda error, frame: told["a"].append((error, frame))
        b.on_error = lambda error, frame: told["b"].append((error, frame))

        def stage(ctx: Context) -> None:
            c.unsubscribe(61)
            ctx.next(ctx.data)

        b.subscribe(60, stage)
        c.subscribe(61, echo)
        await a.wait_subscribed(60, timeout=5)
        await b.wait_subscribed(61, timeout=5)
        a.ventilator([60, 61, 62], b"x")
        await until(lambda: told["b"])
        error, frame = told["b"][0]
        assert isinstance(error, NoSubscriber)
        assert (error.channel, error.peer) == (61, c.id)
        assert (frame.channel, frame.data) == (61, b"x")
        assert not told["a"]


async def test_next_where_there_is_none(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        b.subscribe(60, kept.append)
        await a.wait_subscribed(60, timeout=5)
        a.ventilator([60], b"last stage")
        a.notify(60, b"notify")
        a.request(60, b"request").cancel()
        await until(lambda: len(kept) == 3)
        with pytest.raises(DomiError, match="last stage"):
            kept[0].next(b"")
        with pytest.raises(DomiError):
            kept[1].next(b"")
        with pytest.raises(FrameError):
            kept[2].next(b"")


async def test_next_twice(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        kept: list[Context] = []
        result: list[bytes] = []
        a.subscribe(60, kept.append)
        a.subscribe(61, lambda ctx: result.append(ctx.data))
        a.ventilator([60, 61], b"")
        await until(lambda: kept)
        kept[0].next(b"once")
        with pytest.raises(AlreadyReplied):
            kept[0].next(b"twice")
        await until(lambda: result)
        assert result == [b"once"]


async def test_a_pipeline_cannot_be_replied_to(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        kept: list[Context] = []
        a.subscribe(60, kept.append)
        a.ventilator([60, 61], b"")
        await until(lambda: kept)
        with pytest.raises(DomiError):
            kept[0].reply(b"")
        with pytest.raises(DomiError):
            kept[0].error("no")


# --------------------------------------------------------------------------------------- addressing


async def test_to_names_the_receiver(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c") as (a, b, c):
        got: list[tuple[int, bytes]] = []
        for node in (a, b, c):
            node.subscribe(50, lambda ctx, me=node.id: got.append((me, ctx.data)))
            node.subscribe(51, lambda ctx, me=node.id: ctx.reply(b"%d" % me))
        a.subscribe(52, lambda ctx: got.append((-1, ctx.data)))
        await a.wait_subscribed(51, 3, 5)
        for node in (c, a, b, b):
            a.notify(50, b"notify", to=node.id)
            a.publish(50, b"publish", to=node.id)
            a.call(51, b"", 52, to=node.id)
            assert await a.request(51, b"", to=node.id) == b"%d" % node.id
        await until(lambda: len(got) == 12)
        assert Counter(got) == Counter(
            entry
            for node in (c, a, b, b)
            for entry in (
                (node.id, b"notify"),
                (node.id, b"publish"),
                (-1, b"%d" % node.id),
            )
        )


@pytest.mark.parametrize("machine", [1000, 1023, 1024, 65535, -1, 2**31 - 1])
async def test_to_a_node_that_is_not_there(registry_url: str, machine: int) -> None:
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(50, echo)
        for verb in (
            lambda: a.notify(50, b"", to=machine),
            lambda: a.publish(50, b"", to=machine),
            lambda: a.call(50, b"", 60, to=machine),
            lambda: a.request(50, b"", to=machine),
            lambda: a.drained(machine),
        ):
            with pytest.raises(PeerLost) as raised:
                verb()
            assert raised.value.peer == machine


async def test_to_a_node_that_does_not_subscribe(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        a.subscribe(50, echo)
        b.subscribe(51, echo)
        await a.wait_subscribed(51, timeout=5)
        for node, channel in ((b, 50), (a, 51)):
            for verb in (
                lambda node=node, channel=channel: a.notify(channel, b"", to=node.id),
                lambda node=node, channel=channel: a.publish(channel, b"", to=node.id),
                lambda node=node, channel=channel: a.call(channel, b"", 60, to=node.id),
                lambda node=node, channel=channel: a.request(channel, b"", to=node.id),
            ):
                with pytest.raises(NoSubscriber) as raised:
                    verb()
                assert (raised.value.channel, raised.value.peer) == (channel, node.id)


async def test_round_robin_includes_the_nodes_own_subscription(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c") as (a, b, c):
        got: list[int] = []
        for node in (a, b, c):
            node.subscribe(50, lambda ctx, me=node.id: ctx.reply(b"%d" % me))
            node.subscribe(51, lambda ctx, me=node.id: got.append(me))
        await a.wait_subscribed(50, 3, 5)
        await a.wait_subscribed(51, 3, 5)
        answers = [int(await a.request(50, b"")) for _ in range(9)]
        assert set(answers[:3]) == {a.id, b.id, c.id}
        assert answers == answers[:3] * 3
        for _ in range(9):
            a.notify(51, b"")
        await until(lambda: len(got) == 9)
        assert Counter(got) == {a.id: 3, b.id: 3, c.id: 3}
        # One leaves: the rest still take turns.
        b.unsubscribe(50)
        await until(lambda: len(a.subscribers(50)) == 2)
        answers = [int(await a.request(50, b"")) for _ in range(6)]
        assert answers == answers[:2] * 3
        assert set(answers) == {a.id, c.id}


@pytest.mark.parametrize("machine", [0.9, True, False, "1", b"\1", [1]])
async def test_a_machine_id_that_is_no_int(registry_url: str, machine: Any) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        b.subscribe(60, echo)
        await a.wait_subscribed(60, timeout=5)
        for verb in (
            lambda: a.notify(60, b"", to=machine),
            lambda: a.publish(60, b"", to=machine),
            lambda: a.call(60, b"", 61, to=machine),
            lambda: a.request(60, b"", to=machine),
            lambda: a.drained(machine),
        ):
            with pytest.raises(TypeError, match="an int of 0-1023 is wanted"):
                verb()


@pytest.mark.parametrize("machine", [-1, 900, 1023, 1024, 2**31, 2**32, 2**64, -(2**70)])
async def test_a_machine_id_that_no_node_has(registry_url: str, machine: int) -> None:
    async with nodes(registry_url, "a") as (a,):
        for verb in (lambda: a.notify(60, b"", to=machine), lambda: a.drained(machine)):
            with pytest.raises(PeerLost) as caught:
                verb()
            assert caught.value.peer == machine
        with pytest.raises(ValueError, match="channel"):
            a.subscribers(machine if machine < 0 else machine + 2**16)


# ----------------------------------------------------------------------------------------- on_error


async def test_on_error_hears_what_was_refused_later(registry_url: str) -> None:
    told: list[tuple[DomiError, Any]] = []
    async with nodes(registry_url, "a", "b") as (a, b):
        a.on_error = lambda error, frame: told.append((error, frame))
        assert callable(a.on_error)
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        b.unsubscribe(50)
        a.notify(50, b"a notify")
        a.call(50, b"a call", 60)
        a.ventilator([50, 51], b"a pipeline")
        await until(lambda: len(told) == 3)
        assert [frame.data for _, frame in told] == [b"a notify", b"a call", b"a pipeline"]
        for error, frame in told:
            assert isinstance(error, NoSubscriber)
            assert (error.channel, error.peer, frame.channel) == (50, b.id, 50)


async def test_a_refused_publish_is_nobodys_in_particular(registry_url: str) -> None:
    told: list[Any] = []
    async with nodes(registry_url, "a", "b") as (a, b):
        a.on_error = lambda error, frame: told.append(frame)
        b.subscribe(50, echo)
        b.subscribe(51, echo)
        await a.wait_subscribed(51, timeout=5)
        b.unsubscribe(50)
        assert a.publish(50, b"") == 1
        assert await a.request(51, b"after") == b"after"
        assert not told
        assert b.counters()["dropped_no_subscriber"] == 1


async def test_on_error_hears_of_frames_that_a_lost_peer_never_got(registry_url: str) -> None:
    told: list[tuple[DomiError, Any]] = []
    async with nodes(registry_url, "a") as (a,):
        a.on_error = lambda error, frame: told.append((error, frame))
        raw = await RawPeer.plain(a, 700, receive_buffer=4096)
        sent = 0
        while a.peers[700].queued < MIB:
            a.notify(50, sent.to_bytes(4, "big") + bytes(65532), to=700)
            sent += 1
            await asyncio.sleep(0)
        raw.reset()
        await a.wait_peers(0, 5)
        assert told
        numbers = [int.from_bytes(frame.data[:4], "big") for _, frame in told]
        # The newest ones, all of them, in order; each with what is needed to send it again.
        assert numbers == list(range(sent - len(told), sent))
        for error, frame in told:
            assert isinstance(error, PeerLost)
            assert (error.peer, error.channel, frame.channel) == (700, 50, 50)
            assert len(frame.data) == 65536


async def test_requests_that_a_lost_peer_never_got_are_told_once(registry_url: str) -> None:
    """Their awaiter hears of it; on_error does not hear it as well."""
    told: list[Any] = []
    async with nodes(registry_url, "a", "b") as (a, b):
        a.on_error = lambda error, frame: told.append(frame)
        b.subscribe(50, [].append)
        await a.wait_subscribed(50, timeout=5)
        requests = [a.request(50, bytes(MIB), None) for _ in range(12)]
        session(a, b.id).close("for the test")
        outcomes = await asyncio.gather(*requests, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {PeerLost}
        assert not told


async def test_on_error_that_raises_is_logged(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):

        def broken(error: DomiError, frame: Any) -> None:
            raise RuntimeError("broken")

        a.on_error = broken
        b.subscribe(50, echo)
        b.subscribe(51, echo)
        await a.wait_subscribed(51, timeout=5)
        b.unsubscribe(50)
        a.notify(50, b"")
        assert await a.request(51, b"x") == b"x"
        assert "on_error failed" in caplog.text
        a.on_error = None
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        b.unsubscribe(50)
        a.notify(50, b"seven b")
        assert await a.request(51, b"x") == b"x"
        assert re.search(r"lost: .*channel 50.*7 bytes", caplog.text)


def test_on_error_is_callable_or_none(registry_url: str) -> None:
    with pytest.raises(TypeError, match="callable"):
        Node("a", registry=registry_url, on_error=5)
    node = Node("a", registry=registry_url, on_error=print)
    assert node.on_error is print
    with pytest.raises(TypeError, match="callable"):
        node.on_error = "loud"
    node.on_error = None
    assert node.on_error is None
