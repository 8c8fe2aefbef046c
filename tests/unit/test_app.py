"""Master and run() in processes of their own, with real signals.

Run as a program, this file is such a process: its first argument names a function of CASES, and the
lines that it prints are what the tests wait for.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import uvloop

from domi_fast import Master, Node, run

PATIENCE = 60.0
FORCED = 1
LOOPS = ("asyncio", "uvloop")


def say(text: str) -> None:
    print(text, flush=True)


class Part:
    """A component that says what is done with it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<Part {self.name}>"

    async def start(self) -> None:
        say(f"start {self.name}")

    async def close(self) -> None:
        say(f"close {self.name}")


class Last(Part):
    """Added last: once it has started, everything has."""

    async def start(self) -> None:
        await super().start()
        say("ready")


class Awaits(Part):
    """Hangs in close(), waiting for what never comes."""

    async def close(self) -> None:
        await super().close()
        await asyncio.Event().wait()


class Swallows(Part):
    """Hangs in close(), and will not be cancelled."""

    async def close(self) -> None:
        await super().close()
        while True:
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()


class Blocks(Part):
    """Hangs in close(), and the loop with it; Python's signal handlers still run."""

    async def close(self) -> None:
        await super().close()
        while True:
            time.sleep(1000)


class BlocksInC(Part):
    """Hangs in close() in C, where no signal handler of Python's can run."""

    async def close(self) -> None:
        await super().close()
        libc = ctypes.CDLL(None)
        while True:
            libc.sleep(1000)


class Slow(Part):
    """Takes its time in close()."""

    seconds = 0.2

    async def close(self) -> None:
        await asyncio.sleep(self.seconds)
        await super().close()


class FailsToClose(Part):
    async def close(self) -> None:
        raise OSError("the disk is full")


class FailsToStart(Part):
    async def start(self) -> None:
        await super().start()
        raise OSError("no such device")


class SlowToStart(Part):
    """Starts until it is cancelled."""

    async def start(self) -> None:
        await super().start()
        say("ready")
        try:
            await asyncio.Event().wait()
        finally:
            say(f"cancelled {self.name}")


class StubbornStart(Part):
    """Its start() goes on until it has finished, cancelled or not."""

    async def start(self) -> None:
        await super().start()
        say("ready")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            say(f"started {self.name}")


class NeverStarts(Part):
    async def start(self) -> None:
        await super().start()
        say("ready")
        while True:
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()


HANGS: dict[str, Callable[[str], Part]] = {
    "awaits": Awaits,
    "swallows": Swallows,
    "blocks": Blocks,
    "blocks-in-c": BlocksInC,
}


def wait_for(master: Master, loop: str) -> None:
    if loop == "uvloop":
        uvloop.run(master.wait())
    else:
        asyncio.run(master.wait())


def stop_when_told(master: Master) -> None:
    sys.stdin.readline()
    master.stop()


def case_orderly(loop: str, timeout: str) -> None:
    master = Master(timeout=float(timeout))
    for part in (Part("a"), Slow("b"), Last("c")):
        master.add(part)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    wait_for(master, loop)
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == 1
    say("done")


def case_lives_on(loop: str) -> None:
    """The program goes on for longer than its components had for their stop."""
    master = Master(timeout=1.0)
    master.add(Last("a"))
    wait_for(master, loop)
    time.sleep(1.5)
    say("done")


def case_hang(kind: str, loop: str, timeout: str) -> None:
    master = Master(timeout=float(timeout))
    slow = Slow("b")
    slow.seconds = 0.01
    for part in (Part("a"), slow, HANGS[kind]("c"), Last("d")):
        master.add(part)
    wait_for(master, loop)
    say("came back")


def case_run(timeout: str) -> None:
    parts: list[Part] = [Part("a"), Last("b")]
    run(*parts, timeout=float(timeout))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    say("done")


def case_node(url: str) -> None:
    node = Node("server", registry=url)
    run(node, Last("last"))
    assert node.peers == {}
    say("done")


def case_stop_from_thread(loop: str) -> None:
    master = Master(timeout=PATIENCE)
    part = Last("a")
    master.add(part)
    thread = threading.Thread(target=stop_when_told, args=(master,))
    thread.start()
    wait_for(master, loop)
    thread.join()
    master.stop()  # nothing is left to stop
    say("done")


def case_blocked_and_stopped_from_thread(loop: str) -> None:
    class BlocksWhenRunning(Last):
        async def start(self) -> None:
            await super().start()
            asyncio.get_running_loop().call_later(0.1, self.block)

        def block(self) -> None:
            say("blocked")
            time.sleep(1000)

    master = Master(timeout=0.3)
    master.add(BlocksWhenRunning("a"))
    threading.Thread(target=stop_when_told, args=(master,), daemon=True).start()
    wait_for(master, loop)
    say("came back")


def case_off_the_main_thread(loop: str) -> None:
    master = Master(timeout=PATIENCE)
    for part in (Part("a"), Last("b")):
        master.add(part)
    thread = threading.Thread(target=wait_for, args=(master, loop))
    thread.start()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    stop_when_told(master)
    thread.join()
    say("done")


def case_start(kind: str, loop: str) -> None:
    second: Part = {
        "fails": FailsToStart,
        "slow": SlowToStart,
        "stubborn": StubbornStart,
        "never": NeverStarts,
    }[kind]("b")
    master = Master(timeout=0.5 if kind == "never" else PATIENCE)
    for part in (Part("a"), second, Last("c")):
        master.add(part)
    try:
        wait_for(master, loop)
    except OSError as error:
        say(f"raised {error}")
        raise SystemExit(3) from None
    say("done")


def case_fails_to_close(loop: str) -> None:
    logging.basicConfig(stream=sys.stdout, format="log %(message)s")
    master = Master(timeout=PATIENCE)
    for part in (Part("a"), FailsToClose("b"), Last("c")):
        master.add(part)
    wait_for(master, loop)
    say("done")


def case_signal_in_another_thread(loop: str) -> None:
    """The main thread sleeps in its selector, and the signal does not interrupt it."""
    master = Master(timeout=PATIENCE)
    master.add(Last("a"))

    def hear() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        threading.Event().wait()

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=hear, daemon=True).start()
    wait_for(master, loop)
    say("done")


def case_wakeup_taken_over(loop: str) -> None:
    """The loop takes the wake-up descriptor for itself: the handlers are still there."""
    master = Master(timeout=PATIENCE)

    class Takes(Last):
        async def start(self) -> None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, say, "heard")
            await super().start()

    master.add(Takes("a"))
    wait_for(master, loop)
    say("done")


def case_other_signals(loop: str) -> None:
    """A handler that the program gave to its loop is called as before."""

    async def serve() -> None:
        heard = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, heard.set)
        master = Master(timeout=PATIENCE)
        master.add(Last("a"))

        async def listen() -> None:
            await heard.wait()
            say("heard")
            master.stop()

        await asyncio.gather(master.wait(), listen())

    if loop == "uvloop":
        uvloop.run(serve())
    else:
        asyncio.run(serve())
    say("done")


def case_fork(loop: str) -> None:
    """A forked child dies of its own signal, and its parent does not hear of it."""
    master = Master(timeout=PATIENCE)

    class Forks(Part):
        async def start(self) -> None:
            child = os.fork()
            if child == 0:
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(PATIENCE)
                finally:
                    os._exit(0)
            _, status = os.waitpid(child, 0)
            say(f"child died of {signal.Signals(os.WTERMSIG(status)).name}")

    for part in (Forks("a"), Last("b")):
        master.add(part)
    wait_for(master, loop)
    say("done")


def case_last_words() -> None:
    """What was printed is written, though a lock of the logging is held for ever."""
    handler = logging.StreamHandler(sys.stdout)
    logging.getLogger().addHandler(handler)

    def hold() -> None:
        handler.acquire()
        threading.Event().wait()

    class HoldsLock(Last):
        async def close(self) -> None:
            print("not flushed by us", end="")
            threading.Thread(target=hold, daemon=True).start()
            await asyncio.Event().wait()

    master = Master(timeout=0.2)
    master.add(HoldsLock("a"))
    asyncio.run(master.wait())


CASES: dict[str, Callable[..., None]] = {
    name.removeprefix("case_"): function
    for name, function in list(globals().items())
    if name.startswith("case_")
}


class Child:
    """A process of CASES; what it says is read as it comes."""

    def __init__(self, *arguments: object, prefix: tuple[str, ...] = ()) -> None:
        self.said: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.process = subprocess.Popen(
            [*prefix, sys.executable, __file__, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"},
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def until(self, text: str) -> None:
        """Wait for a line."""
        while not self.said or self.said[-1] != text:
            line = self._lines.get(timeout=PATIENCE)
            assert line is not None, f"it ended without {text!r}: {self.said}, {self.errors()}"
            self.said.append(line)

    def signal(self, number: signal.Signals) -> float:
        self.process.send_signal(number)
        return time.monotonic()

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def ends(self) -> int:
        code = self.process.wait(PATIENCE)
        while (line := self._lines.get(timeout=PATIENCE)) is not None:
            self.said.append(line)
        return code

    def reap(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


@contextmanager
def child(*arguments: object, prefix: tuple[str, ...] = ()) -> Iterator[Child]:
    process = Child(*arguments, prefix=prefix)
    try:
        yield process
    finally:
        process.reap()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_in_reverse_order(number: signal.Signals, loop: str) -> None:
    with child("orderly", loop, PATIENCE) as process:
        process.until("ready")
        process.signal(number)
        assert process.ends() == 0
        assert process.said == [
            *("start a", "start b", "start c", "ready"),
            *("close c", "close b", "close a", "done"),
        ]
        assert process.errors() == ""


@pytest.mark.parametrize("loop", LOOPS)
def test_the_watchdog_is_silent_after_an_orderly_stop(loop: str) -> None:
    with child("lives_on", loop) as process:
        process.until("ready")
        process.signal(signal.SIGTERM)
        assert process.ends() == 0
        assert process.said[-2:] == ["close a", "done"]
        assert process.errors() == ""


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", list(HANGS))
def test_what_hangs_is_forced(kind: str, number: signal.Signals, loop: str) -> None:
    with child("hang", kind, loop, 0.5) as process:
        process.until("ready")
        asked = process.signal(number)
        assert process.ends() == FORCED
        assert time.monotonic() - asked >= 0.5
        closed = [line for line in process.said if line.startswith("close")]
        # Where the loop still runs, those that had no turn yet get theirs.
        late = [] if kind.startswith("blocks") else ["close a", "close b"]
        assert closed == ["close d", "close c", *late]
        assert "came back" not in process.said
        assert process.errors() == (
            "domi_fast: forced to exit: not stopped within 0.5 s: <Part c> in close()\n"
        )


def test_eight_seconds_are_the_default() -> None:
    assert Master().timeout == 8.0
    with child("hang", "swallows", "uvloop", 8) as process:
        process.until("ready")
        asked = process.signal(signal.SIGTERM)
        assert process.ends() == FORCED
        assert 8.0 <= time.monotonic() - asked < 12.0


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", list(HANGS))
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_forces_at_once(kind: str, second: signal.Signals, loop: str) -> None:
    with child("hang", kind, loop, 10 * PATIENCE) as process:
        process.until("ready")
        process.signal(signal.SIGINT)
        process.until("close c")
        time.sleep(0.1)  # signals that come closer together than 50 ms are taken for one
        process.signal(second)
        assert process.ends() == FORCED
        assert process.errors() == (f"domi_fast: forced to exit: a second signal ({second.name})\n")


def test_one_signal_that_comes_twice_is_one() -> None:
    # As `timeout` does: to the process, then to its group. Slow takes 0.2 s, so it is under way.
    with child("orderly", "asyncio", PATIENCE) as process:
        process.until("ready")
        process.signal(signal.SIGTERM)
        process.signal(signal.SIGINT)
        process.signal(signal.SIGTERM)
        assert process.ends() == 0
        assert process.said[-1] == "done"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run(number: signal.Signals) -> None:
    with child("run", PATIENCE) as process:
        process.until("ready")
        process.signal(number)
        assert process.ends() == 0
        assert process.said[-3:] == ["close b", "close a", "done"]
        assert process.errors() == ""


WITHOUT_UVLOOP = """
import sys
sys.modules["uvloop"] = None        # what makes its import fail
import asyncio, os, signal
from domi_fast import Node, run

class Asker:
    async def start(self):
        await asking.wait_subscribed(50, timeout=5)
        print(type(asyncio.get_running_loop()).__module__, await asking.request(50, b"right"))
        os.kill(os.getpid(), signal.SIGTERM)
    async def close(self):
        print("closed")

answering, asking = (Node(name, registry="memory://without") for name in ("server", "client"))
answering.subscribe(50, lambda context: context.reply(context.data))
run(answering, asking, Asker())
"""


def test_run_without_uvloop() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_UVLOOP],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["asyncio.unix_events b'right'", "closed"]


def test_run_a_node(sqlite_url: str) -> None:
    with child("node", sqlite_url) as process:
        process.until("ready")
        process.signal(signal.SIGTERM)
        assert process.ends() == 0
        assert process.said[-1] == "done"
        assert process.errors() == ""


@pytest.mark.parametrize("loop", LOOPS)
def test_stop_from_a_thread(loop: str) -> None:
    with child("stop_from_thread", loop) as process:
        process.until("ready")
        process.tell()
        assert process.ends() == 0
        assert process.said[-2:] == ["close a", "done"]


@pytest.mark.parametrize("loop", LOOPS)
def test_stop_from_a_thread_while_the_loop_is_blocked(loop: str) -> None:
    with child("blocked_and_stopped_from_thread", loop) as process:
        process.until("blocked")
        process.tell()
        assert process.ends() == FORCED
        # No component is blamed: they have all started, and none was told to close.
        assert process.errors() == (
            "domi_fast: forced to exit: not stopped within 0.3 s: the loop\n"
        )


@pytest.mark.parametrize("loop", LOOPS)
def test_wait_off_the_main_thread(loop: str) -> None:
    with child("off_the_main_thread", loop) as process:
        process.until("ready")
        process.tell()
        assert process.ends() == 0
        assert process.said[-3:] == ["close b", "close a", "done"]


@pytest.mark.parametrize("loop", LOOPS)
def test_when_one_cannot_start_those_that_have_are_stopped(loop: str) -> None:
    with child("start", "fails", loop) as process:
        assert process.ends() == 3
        assert process.said == ["start a", "start b", "close a", "raised no such device"]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_during_the_start(number: signal.Signals, loop: str) -> None:
    with child("start", "slow", loop) as process:
        process.until("ready")
        process.signal(number)
        assert process.ends() == 0
        assert process.said == ["start a", "start b", "ready", "cancelled b", "close a", "done"]


def test_what_starts_in_spite_of_the_stop_is_closed() -> None:
    with child("start", "stubborn", "asyncio") as process:
        process.until("ready")
        process.signal(signal.SIGTERM)
        assert process.ends() == 0
        assert process.said[3:] == ["started b", "close b", "close a", "done"]


def test_a_start_that_hangs_is_forced_and_the_others_closed() -> None:
    with child("start", "never", "asyncio") as process:
        process.until("ready")
        process.signal(signal.SIGTERM)
        assert process.ends() == FORCED
        assert process.said == ["start a", "start b", "ready", "close a"]
        assert "<Part b> in start()" in process.errors()


@pytest.mark.parametrize("loop", LOOPS)
def test_an_error_in_close_is_logged_and_the_others_go_on(loop: str) -> None:
    with child("fails_to_close", loop) as process:
        process.until("ready")
        process.signal(signal.SIGTERM)
        assert process.ends() == 0
        assert "log <Part b> did not close in order" in process.said
        assert "OSError: the disk is full" in process.said
        assert process.said[-2:] == ["close a", "done"]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    "case", ["signal_in_another_thread", "wakeup_taken_over", "other_signals", "fork"]
)
def test_signals_that_take_another_way(case: str, loop: str) -> None:
    with child(case, loop) as process:
        process.until("ready")
        process.signal(signal.SIGUSR1 if case == "other_signals" else signal.SIGTERM)
        assert process.ends() == 0
        assert process.said[-1] == "done"
        assert ("child died of SIGTERM" in process.said) == (case == "fork")


def test_the_last_words_are_written_and_hold_nothing_up() -> None:
    with child("last_words") as process:
        process.until("ready")
        process.signal(signal.SIGTERM)
        assert process.ends() == FORCED
        assert process.said[-1] == "not flushed by us"
        assert "forced to exit" in process.errors()


class Recorder:
    """A component inside the test's own process."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name = name
        self.events = events

    async def start(self) -> None:
        self.events.append(f"start {self.name}")

    async def close(self) -> None:
        self.events.append(f"close {self.name}")


async def test_stop_before_wait_starts_nothing() -> None:
    events: list[str] = []
    master = Master()
    master.add(Recorder("a", events))
    master.stop()
    await master.wait()
    assert events == []


async def test_the_originals_names() -> None:
    events: list[str] = []
    master = Master()
    assert Master.run_assembly is Master.add
    assert Master.guard is Master.wait
    part = Recorder("a", events)
    assert master.run_assembly(part) is part
    asyncio.get_running_loop().call_soon(master.stop)
    await master.guard()
    assert events in ([], ["start a", "close a"])


async def test_cancelling_wait_stops_in_order_and_cannot_be_hurried() -> None:
    events: list[str] = []
    started, closing, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    class Slow(Recorder):
        async def start(self) -> None:
            await super().start()
            started.set()

        async def close(self) -> None:
            closing.set()
            await go_on.wait()
            await super().close()

    master = Master(timeout=PATIENCE)
    master.add(Recorder("a", events))
    master.add(Slow("b", events))
    waiting = asyncio.ensure_future(master.wait())
    await started.wait()
    waiting.cancel()
    await closing.wait()
    waiting.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert events == ["start a", "start b", "close b", "close a"]


async def test_cancelling_wait_during_the_stop_waits_for_it() -> None:
    events: list[str] = []
    started, closing, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    class Slow(Recorder):
        async def start(self) -> None:
            await super().start()
            started.set()

        async def close(self) -> None:
            closing.set()
            await go_on.wait()
            await super().close()

    master = Master(timeout=PATIENCE)
    master.add(Recorder("a", events))
    master.add(Slow("b", events))
    waiting = asyncio.ensure_future(master.wait())
    await started.wait()
    master.stop()
    await closing.wait()
    waiting.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert events == ["start a", "start b", "close b", "close a"]


async def test_cancelling_wait_during_a_start() -> None:
    events: list[str] = []
    starting = asyncio.Event()

    class Starts(Recorder):
        async def start(self) -> None:
            starting.set()
            await asyncio.Event().wait()

    master = Master(timeout=PATIENCE)
    for part in (Recorder("a", events), Starts("b", events), Recorder("c", events)):
        master.add(part)
    waiting = asyncio.ensure_future(master.wait())
    await starting.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert events == ["start a", "close a"]


async def test_a_start_that_cancels_itself_is_an_error() -> None:
    class Cancels(Recorder):
        async def start(self) -> None:
            raise asyncio.CancelledError

    events: list[str] = []
    master = Master()
    master.add(Recorder("a", events))
    master.add(Cancels("b", events))
    with pytest.raises(RuntimeError, match=r"cancelled its own start\(\)"):
        await master.wait()
    assert events == ["start a", "close a"]


async def test_a_start_that_is_not_async() -> None:
    class Plain:
        def start(self) -> None:
            pass

        def close(self) -> None:
            pass

    part: Any = Plain()
    master = Master()
    master.add(part)
    with pytest.raises(TypeError, match=r"start\(\) returned None, it must be async"):
        await master.wait()


async def test_a_master_waits_once_and_takes_nothing_afterwards() -> None:
    master = Master()
    master.stop()
    await master.wait()
    with pytest.raises(RuntimeError, match="waits once"):
        await master.wait()
    with pytest.raises(RuntimeError, match="added before wait"):
        master.add(Recorder("a", []))


def test_what_is_not_a_component() -> None:
    master = Master()
    for wrong in (None, 7, object(), Node, asyncio.Event()):
        part: Any = wrong
        with pytest.raises(TypeError, match="is not a component"):
            master.add(part)
    part = master.add(Recorder("a", []))
    with pytest.raises(ValueError, match="added before"):
        master.add(part)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf")])
def test_timeouts_that_make_no_sense(timeout: float) -> None:
    with pytest.raises(ValueError, match="seconds above 0"):
        Master(timeout=timeout)
    with pytest.raises(ValueError, match="seconds above 0"):
        run(Recorder("a", []), timeout=timeout)


def test_run_wants_components() -> None:
    with pytest.raises(TypeError, match="at least one component"):
        run()
    wrong: Any = Node
    with pytest.raises(TypeError, match="is not a component"):
        run(wrong)


async def test_run_inside_a_loop() -> None:
    with pytest.raises(RuntimeError, match=r"await Master\(\).wait\(\) there"):
        run(Recorder("a", []))


if __name__ == "__main__":
    CASES[sys.argv[1]](*sys.argv[2:])
