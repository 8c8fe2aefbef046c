"""Serial mode on a thread of its own: what runs where, and what changes hands."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable

import pytest

from domi_fast import (
    Context,
    DomiError,
    Serial,
)
from tests.serial.modes import asleep, pair, within
from tests.support import ROOT, echo, nodes, slowness, until

pytestmark = pytest.mark.usefixtures("threaded")


async def test_everything_of_it_runs_on_one_thread(registry_url: str) -> None:
    async with pair(registry_url) as (a, b, serial):
        seen: list[tuple[str, int]] = []

        def saw(what: str) -> Callable[..., None]:
            return lambda *_: seen.append((what, threading.get_ident()))

        def failing(ctx: Context) -> None:
            saw("handler")()
            serial.request(60, b"").add_done_callback(saw("answer"))
            serial.notify_many(61, [b"", b"refused"])

        a.subscribe(60, echo)
        a.subscribe(61, lambda ctx: a.unsubscribe(61))
        serial.subscribe(50, failing)
        serial.subscribe(51, saw("batch"), batch=True)
        serial.subscribe_race([52, 53], saw("race"))
        serial.subscribe_all([54, 55], saw("join"))
        serial.on_error = saw("on_error")
        await serial.start()
        beat = serial.every(0.001, saw("every"))
        serial.call_later(0.0, saw("call_later"))
        await a.wait_subscribed(55, timeout=5)
        await b.wait_subscribed(61, timeout=5)
        for channel in range(50, 56):
            a.notify(channel, b"")
        names = {"handler", "answer", "batch", "race", "join", "on_error", "every", "call_later"}
        await until(lambda: {what for what, _ in seen} >= names)
        beat.cancel()
        threads = {thread for _, thread in seen}
        assert len(threads) == 1
        assert threads != {threading.get_ident()}
        assert [each.name for each in threading.enumerate() if each.ident in threads] == [
            "serial-b"
        ]


async def test_a_handler_that_waits_holds_up_nobody_else(registry_url: str) -> None:
    async with pair(registry_url) as (a, b, serial):
        gate = threading.Event()
        ran: list[bytes] = []

        def wait(ctx: Context) -> None:
            assert gate.wait(10)
            ran.append(ctx.data)

        serial.subscribe(50, wait)
        b.subscribe(60, echo)
        await serial.start()
        await a.wait_subscribed(60, timeout=5)
        a.notify(50, b"1")
        a.notify(50, b"2")
        await until(lambda: serial.backlog == 1)
        for _ in range(100):
            assert await a.request(60, b"x", timeout=2) == b"x"
        assert ran == []
        gate.set()
        await until(lambda: ran == [b"1", b"2"])


async def test_it_sleeps_when_there_is_nothing_to_do(registry_url: str) -> None:
    """It is woken, and does not poll: an idle thread uses no processor."""
    async with pair(registry_url) as (a, _, serial):
        clocks: list[int] = []
        serial.subscribe(50, lambda ctx: clocks.append(time.thread_time_ns()))
        await serial.start()
        await a.wait_subscribed(50, timeout=5)
        for count in range(1, 4):
            a.notify(50, b"")
            await until(lambda count=count: len(clocks) == count)  # type: ignore[misc]
            await asyncio.sleep(0.3)
        assert clocks[2] - clocks[1] < 30_000_000


async def test_a_timer_wakes_it(registry_url: str) -> None:
    """One that the loop sets while the thread sleeps, too; and one before another."""
    async with pair(registry_url) as (_, _, serial):
        fired: list[str] = []
        await serial.start()
        serial.call_later(30.0, lambda: fired.append("late"))
        await asleep(serial)
        serial.call_later(0.01, lambda: fired.append("early"))
        await until(lambda: fired == ["early"])


async def test_timers_are_on_time(registry_url: str) -> None:
    async with pair(registry_url, tick=0.0001) as (_, _, serial):
        late: list[float] = []
        await serial.start()

        def at(due: float) -> Callable[[], None]:
            return lambda: late.append(time.monotonic() - due)

        for number in range(20):
            serial.call_later(0.005 * number, at(time.monotonic() + 0.005 * number))
        await until(lambda: len(late) == 20)
        assert min(late) >= 0.0
        assert sorted(late)[10] < 0.005 * slowness()


async def test_subscribing_from_both_threads(registry_url: str) -> None:
    async with pair(registry_url) as (a, b, serial):
        await serial.start()
        serial.subscribe(50, echo)
        await within(serial, lambda: serial.subscribe(51, echo))
        await a.wait_subscribed(50, timeout=5)
        await a.wait_subscribed(51, timeout=5)
        assert await a.request(50, b"x") == await a.request(51, b"x") == b"x"
        b.subscribe(52, echo)
        with pytest.raises(DomiError, match="has a handler already"):
            await within(serial, lambda: serial.subscribe(52, echo))
        serial.unsubscribe(51)
        await within(serial, lambda: serial.unsubscribe(50))
        await until(lambda: not a.subscribers(50) and not a.subscribers(51))
        await within(serial, lambda: serial.subscribe(50, echo))
        await a.wait_subscribed(50, timeout=5)
        assert await a.request(50, b"again") == b"again"


async def test_a_channel_that_changes_hands_in_one_handler(registry_url: str) -> None:
    """And between the threads: what was subscribed last is what runs."""
    async with pair(registry_url) as (a, _, serial):
        await serial.start()

        def answer(data: bytes) -> Callable[[Context], None]:
            return lambda ctx: ctx.reply(data)

        def change() -> None:
            serial.subscribe(50, answer(b"first"))
            serial.unsubscribe(50)
            serial.subscribe(50, answer(b"second"))

        await within(serial, change)
        await a.wait_subscribed(50, timeout=5)
        assert await a.request(50, b"") == b"second"
        done = threading.Event()

        def again() -> None:
            serial.unsubscribe(50)
            serial.subscribe(50, answer(b"third"))
            done.set()

        serial.call_later(0.0, again)
        assert done.wait(10)  # the loop has yet to hear of it
        serial.unsubscribe(50)
        serial.subscribe(50, answer(b"fourth"))
        await until(lambda: a.subscribers(50))
        assert await a.request(50, b"") == b"fourth"


async def test_a_subscription_while_it_closes_leaves_nothing(registry_url: str) -> None:
    async with pair(registry_url) as (_, b, serial):
        await serial.start()
        done = threading.Event()
        serial.call_later(0.0, lambda: (serial.subscribe(50, echo), done.set()))
        assert done.wait(10)
        await serial.close()
        assert 50 not in b._router.handlers()
        b.subscribe(50, echo)


async def test_a_thread_that_cannot_start(
    registry_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async with pair(registry_url) as (_, b, serial):
        serial.subscribe(50, echo)
        # The system has no limit here that a test could reach without harm to others.
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="can't start"):
                await serial.start()
        await asyncio.wait_for(serial.close(), 5)
        assert 50 not in b._router.handlers()


async def test_two_serials_share_on_error(registry_url: str) -> None:
    """It runs on the thread that started last, and then on the one that is left."""
    async with pair(registry_url) as (a, b, serial):
        threads: list[str] = []
        serial.on_error = lambda error, frame: threads.append(threading.current_thread().name)
        a.subscribe(60, lambda ctx: a.unsubscribe(60))
        await serial.start()
        names = []
        async with Serial(b, thread=True) as other:
            for each in (other, serial):
                if each is serial:
                    await other.close()
                    a.subscribe(60, lambda ctx: a.unsubscribe(60))
                ident = await within(each, threading.get_ident)
                names.append(ident)
                serial.on_error = lambda error, frame: threads.append(str(threading.get_ident()))
                await b.wait_subscribed(60, timeout=5)
                b.notify_many(60, [b"", b"refused"])
                await until(lambda: len(threads) == len(names))
        assert threads == [str(ident) for ident in names]


async def test_a_third_thread_may_not(registry_url: str) -> None:
    async with pair(registry_url) as (_, b, serial):
        b.subscribe(60, echo)
        await serial.start()
        for work in (
            lambda: serial.notify(60, b""),
            lambda: serial.request(60, b""),
            lambda: serial.subscribe(51, echo),
            lambda: serial.call_later(0.0, print),
            lambda: serial.every(1.0, print),
            lambda: serial.unsubscribe_group([60]),
        ):
            with pytest.raises(DomiError, match="another thread"):
                await asyncio.get_running_loop().run_in_executor(None, work)
        with pytest.raises(DomiError, match="thread of a Serial, which sends by the Serial's own"):
            await within(serial, lambda: b.notify(60, b""))


async def test_two_threads_of_one_node(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        seen: list[tuple[bytes, int]] = []

        def see(ctx: Context) -> None:
            seen.append((ctx.data, threading.get_ident()))
            if len(ctx.data) < 6:
                (one if ctx.channel == 50 else other).notify(101 - ctx.channel, ctx.data + b".")

        async with Serial(a, thread=True) as one, Serial(a, thread=True) as other:
            one.subscribe(50, see)
            other.subscribe(51, see)
            await a.wait_subscribed(51, timeout=5)
            idents = [await within(each, threading.get_ident) for each in (one, other)]
            assert len({*idents, threading.get_ident()}) == 3
            a.notify(50, b"")
            await until(lambda: len(seen) == 7)
            assert seen == [(b"." * count, idents[count % 2]) for count in range(7)]


async def test_what_ends_the_loop_ends_it_from_there_too(registry_url: str) -> None:
    """And the thread lives on, for an orderly close."""
    script = """
import sys
from domi_fast import Node, Serial, run
node = Node("a", registry="memory://x")
serial = Serial(node, thread=True)
@serial.subscribe(50)
def handler(ctx):
    if ctx.data == b"1":
        sys.exit(7)
    print("after", flush=True)
    ctx.reply(b"")
serial.call_later(0.01, lambda: serial.notify_many(50, [b"1", b"2"]))
run(node, serial)
"""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, out) == (7, b"after\n"), err.decode()


async def test_a_program_that_does_not_close_it_ends_all_the_same() -> None:
    script = """
import asyncio
from domi_fast import Node, Serial
async def main():
    node = Node("a", registry="memory://x")
    await node.start()
    serial = Serial(node, thread=True)
    await serial.start()
    serial.every(0.001, lambda: None)
    await asyncio.sleep(0.05)
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, cwd=ROOT, stderr=subprocess.PIPE
    )
    _, err = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 0, err.decode()


async def test_close_waits_for_the_handler_that_runs(registry_url: str) -> None:
    async with pair(registry_url) as (a, _, serial):
        gate = threading.Event()
        ran: list[bytes] = []

        def wait(ctx: Context) -> None:
            assert gate.wait(10)
            ran.append(ctx.data)
            ctx.reply(ctx.data)

        serial.subscribe(50, wait)
        await serial.start()
        await a.wait_subscribed(50, timeout=5)
        requests = [a.request(50, b"%d" % number) for number in range(3)]
        await until(lambda: serial.backlog == 2)
        closing = asyncio.ensure_future(serial.close())
        await until(lambda: not a.subscribers(50))
        assert not closing.done()
        gate.set()
        await closing
        assert ran == [b"0", b"1", b"2"]
        # What it has answered last went out, too.
        assert await asyncio.gather(*requests) == ran
        assert not [each for each in threading.enumerate() if each.name == "serial-b"]


async def test_a_handler_that_never_ends_does_not_keep_its_node(registry_url: str) -> None:
    async with pair(registry_url, node={"drain_timeout": 0.1}) as (a, b, serial):
        gate = threading.Event()
        serial.subscribe(50, lambda ctx: gate.wait(10) and None)
        await serial.start()
        await a.wait_subscribed(50, timeout=5)
        a.notify(50, b"")
        a.notify(50, b"")
        await until(lambda: serial.backlog == 1)
        await b.close()
        assert b.state == "closed"
        gate.set()
        await serial.close()


async def test_after_the_close(registry_url: str) -> None:
    async with pair(registry_url) as (_, b, serial):
        b.subscribe(60, echo)
        await serial.start()
        request = await within(serial, lambda: serial.request(60, b""))
        await serial.close()
        with pytest.raises(DomiError, match="closed"):
            serial.call_later(0.0, print)
        with pytest.raises(DomiError, match="closed"):
            serial.subscribe(51, echo)
        # The loop's own verbs are the node's, and go on.
        assert await serial.request(60, b"x") == b"x"
        assert request.result(5) == b""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
async def test_a_forked_child_hears_that_it_has_no_thread(registry_url: str) -> None:
    async with pair(registry_url) as (_, b, serial):
        b.subscribe(60, echo)
        await serial.start()

        def fork() -> int:
            child = os.fork()
            if child == 0:
                try:
                    serial.notify(60, b"")
                    os._exit(1)
                except DomiError as error:
                    os._exit(0 if "forked" in str(error) else 2)
            return os.waitpid(child, 0)[1]

        assert await within(serial, fork) == 0


async def test_busy_polling_still_runs_everything(registry_url: str) -> None:
    async with pair(registry_url, busy_poll=0.05) as (a, b, serial):
        fired: list[float] = []
        serial.subscribe(50, echo)
        b.subscribe(60, echo)
        with warnings.catch_warnings():
            # Whether the machine has processors enough is not what this is about.
            warnings.simplefilter("ignore", RuntimeWarning)
            await serial.start()
        await a.wait_subscribed(60, timeout=5)
        began = time.monotonic()
        serial.call_later(0.02, lambda: fired.append(time.monotonic() - began))
        for number in range(300):
            assert await a.request(50, b"%d" % number) == b"%d" % number
            assert await a.request(60, b"%d" % number) == b"%d" % number
        await until(lambda: fired)
        assert 0.02 <= fired[0] < 0.2 * slowness()
        await asleep(serial)
        assert await a.request(50, b"x") == b"x"
