"""Pausing, resuming and draining a node, and rolling to a newer version: no work is lost."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from domi_fast import (
    Context,
    DomiError,
    Master,
    Node,
    NoSubscriber,
    PeerLost,
    RemoteError,
    Serial,
    VersionTooOld,
    connect,
)
from tests.support import (
    Worker,
    echo,
    forget_records,
    nodes,
    session,
    slowness,
    until,
    workers,
)

WORK, OTHER = 50, 51


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Any:
    yield
    forget_records(caplog)


class Load:
    """Requests that are under way all the time, and what became of each."""

    def __init__(self, node: Node, concurrency: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self._request = node.request
        self._over = False
        self._askers = [asyncio.ensure_future(self._ask()) for _ in range(concurrency)]

    async def _ask(self) -> None:
        number = 0
        while not self._over:
            number += 1
            data = b"%d" % number
            try:
                right = await self._request(WORK, data, timeout=20.0) == data
            except Exception as error:
                self.outcomes[f"{type(error).__name__}: {error}"] += 1
                await asyncio.sleep(0)
            else:
                self.outcomes["answer" if right else "wrong"] += 1

    async def more(self, count: int) -> None:
        """Wait for so many further answers."""
        before = self.outcomes["answer"]
        await until(lambda: self.outcomes["answer"] >= before + count, 20)

    async def end(self) -> None:
        self._over = True
        await asyncio.gather(*self._askers)


@asynccontextmanager
async def load(node: Node, concurrency: int = 16) -> AsyncIterator[Load]:
    running = Load(node, concurrency)
    try:
        yield running
    finally:
        await running.end()


async def slow_echo(ctx: Context) -> None:
    await asyncio.sleep(0.002)
    ctx.reply(ctx.data)


def serve(node: Node) -> Node:
    """Handlers of the three kinds by turns: at once, in a task, and after they have returned."""
    loop = asyncio.get_running_loop()
    turn = 0

    def handler(ctx: Context) -> Any:
        nonlocal turn
        turn += 1
        if turn % 3 == 0:
            return slow_echo(ctx)
        if turn % 3 == 1:
            loop.call_later(0.002, ctx.reply, ctx.data)
        else:
            ctx.reply(ctx.data)
        return None

    node.subscribe(WORK, handler)
    return node


# ------------------------------------------------------------------------------- pause and resume


async def test_a_paused_node_gets_no_new_work(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c") as (a, b, c):
        for node in (b, c):
            node.subscribe(WORK, lambda ctx, node=node: ctx.reply(b"%d" % node.id))
        await a.wait_subscribed(WORK, 2, timeout=5)
        await b.pause()
        assert b.state == "paused"
        assert a.peers[b.id].state == c.peers[b.id].state == "paused"
        assert a.peers[c.id].state == "serving"
        assert WORK in a.peers[b.id].channels
        answers = {await a.request(WORK, b"") for _ in range(10)}
        assert answers == {b"%d" % c.id}
        assert a.subscribers(WORK) == [c.id]
        assert a.publish(WORK, b"") == 1
        with pytest.raises(NoSubscriber, match=f"node {b.id} is paused") as caught:
            a.notify(WORK, b"", to=b.id)
        assert (caught.value.channel, caught.value.peer) == (WORK, b.id)
        await b.resume()
        assert b.state == a.peers[b.id].state == "serving"
        assert {await a.request(WORK, b"") for _ in range(10)} == {b"%d" % b.id, b"%d" % c.id}


async def test_a_paused_node_keeps_its_place_in_the_mesh(registry_url: str) -> None:
    """It sends and is answered, finishes what it has, and tells who comes later."""
    async with nodes(registry_url, "a", "b") as (a, b):
        held: list[Context] = []
        a.subscribe(OTHER, echo)
        b.subscribe(WORK, held.append)
        await b.wait_subscribed(OTHER, timeout=5)
        await a.wait_subscribed(WORK, timeout=5)
        taken = a.request(WORK, b"")
        await until(lambda: held)
        await b.pause()
        assert await b.request(OTHER, b"x") == b"x"
        held[0].reply(b"done")
        assert await taken == b"done"
        async with Node("late", registry=registry_url) as late:
            await late.wait_peers(2, 5)
            await until(lambda: WORK in late.peers[b.id].channels)
            assert late.peers[b.id].state == "paused"
            with pytest.raises(NoSubscriber, match=f"paused or drains: nodes \\[{b.id}\\]"):
                late.notify(WORK, b"")
            b.subscribe(OTHER + 1, echo)
            await b.resume()
            assert set(late.subscribers(WORK) + late.subscribers(OTHER + 1)) == {b.id}


async def test_nothing_new_arrives_once_pause_has_returned(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c") as (a, b, c):
        arrived = 0

        def count(ctx: Context) -> None:
            nonlocal arrived
            arrived += 1
            ctx.reply(ctx.data)

        b.subscribe(WORK, count)
        c.subscribe(WORK, echo)
        await a.wait_subscribed(WORK, 2, timeout=5)
        async with load(a) as running:
            for _ in range(10):
                await running.more(50)
                await b.pause()
                before = arrived
                await running.more(50)
                assert arrived == before
                await b.resume()
        assert arrived > 0
        assert set(running.outcomes) == {"answer"}


async def test_pause_and_resume_under_load_lose_nothing(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c", "d") as (a, *servers):
        for node in servers:
            serve(node)
        await a.wait_subscribed(WORK, 3, timeout=5)
        async with load(a, 64) as running:
            for turn in range(200):
                node = servers[turn % 3]
                await node.pause()
                await running.more(20)
                await node.resume()
        assert set(running.outcomes) == {"answer"}


async def test_what_a_paused_node_sends_goes_to_itself_only_if_nobody_else_has_it(
    registry_url: str,
) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        a.subscribe(WORK, lambda ctx: ctx.reply(b"a"))
        b.subscribe(WORK, lambda ctx: ctx.reply(b"b"))
        b.subscribe(OTHER, lambda ctx: ctx.reply(b"b"))
        await b.wait_subscribed(WORK, 2, timeout=5)
        await b.pause()
        assert [await b.request(WORK, b"") for _ in range(4)] == [b"a"] * 4
        assert await b.request(OTHER, b"") == b"b"


async def test_guests_of_a_paused_node(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        b.subscribe(WORK, echo)
        b.subscribe(OTHER, echo)
        a.subscribe(OTHER, lambda ctx: ctx.reply(b"a"))
        await b.wait_subscribed(OTHER, 2, timeout=5)
        async with await connect(f"tcp://127.0.0.1:{b.port}") as guest:
            assert await guest.request(WORK, b"x") == b"x"
            await b.pause()
            assert [await guest.request(OTHER, b"") for _ in range(3)] == [b"a"] * 3
            with pytest.raises(NoSubscriber):
                await guest.request(WORK, b"x")
            await b.resume()
            assert await guest.request(WORK, b"x") == b"x"


async def test_what_cannot_be_paused(registry_url: str) -> None:
    node = Node("a", registry=registry_url)
    assert node.state == "new"
    for verb in (node.pause, node.resume, node.drain):
        with pytest.raises(DomiError, match="this node is new"):
            await verb()
    async with node:
        await node.pause()
        await node.pause()
        assert node.state == "paused"
        await node.resume()
        await node.resume()
        wrong: tuple[Any, ...] = (float("nan"), -1, True, "3", None)
        for deadline in wrong:
            text = f"^deadline {deadline!r}: seconds, 0 or more, are wanted$"
            with pytest.raises(ValueError, match=text):
                await node.drain(deadline)
        assert node.state == "serving"
    assert node.state == "closed"
    with pytest.raises(DomiError, match="this node is closed"):
        await node.pause()


# ------------------------------------------------------------------------------------------ drain


async def test_drain_finishes_what_was_taken(registry_url: str) -> None:
    """Tasks, answers that come later from a thread, and what a consumer has yet to take."""
    async with nodes(registry_url, "a", "b") as (a, b):
        go_on = asyncio.Event()
        kept: list[Context] = []
        consumed: list[bytes] = []

        async def in_a_task(ctx: Context) -> None:
            await go_on.wait()
            ctx.reply(b"task")

        async def consume() -> None:
            async with b.watch_channel(52) as messages:
                await go_on.wait()
                async for ctx in messages:
                    consumed.append(ctx.data)  # noqa: PERF401 - each as it comes

        b.subscribe(50, in_a_task)
        b.subscribe(51, kept.append)
        consumer = asyncio.ensure_future(consume())
        await a.wait_subscribed(52, timeout=5)
        task, later = a.request(50, b""), a.request(51, b"")
        for number in range(3):
            a.notify(52, b"%d" % number)
        await until(lambda: kept)
        drained = asyncio.ensure_future(b.drain(10.0))
        await until(lambda: b.id in a.peers and a.peers[b.id].state == "draining")
        assert b.state == "draining"
        with pytest.raises(NoSubscriber, match="paused or drains"):
            a.notify(50, b"")
        with pytest.raises(DomiError, match="this node is draining"):
            await b.resume()
        assert not drained.done()
        go_on.set()
        assert await task == b"task"
        await until(lambda: len(consumed) == 3)
        assert not drained.done()
        answerer = threading.Thread(target=lambda: kept.pop().reply(b"thread"))
        answerer.start()
        assert await later == b"thread"
        assert await drained is True
        answerer.join()
        assert b.state == "closed"
        await asyncio.wait_for(b.wait_closed(), 1)
        await a.wait_peers(0, 5)
        await consumer


@pytest.mark.parametrize("thread", [False, True])
async def test_drain_finishes_what_waits_in_serial_mode(registry_url: str, thread: bool) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        ran: list[bytes] = []

        def slow(ctx: Context) -> None:
            time.sleep(0.002)
            ran.append(ctx.data)
            if ctx.is_request:
                ctx.reply(ctx.data)

        async with Serial(b, thread=thread, drain_budget=0.001) as serial:
            serial.subscribe(WORK, slow)
            await a.wait_subscribed(WORK, timeout=5)
            a.notify_many(WORK, [b"%d" % number for number in range(50)])
            last = a.request(WORK, b"last")
            await until(lambda: ran)
            assert await b.drain(10.0) is True
            assert await last == b"last"
            assert ran == [*[b"%d" % number for number in range(50)], b"last"]


async def test_drain_finishes_the_requests_of_guests(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        a.subscribe(WORK, kept.append)
        await b.wait_subscribed(WORK, timeout=5)
        async with await connect(f"tcp://127.0.0.1:{b.port}") as guest:
            asked = guest.request(WORK, b"")
            await until(lambda: kept)
            drained = asyncio.ensure_future(b.drain(10.0))
            await until(lambda: a.peers[b.id].state == "draining")
            kept.pop().reply(b"answer")
            assert await asked == b"answer"
            assert await drained is True


async def test_drain_waits_for_what_the_node_itself_has_asked(registry_url: str) -> None:
    """A task of the program awaits the answer; a guest's request beside it is counted once."""
    async with nodes(registry_url, "a", "b") as (a, b):

        async def work(ctx: Context) -> None:
            await asyncio.sleep(0.5)
            ctx.reply(ctx.data + b" is done")

        a.subscribe(WORK, work)
        await b.wait_subscribed(WORK, timeout=5)
        ended: list[str] = []

        async def program() -> None:
            assert await b.request(WORK, b"order", timeout=None) == b"order is done"
            ended.append("program")

        async with await connect(f"tcp://127.0.0.1:{b.port}") as guest:
            task = asyncio.ensure_future(program())
            asked = guest.request(WORK, b"guest")
            await until(lambda: b.counters()["in_flight"] == 2)
            assert b._router.unfinished() == 2
            assert await b.drain(30.0) is True
            ended.append("drain")
            assert await asked == b"guest is done"
            await task
        assert ended == ["program", "drain"]


async def test_the_deadline_of_drain_bounds_requests_without_one(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        a.subscribe(WORK, kept.append)
        await b.wait_subscribed(WORK, timeout=5)
        asked = b.request(WORK, b"", timeout=None)
        await until(lambda: kept)
        began = time.monotonic()
        assert await b.drain(0.2) is False
        assert 0.2 <= time.monotonic() - began < 5.0
        with pytest.raises(PeerLost):
            await asked
        kept.clear()


@pytest.fixture(params=["asyncio", "uvloop"])
def third(request: pytest.FixtureRequest) -> Iterator[Worker]:
    with workers(request.param) as [process]:
        yield process


async def test_a_peer_that_hangs_holds_up_neither_pause_nor_drain(
    third: Worker, sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"heartbeat_interval": 30.0, "heartbeat_timeout": 60.0, "lease_ttl": 60.0}
    async with nodes(sqlite_url, "a", "b", **settings) as (a, b):
        a.subscribe(OTHER + 9, echo)
        [hung] = await third.ask_later("start", registry=sqlite_url, **settings)
        for node in (a, b):
            await node.wait_peers(2, 5)
        await third.ask_later("wait_subscribed", channel=OTHER + 9, count=1)
        third.kill(signal.SIGSTOP)
        began = time.monotonic()
        await a.pause()
        assert 0.9 <= time.monotonic() - began < 2.5 * slowness()
        assert b.peers[a.id].state == "paused"
        assert (
            f"nothing comes of nodes [{hung}], which may not know that it is paused" in caplog.text
        )
        # An idle node has nothing left to do, with a deadline that is shorter than that, too.
        began = time.monotonic()
        assert await b.drain(1.0) is True
        assert time.monotonic() - began < 5.0 * slowness()
        # It hears of it when it goes on.
        third.kill(signal.SIGCONT)
        await until(lambda: not session(a, hung).unheard)
        await a.resume()
        assert await third.ask_later("request", machine=a.id, channel=OTHER + 9, text="x") == "x"


async def test_a_handler_that_runs_is_served_by_its_draining_node(registry_url: str) -> None:
    """Nobody else has the channel that it needs."""
    async with nodes(registry_url, "a", "b") as (a, b):
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def outer(ctx: Context) -> None:
            begun.set()
            await go_on.wait()
            ctx.reply(await b.request(OTHER, ctx.data))

        b.subscribe(WORK, outer)
        b.subscribe(OTHER, echo)
        await a.wait_subscribed(OTHER, timeout=5)
        asked = a.request(WORK, b"x")
        await begun.wait()
        drained = asyncio.ensure_future(b.drain(10.0))
        await until(lambda: a.peers[b.id].state == "draining")
        go_on.set()
        assert await asked == b"x"
        assert await drained is True


async def test_drain_ends_at_its_deadline(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        b.subscribe(WORK, kept.append)
        await a.wait_subscribed(WORK, timeout=5)
        asked = a.request(WORK, b"")
        await until(lambda: kept)
        began = time.monotonic()
        with caplog.at_level(logging.WARNING, "domi_fast"):
            assert await b.drain(0.2) is False
        assert 0.2 <= time.monotonic() - began < 5.0
        assert "not everything was finished within 0.2 s" in caplog.text
        with pytest.raises(PeerLost):
            await asked
        assert b.state == "closed"
        kept.clear()


async def test_a_handler_that_does_not_end_in_time_is_cancelled_and_says_so(
    registry_url: str,
) -> None:
    async with nodes(registry_url, "a", "b", drain_timeout=0.1) as (a, b):
        asked = asyncio.Event()

        @b.subscribe(WORK)
        async def hang(ctx: Context) -> None:
            asked.set()
            await asyncio.Event().wait()

        await a.wait_subscribed(WORK, timeout=5)
        request = a.request(WORK, b"")
        await asked.wait()
        assert await b.drain(0.1) is False
        with pytest.raises(RemoteError, match="CancelledError: the handler was cancelled"):
            await request


async def test_every_call_waits_for_the_one_draining(registry_url: str) -> None:
    """One that is cancelled does not stop it, and closing does."""
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Context] = []
        b.subscribe(WORK, kept.append)
        await a.wait_subscribed(WORK, timeout=5)
        asked = a.request(WORK, b"")
        await until(lambda: kept)
        first = asyncio.ensure_future(b.drain(30.0))
        second = asyncio.ensure_future(b.drain(30.0))
        await until(lambda: b.state == "draining")
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert b.state == "draining"
        await b.close()
        assert await second is False
        with pytest.raises(PeerLost):
            await asked
        kept.clear()


async def test_a_handler_may_drain_its_node(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        ends: list[bool] = []

        async def leave(ctx: Context) -> None:
            ctx.reply(b"bye")
            ends.append(await b.drain(10.0))

        b.subscribe(WORK, leave)
        await a.wait_subscribed(WORK, timeout=5)
        began = time.monotonic()
        assert await a.request(WORK, b"") == b"bye"
        await asyncio.wait_for(b.wait_closed(), 5)
        await until(lambda: ends)
        assert ends == [True]
        assert time.monotonic() - began < 5.0


async def test_rolling_restarts_under_load_lose_nothing(registry_url: str) -> None:
    async with nodes(registry_url, "client") as (client,):
        servers = [serve(Node(f"s{number}", registry=registry_url)) for number in range(3)]
        await asyncio.gather(*[server.start() for server in servers])
        await client.wait_subscribed(WORK, 3, timeout=5)
        async with load(client, 32) as running:
            for turn in range(100):
                assert await servers[turn % 3].drain(20.0) is True
                servers[turn % 3] = serve(Node(f"s{turn % 3}", registry=registry_url))
                await servers[turn % 3].start()
                await running.more(20)
        assert set(running.outcomes) == {"answer"}
        await asyncio.gather(*[server.close() for server in servers])


async def test_a_master_ends_when_its_nodes_have_left(registry_url: str) -> None:
    master = Master()
    one = master.add(Node("one", registry=registry_url))
    two = master.add(Node("two", registry=registry_url))
    serial = master.add(Serial(two))
    waiting = asyncio.ensure_future(master.wait())
    await until(lambda: two.state == one.state == "serving")
    await one.drain()
    await two.pause()
    assert not waiting.done()
    await two.drain()
    await asyncio.wait_for(waiting, 5)
    with pytest.raises(DomiError):
        serial.call_later(1.0, lambda: None)


# --------------------------------------------------------------------------------------- versions


async def test_a_version_roll_under_load_loses_nothing(registry_url: str) -> None:
    async with nodes(registry_url, "client") as (client,):
        old = [serve(Node("service", version="1.9", registry=registry_url)) for _ in range(3)]
        await asyncio.gather(*[node.start() for node in old])
        await client.wait_subscribed(WORK, 3, timeout=5)
        async with load(client, 32) as running:
            await running.more(100)
            new = [serve(Node("service", version="v1.10", registry=registry_url)) for _ in range(3)]
            await asyncio.gather(*[node.start() for node in new])
            for node in old:
                await asyncio.wait_for(node.wait_closed(), 20)
            await running.more(100)
        assert set(running.outcomes) == {"answer"}
        assert {peer.version for peer in client.peers.values()} == {"v1.10"}
        with pytest.raises(VersionTooOld, match=r"service v1\.10 is in the cluster"):
            await Node("service", version="1.9", registry=registry_url).start()
        await asyncio.gather(*[node.close() for node in new])


async def test_who_does_not_roll(registry_url: str) -> None:
    """One of another name, one of the same version in other words, and one that is set to stay."""
    staying = Node("service", version="1", roll_deadline=None, registry=registry_url)
    same = Node("service", version="V1.0", registry=registry_url)
    other = Node("other", version="1", registry=registry_url)
    newer = Node("service", version="2", registry=registry_url)
    async with staying, same, other:
        await same.wait_peers(2, 5)
        assert (staying.state, same.state) == ("serving", "serving")
        async with newer:
            await asyncio.wait_for(same.wait_closed(), 5)
            await newer.wait_peers(2, 5)
            assert (staying.state, other.state) == ("serving", "serving")
