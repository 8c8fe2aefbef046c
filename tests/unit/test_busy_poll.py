"""Busy polling: a loop that comes round without blocking for a while after the last traffic."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import statistics
import struct
import sys
import time
import warnings
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from domi_fast import Context, Node, Serial, encode_frame
from domi_fast._core import engine_of
from tests.support import ROOT, RawPeer, echo, nodes, session, slowness, until


@asynccontextmanager
async def polling(url: str, *names: str, **settings: Any) -> AsyncIterator[list[Node]]:
    with warnings.catch_warnings():
        # Whether the machine has processors enough is not what these tests are about.
        warnings.simplefilter("ignore", RuntimeWarning)
        async with nodes(url, *names, **settings) as made:
            yield made


async def polls_in(seconds: float) -> int:
    """How often the engine of this loop polls in that time."""
    engine = engine_of(asyncio.get_running_loop())
    before = engine.polls
    await asyncio.sleep(seconds)
    return engine.polls - before


async def test_it_polls_for_so_long_after_the_last_traffic(registry_url: str) -> None:
    async with polling(registry_url, "a", "b", busy_poll=0.5) as (a, b):
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        await a.request(50, b"")
        assert await polls_in(0.2) > 20
        await asyncio.sleep(0.6)
        assert await polls_in(0.2) == 0


async def test_heartbeats_do_not_keep_it_polling(registry_url: str) -> None:
    beats = {"heartbeat_interval": 0.1, "heartbeat_timeout": 5.0}
    async with polling(registry_url, "a", "b", busy_poll=0.4, **beats) as (a, b):
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        await asyncio.sleep(0.6)
        heard = session(a, b.id).bytes_in
        assert await polls_in(0.5) == 0
        assert session(a, b.id).bytes_in > heard


async def test_what_nodes_say_of_themselves_does_not_keep_it_polling(
    registry_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How much memory is used, and to what they subscribe. A machine's memory cannot be filled and
    emptied for a test, hence the patch."""
    shares = itertools.cycle([0.50, 0.60, 0.70])
    monkeypatch.setattr("domi_fast.memory.used_share", lambda: next(shares))
    often = {"memory_interval": 0.05}
    async with polling(registry_url, "a", "b", busy_poll=0.4, **often) as (a, b):
        while await polls_in(0.1):
            pass
        heard = session(a, b.id).frames_in
        for channel in (50, 51):
            b.subscribe(channel, echo)
            await a.wait_subscribed(channel, timeout=5)
        assert await polls_in(0.5) == 0
        assert session(a, b.id).frames_in > heard + 5


async def test_it_is_off_by_default(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        await a.request(50, b"")
        assert await polls_in(0.1) == 0


async def test_serial_mode_on_the_loop_has_it_poll(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            async with Serial(b, busy_poll=1.0) as serial:
                serial.subscribe(50, echo)
                await a.wait_subscribed(50, timeout=5)
                await a.request(50, b"")
                assert await polls_in(0.2) > 20
        assert await polls_in(0.1) == 0


async def test_tasks_and_timers_are_on_time_meanwhile(registry_url: str) -> None:
    async with polling(registry_url, "a", "b", busy_poll=1.0) as (a, b):
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        loop = asyncio.get_running_loop()
        # In its debug mode asyncio writes the stack down at each callback, several in a turn.
        loop.set_debug(False)
        timers: list[float] = []
        tasks: list[float] = []
        for _ in range(50):
            await a.request(50, b"")
            due = time.monotonic() + 0.003
            woken = loop.create_future()
            loop.call_later(0.003, woken.set_result, None)
            await woken
            timers.append(time.monotonic() - due)
            # To poll is to use the processor.
            asked = time.thread_time()
            await asyncio.create_task(asyncio.sleep(0))
            tasks.append(time.thread_time() - asked)
        # The loop's own timers may be a millisecond late, too.
        assert statistics.median(timers) < 0.002 * slowness()
        assert statistics.median(tasks) < 0.001


async def test_the_last_handler_of_a_batch_sends_at_once(registry_url: str) -> None:
    """If nothing waits for the peer, what comes back may be under way while the handler ends."""
    async with polling(registry_url, "a", busy_poll=0.5) as (a,):
        queued: list[int] = []

        def handler(ctx: Context) -> None:
            for _ in range(2):
                a.notify(51, b"answer", to=700)
                queued.append(session(a, 700).queued)

        a.subscribe(50, handler)
        raw = await RawPeer.plain(a, 700)  # with which it begins to poll
        frame = len(encode_frame(51, b"answer"))
        try:
            for count, expected in (
                (1, [0, frame]),
                (2, [frame, 2 * frame, 3 * frame, 4 * frame]),
            ):
                queued.clear()
                await raw.send(encode_frame(50, b"ask") * count)
                for _ in range(2 * count):
                    assert (await raw.frame_on(51)).data == b"answer"
                assert queued == expected
        finally:
            raw.close()


@pytest.mark.parametrize("by_hand", [True, False])
async def test_what_a_handler_leaves_to_the_loop_does_not_wait_for_the_next_message(
    registry_url: str, by_hand: bool
) -> None:
    """A handler that sends nothing may have made work for others: the loop has its turn first."""
    got: list[int] = []
    looks: list[int] = []
    loop = asyncio.get_running_loop()
    engine = engine_of(loop)
    async with polling(registry_url, "a", busy_poll=0.5) as (a,), AsyncExitStack() as stack:
        if by_hand:
            peer = await stack.enter_async_context(asked_by_hand(a, got))
        else:
            peer = await RawPeer.plain(a, 700)
            stack.callback(peer.close)

        def handler(ctx: Context) -> None:
            loop.call_soon(lambda: looks.append(engine.vain))

        a.subscribe(51, handler)
        for number in range(20):
            await peer.send(encode_frame(51, b""))
            await until(lambda expected=number + 1: len(looks) == expected)
        assert looks == [0] * 20


async def test_all_sessions_are_served(registry_url: str) -> None:
    """Not only that which had the last traffic."""
    async with polling(registry_url, "a", "b", "c", "d", busy_poll=0.2) as (a, *others):
        for node in others:
            node.subscribe(50 + node.id, echo)
            await a.wait_subscribed(50 + node.id, timeout=5)

        async def ask(node: Node, count: int) -> None:
            for number in range(count):
                assert await a.request(50 + node.id, b"%d" % number) == b"%d" % number

        await asyncio.gather(*(ask(node, 200) for node in others))


@asynccontextmanager
async def asked_by_hand(node: Node, got: list[int]) -> AsyncIterator[RawPeer]:
    """A peer whose frames on channel 50 ``node`` puts into ``got``, and whom it has polled for so
    long that it has its descriptor watched by the loop no longer."""
    loop = asyncio.get_running_loop()
    node.subscribe(50, lambda ctx: got.append(ctx.sender))
    peer = await RawPeer.plain(node, 700)
    try:
        await say(peer, got)
        watched = session(node, 700).descriptor
        begun = engine_of(loop).polls
        while engine_of(loop).polls < begun + 100:
            await say(peer, got)
        assert not loop.remove_reader(watched)
        await say(peer, got)
        yield peer
    finally:
        peer.close()


async def say(peer: RawPeer, got: list[int]) -> None:
    got.clear()
    await peer.send(encode_frame(50, b""))
    await until(lambda: bool(got))


async def test_who_is_alone_is_asked_by_hand_until_it_is_silent(registry_url: str) -> None:
    got: list[int] = []
    async with (
        polling(registry_url, "a", busy_poll=0.5) as (a,),
        asked_by_hand(a, got) as peer,
    ):
        while await polls_in(0.1):
            pass
        await say(peer, got)


async def test_who_was_asked_by_hand_is_served_beside_another(registry_url: str) -> None:
    got: list[int] = []
    async with (
        polling(registry_url, "a", busy_poll=0.5) as (a,),
        asked_by_hand(a, got) as peer,
    ):
        other = await RawPeer.plain(a, 701)
        try:
            await say(other, got)
            await say(peer, got)
            await say(other, got)
            assert got == [701]
        finally:
            other.close()


async def test_who_was_asked_by_hand_is_served_when_nobody_polls(registry_url: str) -> None:
    """The node that wants the loop to poll closes, and another is left."""
    got: list[int] = []
    async with nodes(registry_url, "b") as (b,), AsyncExitStack() as stack:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            await stack.enter_async_context(Node("a", registry=registry_url, busy_poll=1.0))
        async with asked_by_hand(b, got) as peer:
            await stack.aclose()
            await say(peer, got)


@pytest.mark.parametrize("how", ["closed", "shut", "killed"])
async def test_who_is_asked_by_hand_is_seen_to_go(registry_url: str, how: str) -> None:
    got: list[int] = []
    async with (
        polling(registry_url, "a", busy_poll=0.5) as (a,),
        asked_by_hand(a, got) as peer,
    ):
        if how == "shut":
            peer.sock.shutdown(socket.SHUT_WR)
        elif how == "killed":
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.sock.close()
        else:
            peer.sock.close()
        await until(lambda: 700 not in a.peers)
        # The number of the descriptor is free for the next.
        other = await RawPeer.plain(a, 701)
        try:
            await say(other, got)
            while await polls_in(0.1):
                pass
            await say(other, got)
        finally:
            other.close()


async def test_who_is_asked_by_hand_waits_for_a_full_serial(registry_url: str) -> None:
    """Its reading is held, and goes on."""
    got: list[int] = []
    taken: list[bytes] = []
    backlogs: list[int] = []
    async with polling(registry_url, "a", busy_poll=0.5) as (a,), asked_by_hand(a, got) as peer:
        async with Serial(a, ring_size=4096, drain_budget=1e-5) as serial:

            def take(ctx: Context) -> None:
                backlogs.append(serial.backlog)
                taken.append(ctx.data)

            serial.subscribe(51, take)
            expected = [b"%0100d" % number for number in range(500)]
            await peer.send(b"".join(encode_frame(51, each) for each in expected))
            await until(lambda: len(taken) == 500)
            assert taken == expected
            assert max(backlogs) > 4096 // 200
        while await polls_in(0.1):
            pass
        await say(peer, got)


async def test_a_session_that_dies_while_it_is_polled(registry_url: str) -> None:
    async with polling(registry_url, "a", "b", "c", busy_poll=0.5) as (a, b, c):
        b.subscribe(50, echo)
        c.subscribe(51, echo)
        await a.wait_subscribed(50, timeout=5)
        await a.wait_subscribed(51, timeout=5)
        await a.request(50, b"")
        session(a, b.id).close("for the test")
        assert await a.request(51, b"x") == b"x"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
async def test_two_on_one_processor_finish_and_warn(tmp_path: Path) -> None:
    script = """
import asyncio, os, sys
from domi_fast import Node
os.sched_setaffinity(0, {int(sys.argv[2])})
async def main():
    async with Node(sys.argv[1], registry=sys.argv[3], busy_poll=1.0) as node:
        if sys.argv[1] == "server":
            done = asyncio.Event()
            node.subscribe(50, lambda ctx: ctx.reply(ctx.data))
            node.subscribe(51, lambda ctx: done.set())
            await done.wait()
        else:
            await node.wait_subscribed(51, timeout=10)
            for number in range(2000):
                assert await node.request(50, b"%d" % number) == b"%d" % number
            node.notify(51, b"")
asyncio.run(main())
"""
    cpu = str(min(os.sched_getaffinity(0)))
    path = f"sqlite:///{tmp_path / 'cluster.db'}"
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", script, name, cpu, path), cwd=ROOT, stderr=-1
        )
        for name in ("server", "client")
    ]
    said = await asyncio.wait_for(
        asyncio.gather(*(each.communicate() for each in processes)), 30 * slowness()
    )
    for process, (_, err) in zip(processes, said, strict=True):
        assert process.returncode == 0, err.decode()
        assert b"RuntimeWarning: busy_poll: 1 thread(s)" in err


def warned_by(work: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(work)
    return [str(each.message) for each in caught if each.category is RuntimeWarning]


@pytest.mark.parametrize(("processors", "expected"), [(1, 2), (2, 1), (3, 0)])
def test_it_warns_when_all_processors_poll(
    monkeypatch: pytest.MonkeyPatch, registry_url: str, processors: int, expected: int
) -> None:
    """A node and a serial thread are two that poll; a second node on the loop is none."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))

    async def start() -> None:
        async with nodes(registry_url, "a", "b", busy_poll=0.001) as (a, _):
            serial = Serial(a, thread=True, busy_poll=0.001)
            await serial.start()
            await serial.close()

    for _ in range(2):  # who has closed polls no more
        assert len(warned_by(start())) == expected


async def test_the_thread_of_serial_mode_polls(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        ran: list[Context] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            async with Serial(b, thread=True, busy_poll=0.2) as serial:
                serial.subscribe(50, ran.append)
                await a.wait_subscribed(50, timeout=5)
                before = serial._scheduler.polls
                a.notify(50, b"")
                await asyncio.sleep(0.5)
                after = serial._scheduler.polls
                assert after > before + 100
                await asyncio.sleep(0.2)
                assert serial._scheduler.polls == after
                assert len(ran) == 1
