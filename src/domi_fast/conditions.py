"""What tasks wait for: conditions that others make true."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ._core import Router
from .errors import DomiError


class Conditions:
    """Conditions that somebody waits for. Belongs to the loop's thread.

    :ivar waiting: how many wait.
    """

    def __init__(self, router: Router) -> None:
        self._router = router
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._closed = False

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    def changed(self) -> None:
        """Something has changed: whose condition holds now need not wait any longer."""
        waiters, self._waiters = self._waiters, []
        for condition, future in waiters:
            if future.done():
                continue
            if condition():
                future.set_result(None)
            else:
                self._waiters.append((condition, future))

    async def wait_for(self, condition: Callable[[], bool], timeout: float | None) -> None:
        """Wait until the condition holds, ``timeout`` seconds at most.

        Raises asyncio.TimeoutError, and DomiError when the node closes.
        """
        if self._closed:
            raise DomiError("the node was closed")
        if condition():
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = None
        if timeout is not None:
            timer = self._router.call_later(timeout, lambda: _expire(future))
        self._waiters.append((condition, future))
        try:
            await future
        finally:
            if timer is not None:
                timer.cancel()
            self._waiters = [waiter for waiter in self._waiters if waiter[1] is not future]

    def close(self) -> None:
        """Nobody is to begin waiting: the node closes."""
        self._closed = True

    def fail(self) -> None:
        """Nothing will change any more: who waits is told."""
        for _, future in self._waiters:
            if not future.done():
                future.set_exception(DomiError("the node was closed"))


def _expire(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_exception(asyncio.TimeoutError())
