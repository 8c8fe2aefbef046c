"""Master: starts components, waits for a signal, and stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
import os
import select
import signal
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any, NoReturn, Protocol, TypeVar, runtime_checkable

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FORCED_EXIT = 1

# Two signals that come closer together than this are one: `timeout` sends its signal to the process
# and to its group, and a terminal's Ctrl-C may come with a parent's.
ONE_SIGNAL = 0.05
# Once the time for an orderly stop is over: seconds for the loop to show that it runs at all, then
# for the components that have had no turn yet.
LOOP_ANSWERS = 0.25
LATE_CLOSE = 0.75


@runtime_checkable
class Component(Protocol):
    """What a :class:`Master` supervises: a node, a serial scheduler, anything of this shape.

    As with ``__aenter__``, a ``start`` that raises or is cancelled leaves nothing to close.
    """

    async def start(self) -> None: ...

    async def close(self) -> None: ...


@runtime_checkable
class Leaver(Protocol):
    """A component that may end by itself, as a node does that was drained."""

    async def wait_closed(self) -> None:
        """Wait until it is closed, by whomever."""


C = TypeVar("C", bound=Component)


class Master:
    """Supervises components: starts them in the order of ``add``, stops them in the reverse.

    Nodes, and others that are a :class:`Leaver`, may leave by themselves; when all of them have,
    the rest are stopped.

    SIGINT, SIGTERM and ``stop()`` stop them. What has not stopped ``timeout`` seconds after that is
    forced: the components that had no turn yet are told to close, with a second to do it in, and
    the process ends with exit code 1, whatever still runs. A second signal forces at once.

    Signals can be had in the main thread only; elsewhere ``stop()`` does their work.

    :param timeout: seconds for an orderly stop.
    """

    def __init__(self, *, timeout: float = 8.0) -> None:
        if not (timeout > 0 and math.isfinite(timeout)):
            raise ValueError(f"timeout {timeout}: seconds above 0 are allowed")
        self.timeout = timeout
        self._components: list[Component] = []
        self._waited = False
        self._stop_asked = False
        self._stopping: asyncio.Event
        self._given_up: asyncio.Event
        self._sentry: _Sentry | None = None
        self._busy_with = ""

    def add(self, component: C) -> C:
        """Have the component started (by ``wait``) and stopped. Returns it.

        :raises TypeError: it has no ``start`` and ``close``, or is a class.
        :raises ValueError: it was added before.
        :raises RuntimeError: ``wait`` has begun.
        """
        if isinstance(component, type) or not isinstance(component, Component):
            raise TypeError(
                f"{component!r} is not a component: it needs async methods start() and close()"
            )
        if any(component is other for other in self._components):
            raise ValueError(f"{component!r} was added before")
        if self._waited:
            raise RuntimeError("components are added before wait()")
        self._components.append(component)
        return component

    def stop(self) -> None:
        """Begin the orderly stop; from any thread and from signal handlers, before and after too.

        A second call does nothing.
        """
        self._stop_asked = True
        sentry = self._sentry
        if sentry is not None:
            sentry.tell(_STOP)

    async def wait(self) -> None:
        """Start the components, wait for a signal or ``stop()``, and stop them.

        When one cannot start, those that have started are stopped and its error is raised; when
        this is cancelled, they are stopped too. An error in a ``close`` is logged, and the others
        go on.

        :raises RuntimeError: it was called before: a Master serves once.
        """
        if self._waited:
            raise RuntimeError("a Master waits once: make another one")
        self._waited = True
        self._stopping = asyncio.Event()
        self._given_up = asyncio.Event()
        self._sentry = sentry = _Sentry(self, asyncio.get_running_loop())
        try:
            if self._stop_asked:
                sentry.tell(_STOP)
                return
            started: list[Component] = []
            watching = None
            try:
                for component in self._components:
                    await self._start_one(component, started)
                watching = asyncio.ensure_future(self._watch_leavers(started))
                await self._stopping.wait()
            finally:
                if watching is not None:
                    watching.cancel()
                self._stopping.set()
                sentry.tell(_STOP)
                await self._close_all(started)
        finally:
            self._sentry = None
            sentry.dismiss()

    async def _watch_leavers(self, started: list[Component]) -> None:
        leavers = [component for component in started if isinstance(component, Leaver)]
        if leavers:
            await asyncio.gather(*[leaver.wait_closed() for leaver in leavers])
            self._begin_stop("every node has left")

    run_assembly = add
    guard = wait

    async def _start_one(self, component: Component, started: list[Component]) -> None:
        """Start it, unless the stop is asked for before or meanwhile; note it if it has started."""
        if self._stopping.is_set():
            return
        self._busy_with = f"{component!r} in start()"
        start = asyncio.ensure_future(_awaitable(component.start(), component, "start"))
        stop = asyncio.ensure_future(self._stopping.wait())
        cancelled = False
        try:
            await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            start.cancel()
            # Its end is waited for: until then it may hold what the others need to close.
            while not start.done() and not self._given_up.is_set():
                cancelled |= not await self._settled(start)
            if start.done():
                self._busy_with = ""
            if start.done() and not start.cancelled() and start.exception() is None:
                started.append(component)
        if cancelled:
            raise asyncio.CancelledError
        if start.cancelled() and not self._stopping.is_set():
            raise RuntimeError(f"{component!r} cancelled its own start()")
        if start.done() and not start.cancelled():
            start.result()

    async def _close_all(self, components: list[Component]) -> None:
        # Cancellation has to wait: it would leave components open. The sentry limits the time.
        cancelled = False
        closers: list[asyncio.Future[None]] = []
        hanging = []  # kept, or the collector would find them pending and say so
        for component in reversed(components):
            in_time = not self._given_up.is_set()
            if in_time:
                self._busy_with = f"{component!r} in close()"
            closer = asyncio.ensure_future(self._close_one(component))
            while not closer.done() and not self._given_up.is_set():
                cancelled |= not await self._settled(closer)
            if in_time and not closer.done():
                closer.cancel()  # this one hangs; the others have had no turn yet
                hanging.append(closer)
            else:
                closers.append(closer)
        while self._given_up.is_set():  # until the sentry ends the process
            while pending := [closer for closer in closers if not closer.done()]:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait(pending)
            if self._sentry is not None:
                self._sentry.tell(_CLOSED_LATE)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        if cancelled:
            raise asyncio.CancelledError

    async def _close_one(self, component: Component) -> None:
        try:
            await _awaitable(component.close(), component, "close")
        except Exception as error:
            log.error("%r did not close in order", component, exc_info=error)

    async def _settled(self, work: asyncio.Future[Any]) -> bool:
        """Wait until the work has ended or was given up; False when this was cancelled."""
        given_up = asyncio.ensure_future(self._given_up.wait())
        try:
            await asyncio.wait({work, given_up}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            return False
        finally:
            given_up.cancel()
        return True

    # What the sentry has the loop do.

    def _begin_stop(self, reason: str) -> None:
        if not self._stopping.is_set():
            log.info("stopping: %s", reason)
            self._stopping.set()

    def _give_up(self) -> None:
        if self._sentry is not None:
            self._sentry.tell(_GIVING_UP)
        self._given_up.set()


async def _awaitable(result: Awaitable[None], component: Component, method: str) -> None:
    if not inspect.isawaitable(result):
        raise TypeError(
            f"{component!r} is not a component: {method}() returned {result!r}, it must be async"
        )
    await result


# What the sentry is told, a byte each. Signals are 1-64; with this bit the byte comes from Python's
# handler, without it from the interpreter's own, which writes to the wake-up descriptor.
_LAST_SIGNAL = 64
_BY_HANDLER = 0x80
_STOP, _GIVING_UP, _CLOSED_LATE, _DISMISSED = range(_LAST_SIGNAL + 1, _LAST_SIGNAL + 5)
_HEARD = {number | path for number in SIGNALS for path in (0, _BY_HANDLER)}


class _Sentry:
    """Hears signals and sees to deadlines in a thread of its own, which no hanging loop can stop.

    Everything comes to it as bytes through a pipe: writing one is safe in a signal handler, and
    Python's wake-up descriptor writes one even while the main thread is stuck in C. The handlers
    that are installed beside it count when somebody else has taken that descriptor over.
    """

    def __init__(self, master: Master, loop: asyncio.AbstractEventLoop) -> None:
        self._master = master
        self._loop = loop
        # Reentrant, because a signal handler may call Master.stop() at any point.
        self._lock = threading.RLock()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handlers: dict[signal.Signals, Any] = {}
        self._previous_fd = -1
        if threading.current_thread() is threading.main_thread():
            self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            for number in SIGNALS:
                self._handlers[number] = signal.signal(number, self._on_signal)
        self._thread = threading.Thread(target=self._watch, name="domi_fast sentry", daemon=True)
        self._thread.start()
        _sentries.add(self)

    def tell(self, what: int) -> None:
        """From any thread and from signal handlers; after the dismissal it does nothing."""
        with self._lock:
            if self._write >= 0:
                # A full pipe has enough signals in it.
                with contextlib.suppress(BlockingIOError):
                    os.write(self._write, bytes((what,)))

    def dismiss(self) -> None:
        """The stop is complete: give signals back and end the thread."""
        self._give_signals_back()
        self.tell(_DISMISSED)
        with self._lock:
            write, self._write = self._write, -1
            os.close(write)
        self._thread.join()
        os.close(self._read)

    def forked(self) -> None:
        """A forked child's signals are its own: the pipe and the loop are its parent's."""
        self._give_signals_back(forked=True)
        self._lock = threading.RLock()
        os.close(self._write)
        os.close(self._read)
        self._write = -1

    def _give_signals_back(self, *, forked: bool = False) -> None:
        _sentries.discard(self)
        if not self._handlers:
            return
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}
        current = signal.set_wakeup_fd(-1 if forked else self._previous_fd)
        if current not in (self._write, -1):
            signal.set_wakeup_fd(current)  # somebody else took it over, and keeps it

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.tell(number | _BY_HANDLER)

    # ---------------------------------------------------------------------------------- its thread

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        # One signal may be heard on both paths, at different times: the longer count is right.
        counts = {0: 0, _BY_HANDLER: 0}
        latest = {0: -math.inf, _BY_HANDLER: -math.inf}
        deadline = math.inf
        expired: Callable[[], float] = self._overdue
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                deadline = time.monotonic() + expired()
                expired = self._force_overdue
                continue
            if not poll.poll(None if left == math.inf else math.ceil(left * 1000)):
                continue
            for byte in os.read(self._read, 512):
                reason = ""
                if byte == _DISMISSED:
                    return
                if byte == _STOP:
                    reason = "stop() was called"
                elif byte == _GIVING_UP:
                    deadline = time.monotonic() + LATE_CLOSE
                elif byte == _CLOSED_LATE:
                    self._force_overdue()
                elif byte in _HEARD:
                    path, now = byte & _BY_HANDLER, time.monotonic()
                    if now - latest[path] > ONE_SIGNAL:
                        counts[path] += 1
                    latest[path] = now
                    reason = signal.Signals(byte & ~_BY_HANDLER).name
                    if max(counts.values()) > 1:
                        _force(f"a second signal ({reason})")
                if byte <= _LAST_SIGNAL:
                    self._pass_on(byte)
                if reason and deadline == math.inf:
                    self._master._stop_asked = True
                    deadline = time.monotonic() + self._master.timeout
                    self._in_loop(self._master._begin_stop, reason)

    def _in_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed under us
            self._loop.call_soon_threadsafe(function, *arguments)

    def _pass_on(self, byte: int) -> None:
        # The loop's own descriptor, or that of whoever had it before.
        if self._previous_fd >= 0:
            with contextlib.suppress(OSError):
                os.write(self._previous_fd, bytes((byte,)))

    def _overdue(self) -> float:
        self._in_loop(self._master._give_up)
        return LOOP_ANSWERS

    def _force_overdue(self) -> NoReturn:
        busy = self._master._busy_with or "the loop"
        _force(f"not stopped within {self._master.timeout:g} s: {busy}")


_sentries: weakref.WeakSet[_Sentry] = weakref.WeakSet()


def _forked() -> None:
    for sentry in list(_sentries):
        sentry.forked()


os.register_at_fork(after_in_child=_forked)


def _force(why: str) -> NoReturn:
    # Only the sentry's thread comes here. Whatever the last words have to wait for (a lock that a
    # thread holds for ever, a pipe that nobody reads), the process ends.
    words = threading.Thread(target=_last_words, args=(why,), daemon=True)
    words.start()
    words.join(0.5)
    os._exit(FORCED_EXIT)


def _last_words(why: str) -> None:
    os.write(2, f"domi_fast: forced to exit: {why}\n".encode(errors="replace"))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    logging.shutdown()


def run(*components: Component, timeout: float = 8.0) -> None:
    """Run the components on uvloop until SIGINT or SIGTERM; :class:`Master` in one line.

    On asyncio's own loop where uvloop cannot be imported.

    :param timeout: seconds for the orderly stop.
    :raises TypeError: there are no components, or one is none.
    :raises RuntimeError: a loop runs in this thread already; await ``Master().wait()`` there.
    """
    if not components:
        raise TypeError("run() needs at least one component, for example run(Node('server'))")
    master = Master(timeout=timeout)
    for component in components:
        master.add(component)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise RuntimeError("run() was called inside a running loop: await Master().wait() there")
    try:
        import uvloop
    except ImportError:
        asyncio.run(master.wait())
    else:
        uvloop.run(master.wait())
