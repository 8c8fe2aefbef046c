"""Master: starts components, waits for a signal, and stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn, Protocol, TypeVar, runtime_checkable

import uvloop

log = logging.getLogger("domi_fast")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FORCED_EXIT = 1


@runtime_checkable
class Component(Protocol):
    """What a :class:`Master` supervises: a node, a serial scheduler, anything of this shape."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...


C = TypeVar("C", bound=Component)


class Master:
    """Supervises components: starts them in the order of ``add``, stops them in the reverse.

    SIGINT and SIGTERM stop them. What has not stopped ``timeout`` seconds after that is forced,
    and a second signal forces at once: the process ends with exit code 1, whatever still runs.

    :param timeout: seconds for an orderly stop.

    Signals can be had in the main thread only; elsewhere ``stop()`` does their work.
    """

    def __init__(self, *, timeout: float = 8.0) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout {timeout}: seconds above 0 are allowed")
        self.timeout = timeout
        self._components: list[Component] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._stop_asked = False
        self._watchdog: threading.Timer | None = None

    def add(self, component: C) -> C:
        """Have the component started (by ``wait``) and stopped. Returns it.

        :raises TypeError: it has no ``start`` and ``close``.
        """
        if not isinstance(component, Component):
            raise TypeError(
                f"{component!r} is not a component: it needs async methods start() and close()"
            )
        self._components.append(component)
        return component

    def stop(self) -> None:
        """Begin the orderly stop; from any thread and from signal handlers."""
        self._stop_asked = True
        if self._loop is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._set_stopping)

    def _set_stopping(self) -> None:
        if self._stopping is not None:
            self._stopping.set()

    async def wait(self) -> None:
        """Start the components, wait for a signal or ``stop()``, and stop them.

        When one cannot start, those that have started are stopped and its error is raised.
        """
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        if self._stop_asked:
            self._stopping.set()
        previous = self._take_signals()
        started: list[Component] = []
        try:
            try:
                for component in self._components:
                    started.append(component)
                    if await self._start_one(component):
                        break
                else:
                    await self._stopping.wait()
            finally:
                self._arm_watchdog()
                for component in reversed(started):
                    await self._close_one(component)
        finally:
            if self._watchdog is not None:
                self._watchdog.cancel()
            for number, handler in previous.items():
                signal.signal(number, handler)

    run_assembly = add
    guard = wait

    async def _start_one(self, component: Component) -> bool:
        """Whether the stop was asked for before the start was complete."""
        assert self._stopping is not None
        start = asyncio.ensure_future(component.start())
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
            if start.done():
                start.result()
                return self._stopping.is_set()
            return True
        finally:
            for task in (start, stop):
                task.cancel()
            await asyncio.gather(start, stop, return_exceptions=True)

    async def _close_one(self, component: Component) -> None:
        try:
            await component.close()
        except Exception as error:
            log.error("%r did not close in order", component, exc_info=error)

    # ------------------------------------------------------------------------------------- signals

    def _take_signals(self) -> dict[signal.Signals, Any]:
        if threading.current_thread() is not threading.main_thread():
            return {}
        # Python's own handlers, not the loop's: they also run while a callback holds up the loop.
        return {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop_asked:
            _force(f"a second signal ({signal.Signals(number).name})")
        log.info("%s: stopping", signal.Signals(number).name)
        self._arm_watchdog()
        self.stop()

    def _arm_watchdog(self) -> None:
        # A thread, because a component that hangs may hang the loop with it.
        if self._watchdog is None:
            self._watchdog = threading.Timer(
                self.timeout, _force, [f"not stopped within {self.timeout:g} s"]
            )
            self._watchdog.daemon = True
            self._watchdog.start()


def _force(why: str) -> NoReturn:
    print(f"domi_fast: forced to exit: {why}", file=sys.stderr, flush=True)
    logging.shutdown()
    os._exit(FORCED_EXIT)


def run(*components: Component, timeout: float = 8.0) -> None:
    """Run the components on uvloop until SIGINT or SIGTERM; :class:`Master` in one line.

    :param timeout: seconds for the orderly stop.
    """
    master = Master(timeout=timeout)
    for component in components:
        master.add(component)
    if not components:
        raise TypeError("run() needs at least one component, for example run(Node('server'))")
    uvloop.run(master.wait())
