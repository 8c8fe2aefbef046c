"""A ring that is full: on the node's loop it is emptied, for a thread that keeps going its senders
wait, and of a thread that waits it refuses.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from domi_fast import Context, NoSubscriber, Overloaded, RingFull, Serial
from tests.serial.modes import make_serial, pair, within
from tests.support import echo, nodes, session, until


@pytest.fixture
def turns_of_two_ms() -> Iterator[None]:
    """So long a thread runs Python while another asks for its turn."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.002)
    yield
    sys.setswitchinterval(before)


def computing(ran: list[bytes], seconds: float) -> Callable[[Context], None]:
    """A handler that keeps its thread busy for so long, as the thread's own clock counts."""

    def handler(ctx: Context) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass
        ran.append(ctx.data)

    return handler


async def test_a_full_ring_is_emptied_by_who_fills_it(registry_url: str) -> None:
    """Handlers that are slower than the messages come keep the node from reading more of them."""
    async with nodes(registry_url, "a", "b") as (a, b):
        serial = Serial(b, ring_size=4096, drain_budget=0.00001)
        ran: list[int] = []
        most = 0
        refused: list[BaseException] = []
        a.on_error = lambda error, _: refused.append(error)

        def slow(ctx: Context) -> None:
            nonlocal most
            ran.append(int(ctx.data))
            most = max(most, serial.backlog)
            if len(ran) % 100 == 1:
                time.sleep(0.01)

        serial.subscribe(50, slow)
        serial.subscribe(51, echo)
        async with serial:
            await a.wait_subscribed(51, timeout=5)
            for number in range(2000):
                a.notify(50, b"%d" % number)
            asked = [a.request(51, b"%d" % number) for number in range(100)]
            # Large ones wait in the ring by reference.
            asked += [a.request(51, bytes(100_000)) for _ in range(10)]
            answers = await asyncio.gather(*asked)
            assert answers[:100] == [b"%d" % number for number in range(100)]
            assert answers[100:] == [bytes(100_000)] * 10
            assert ran == [*range(2000)]
            assert most * 48 > 4096 - 100
            assert not refused
            assert b.counters().get("ring_full", 0) == 0


async def test_room_is_made_for_a_message_that_needs_that_of_many(registry_url: str) -> None:
    """However little of it the ring's turn makes: here a turn has time for one handler."""
    async with nodes(registry_url, "a", "b") as (a, b):
        serial = Serial(b, ring_size=4096, drain_budget=0.00001)
        ran: list[bytes] = []
        serial.subscribe(50, computing(ran, 0.0001))
        async with serial:
            await a.wait_subscribed(50, timeout=5)
            sent = [b"%d" % number for number in range(200)]
            sent[120:] = [bytes(1_000)] * 80
            for data in sent:
                a.notify(50, data)
            await until(lambda: len(ran) + b.counters().get("ring_full", 0) == len(sent))
            assert ran == sent
            assert b.counters().get("ring_full", 0) == 0


@pytest.mark.parametrize("own", [False, True])
async def test_a_session_may_end_while_room_is_made(registry_url: str, own: bool) -> None:
    """A handler that runs then closes the session whose frame is in hand."""
    async with nodes(registry_url, "a", "b") as (a, b):
        serial = Serial(b, ring_size=4096, drain_budget=0.00001)
        ran = 0

        def handler(ctx: Context) -> None:
            nonlocal ran
            ran += 1
            if ran == 150:
                session(b, ctx.sender).close("the test ends it")

        serial.subscribe(50, handler)
        async with serial:
            sender = b if own else a
            await sender.wait_subscribed(50, timeout=5)
            for _ in range(1000):
                sender.notify(50, bytes(40))
            await until(lambda: ran >= 150)


@pytest.mark.usefixtures("threaded")
async def test_a_full_ring_of_a_thread_that_waits_refuses(registry_url: str) -> None:
    """Everything is either run or refused, and the sender hears of each that is refused."""
    async with nodes(registry_url, "a", "b") as (a, b):
        serial = make_serial(b, ring_size=4096, drain_budget=0.00001)
        ran: list[bytes] = []
        refused: list[tuple[type[BaseException], bytes]] = []
        a.on_error = lambda error, frame: refused.append((type(error), frame.data))

        def slow(ctx: Context) -> None:
            ran.append(ctx.data)
            if ctx.data == b"0":
                time.sleep(0.5)

        serial.subscribe(50, slow)
        serial.subscribe(51, echo)
        async with serial:
            await a.wait_subscribed(51, timeout=5)
            for number in range(500):
                a.notify(50, b"%d" % number)
            asked = [a.request(51, b"") for _ in range(10)]
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
            await until(lambda: len(ran) + len(refused) == 500)
            overloaded = sum(isinstance(outcome, Overloaded) for outcome in outcomes)
            assert refused
            assert {kind for kind, _ in refused} == {Overloaded}
            assert sorted([*ran, *(message for _, message in refused)]) == sorted(
                b"%d" % number for number in range(500)
            )
            assert b.counters()["ring_full"] == len(refused) + overloaded
            assert overloaded + outcomes.count(b"") == 10
            assert ran == sorted(ran, key=int)
            assert await a.request(51, b"after") == b"after"


@pytest.mark.usefixtures("threaded")
async def test_who_comes_when_all_that_waited_was_taken_is_not_refused(registry_url: str) -> None:
    """Though it was a thread that waited, and the loop has not heard yet that there is room."""
    async with nodes(registry_url, "a", "b") as (a, b):
        serial = make_serial(b, ring_size=4096)
        go_on, last, end = threading.Event(), threading.Event(), threading.Event()
        refused: list[bytes] = []
        a.on_error = lambda error, frame: refused.append(frame.data)

        def handler(ctx: Context) -> None:
            if ctx.data == b"0":
                go_on.wait(5)
            elif serial.backlog == 0 and not last.is_set():
                last.set()
                end.wait(5)

        serial.subscribe(50, handler)
        serial.subscribe(51, echo)
        async with serial:
            await a.wait_subscribed(51, timeout=5)
            for number in range(500):
                a.notify(50, b"%d" % number)
            try:
                await until(lambda: refused and 1 + serial.backlog + len(refused) == 500)
                go_on.set()
                await until(last.is_set)
                before = b.counters()["frames_in"]
                asked = asyncio.ensure_future(a.request(51, b"after"))
                await until(lambda: b.counters()["frames_in"] > before)
            finally:
                go_on.set()
                end.set()
            assert await asked == b"after"


async def test_what_is_unsubscribed_while_room_is_made_for_it(registry_url: str) -> None:
    """By a handler that runs then: its message is refused, and nothing of it is used any more."""
    async with nodes(registry_url, "a", "b") as (a, b):
        serial = Serial(b, ring_size=4096, drain_budget=0.00001)
        other: list[bytes] = []
        missed: list[bytes] = []
        a.on_error = lambda error, frame: missed.append(frame.data)
        ran = changes = 0

        def handler(ctx: Context) -> None:
            nonlocal ran, changes
            ran += 1
            end = time.thread_time() + 0.0001
            while time.thread_time() < end:
                pass
            changes += 1
            if changes % 2:
                serial.unsubscribe(51)
            else:
                serial.subscribe(51, lambda ctx: other.append(ctx.data))

        serial.subscribe(50, handler)
        serial.subscribe(51, lambda ctx: other.append(ctx.data))
        async with serial:
            await a.wait_subscribed(51, timeout=5)
            sent = wanted = 0
            for number in range(40):
                # It is there, or is not, when its message comes, as the number before is even.
                a.notify_many(50, [b"x"] * (150 + number % 2))
                wanted += 150 + number % 2
                with suppress(NoSubscriber):
                    a.notify(51, b"%d" % number)
                    sent += 1
                await until(lambda wanted=wanted: ran == wanted)  # type: ignore[misc]
            await until(lambda: len(other) + len(missed) == sent)


@contextmanager
def no_processor_for(thread: int) -> Iterator[None]:
    """Another process takes one of two processors, and this thread may use no other."""
    this, other = sorted(os.sched_getaffinity(0))[:2]
    before = {int(each): os.sched_getaffinity(int(each)) for each in os.listdir("/proc/self/task")}
    for each in before:
        os.sched_setaffinity(each, {this if each == thread else other})
    program = (
        f"import os; os.sched_setaffinity(0, {{{this}}}); "
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)); print(flush=True)\n"
        "while True: pass"
    )
    hog = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert hog.stdout is not None
        assert hog.stdout.readline()
        yield
    finally:
        hog.kill()
        hog.communicate()
        for each, cpus in before.items():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(each, cpus)


@pytest.mark.skipif(
    os.geteuid() != 0 or len(os.sched_getaffinity(0)) < 2,
    reason="takes a processor away: for root, where there are two",
)
@pytest.mark.usefixtures("threaded")
async def test_a_thread_without_a_processor_is_waited_for(registry_url: str) -> None:
    async with pair(registry_url, ring_size=4096) as (a, b, serial):
        ran: list[bytes] = []
        threads: list[int] = []

        def handler(ctx: Context) -> None:
            threads.append(threading.get_native_id())
            ran.append(ctx.data)

        serial.subscribe(50, handler)
        await serial.start()
        await a.wait_subscribed(50, timeout=5)
        a.notify(50, b"first")
        await until(lambda: len(ran) == 1)
        messages = [b"%d" % number for number in range(1000)]
        with no_processor_for(threads[0]):
            a.notify_many(50, messages)
            # Half as long again as a thread that waits is waited for.
            for _ in range(15):
                await asyncio.sleep(0.01)
        await until(lambda: len(ran) == 1001 or b.counters().get("ring_full", 0) > 0)
        assert b.counters().get("ring_full", 0) == 0
        assert ran[1:] == messages


@pytest.mark.usefixtures("threaded")
@pytest.mark.parametrize(("ring_size", "size"), [(4096, 1000), (65536, 10_000), (262_144, 60_000)])
async def test_frames_of_a_large_part_of_the_ring_are_waited_for(
    registry_url: str, ring_size: int, size: int
) -> None:
    """Both ways: a ring that holds a few of them, and none is refused."""
    async with pair(registry_url, ring_size=ring_size) as (a, b, serial):
        count = 200
        arrived: list[bytes] = []
        came_back: list[bytes] = []
        serial.subscribe(50, lambda ctx: arrived.append(ctx.data))
        a.subscribe(60, lambda ctx: came_back.append(ctx.data))
        await serial.start()
        await asyncio.gather(a.wait_subscribed(50, timeout=5), b.wait_subscribed(60, timeout=5))
        messages = [number.to_bytes(2, "little") * (size // 2) for number in range(count)]
        a.notify_many(50, messages)
        await within(serial, lambda: serial.notify_many(60, messages))
        await until(lambda: len(arrived) == len(came_back) == count)
        assert arrived == came_back == messages
        assert b.counters()["ring_full"] == b.counters()["outbound_full"] == 0


@pytest.mark.usefixtures("threaded")
async def test_a_thread_that_computes_holds_only_who_sends_to_it(registry_url: str) -> None:
    """Its sender waits, however slow it is, and the loop goes on with all others meanwhile."""
    settings = {"heartbeat_interval": 0.1, "heartbeat_timeout": 0.3}
    async with nodes(registry_url, "a", "b", "c", **settings) as (a, b, c):
        serial = make_serial(b, ring_size=4096)
        ran: list[bytes] = []
        serial.subscribe(50, computing(ran, 0.001))
        b.subscribe(60, echo)
        sessions = [session(b, a.id), session(a, b.id)]
        async with serial:
            await asyncio.gather(*[each.wait_subscribed(60, timeout=5) for each in (a, c)])
            await a.wait_subscribed(50, timeout=5)
            messages = [b"%d" % number for number in range(1000)]
            a.notify_many(50, messages)
            await until(lambda: serial.backlog > 50)
            behind = a.request(60, b"behind", timeout=None)
            answered = 0
            while len(ran) < 500:
                assert await c.request(60, b"x") == b"x"
                answered += 1
            # The loop has turned all the time, and has read no more from the one that waits.
            assert answered > 20
            assert not behind.done()
            await until(lambda: len(ran) == 1000, 30)
            assert await behind == b"behind"
            assert ran == messages
            assert b.counters()["ring_full"] == 0
        # Nobody has taken the other's silence for its death.
        assert sessions == [session(b, a.id), session(a, b.id)]


@pytest.mark.usefixtures("threaded")
async def test_a_thread_that_is_kept_from_running_is_waited_for(
    registry_url: str, turns_of_two_ms: None
) -> None:
    """A loop that keeps the interpreter's lock, as a garbage collection does, is not its fault."""
    keep_lock = ctypes.PyDLL(None).usleep
    async with pair(registry_url, ring_size=4096) as (a, b, serial):
        ran: list[bytes] = []
        serial.subscribe(50, computing(ran, 0.0005))
        await serial.start()
        await a.wait_subscribed(50, timeout=5)
        messages = [b"%d" % number for number in range(150)]
        a.notify_many(50, messages)
        await until(lambda: serial.backlog > 50)
        while len(ran) + b.counters()["ring_full"] < 150:
            keep_lock(120_000)
            await asyncio.sleep(0)
        assert ran == messages


@pytest.mark.usefixtures("threaded")
async def test_what_the_node_sends_itself_waits_too(registry_url: str) -> None:
    async with pair(registry_url, ring_size=4096) as (_, b, serial):
        ran: list[bytes] = []
        serial.subscribe(50, computing(ran, 0.0005))
        await serial.start()
        messages = [b"%d" % number for number in range(500)]
        b.notify_many(50, messages)
        await until(lambda: len(ran) == 500, 20)
        assert ran == messages
        assert b.counters()["ring_full"] == 0


@pytest.mark.usefixtures("threaded")
async def test_a_sender_that_waits_may_go(registry_url: str) -> None:
    """What it had sent before is run, and its end is seen once there is room again."""
    async with pair(registry_url, ring_size=4096) as (a, b, serial):
        ran: list[bytes] = []
        serial.subscribe(50, computing(ran, 0.001))
        await serial.start()
        await a.wait_subscribed(50, timeout=5)
        a.notify_many(50, [b"x"] * 300)
        await until(lambda: serial.backlog > 50)
        await a.close()
        await until(lambda: len(ran) == 300 and not b.peers, 20)


@pytest.mark.usefixtures("threaded")
async def test_closing_while_a_sender_waits_runs_what_was_taken(registry_url: str) -> None:
    async with pair(registry_url, ring_size=4096) as (a, b, serial):
        ran: list[bytes] = []
        serial.subscribe(50, computing(ran, 0.001))
        b.subscribe(60, echo)
        await serial.start()
        await a.wait_subscribed(60, timeout=5)
        messages = [b"%d" % number for number in range(1000)]
        a.notify_many(50, messages)
        await until(lambda: serial.backlog > 50)
        taken = serial.backlog + len(ran)
        await serial.close()
        assert len(ran) >= taken
        assert ran == messages[: len(ran)]
        assert serial.backlog == 0
        assert await a.request(60, b"on") == b"on"


@pytest.mark.usefixtures("threaded")
@pytest.mark.parametrize("batch", [False, True])
async def test_large_messages_wait_in_bounded_memory(registry_url: str, batch: bool) -> None:
    """They pass by reference: their bytes are counted, up to the node's queue_limit."""
    size, limit = 300_000, 1 << 20
    async with pair(registry_url, node={"queue_limit": limit}) as (a, b, serial):
        gate = threading.Event()
        ran = 0

        def wait(given: Any) -> None:
            nonlocal ran
            assert gate.wait(10)
            ran += len(given) if batch else 1

        serial.subscribe(50, wait, batch=batch)
        await serial.start()
        await a.wait_subscribed(50, timeout=5)
        refused: list[object] = []
        a.on_error = lambda error, frame: refused.append(error)
        sent = 40
        for _ in range(sent):
            await a.drained(b.id)
            a.notify(50, bytes(size))
        await until(lambda: len(refused) > 25)
        # One more of the one session may be in hand.
        assert serial.backlog * size <= limit + size
        gate.set()
        await until(lambda: ran + len(refused) == sent)
        assert b.counters()["ring_full"] == len(refused)
        # When they have been run, there is room again.
        a.notify(50, bytes(size))
        await until(lambda: ran + len(refused) == sent + 1)
        assert b.counters()["ring_full"] == len(refused) < sent


@pytest.mark.usefixtures("threaded")
async def test_what_a_thread_sends_waits_in_bounded_memory(registry_url: str) -> None:
    size, limit = 300_000, 1 << 20
    async with pair(registry_url, node={"queue_limit": limit}) as (a, b, serial):
        seen = 0

        def see(_: Context) -> None:
            nonlocal seen
            seen += 1

        a.subscribe(60, see)
        await serial.start()
        await b.wait_subscribed(60, timeout=5)
        ended = threading.Event()
        full: list[RingFull] = []
        sent = 0

        def send() -> None:
            nonlocal sent
            try:
                for _ in range(20):
                    serial.notify(60, bytes(size))
                    sent += 1
            except RingFull as error:
                full.append(error)
            ended.set()

        serial.call_later(0.0, send)
        assert ended.wait(10)  # the loop takes nothing meanwhile
        assert len(full) == 1
        assert sent * size <= limit
        assert b.counters()["outbound_full"] == 1
        await until(lambda: seen == sent)
        await within(serial, lambda: serial.notify(60, bytes(size)))
        await until(lambda: seen == sent + 1)
