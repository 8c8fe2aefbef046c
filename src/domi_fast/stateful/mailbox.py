"""Mailbox: what waits for one group, handled one at a time in the order of arrival."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final

from ..gateway.wire import UserMessage

# Messages handled before the loop has a turn.
BUDGET: Final = 64


class Backlog(deque[UserMessage]):
    """Messages that wait, and their bytes.

    :param limit: messages at which it is full.
    :param most: bytes at which it is full.
    """

    def __init__(self, limit: int, most: int) -> None:
        super().__init__()
        self._limit = limit
        self._most = most
        self._bytes = 0

    @property
    def full(self) -> str:
        """How much waits, for people, where no more may; otherwise nothing."""
        if len(self) < self._limit and self._bytes < self._most:
            return ""
        return f"{len(self)} messages of {self._bytes} bytes wait"

    def append(self, message: UserMessage) -> None:
        self._bytes += _size(message)
        super().append(message)

    def popleft(self) -> UserMessage:
        message = super().popleft()
        self._bytes -= _size(message)
        return message

    def clear(self) -> None:
        self._bytes = 0
        super().clear()


def _size(message: UserMessage) -> int:
    return len(message.data) + len(message.identity)


class Mailbox:
    """Hands each message to ``handle``; a coroutine that it returns is run as a task, and the next
    message waits for its end. What ``handle`` raises goes to whoever put the message, and the next
    is handled all the same. Belongs to the loop of its zone.

    While it is held, as it is at first, everything waits.

    :param backlog: an empty one.
    """

    def __init__(
        self,
        handle: Callable[[UserMessage], Coroutine[Any, Any, None] | None],
        backlog: Backlog,
    ) -> None:
        self._handle = handle
        self._waiting = backlog
        self._holds = 1
        self._busy = False
        self._scheduled = False
        self._ended: list[asyncio.Future[None]] = []
        self.task: asyncio.Task[None] | None = None
        """Of the ``async def`` handler that runs."""
        self.cancelled = False
        """Whether that task was cancelled by :meth:`cancel`."""

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def full(self) -> str:
        """Why a user is to send no more: how much waits; or nothing. It takes all the same."""
        return self._waiting.full

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._busy and not self._waiting

    def put(self, message: UserMessage) -> None:
        """Handle it, at once where nothing is before it."""
        self._waiting.append(message)
        self._pump()

    def extend(self, messages: Iterable[UserMessage]) -> None:
        """Behind what waits."""
        for message in messages:
            self._waiting.append(message)
        self._pump()

    def take_all(self) -> list[UserMessage]:
        """All that waits, which is nobody's any more."""
        taken = list(self._waiting)
        self._waiting.clear()
        return taken

    async def hold(self) -> None:
        """Begin nothing until :meth:`release`; returns when what runs has ended."""
        self._holds += 1
        try:
            while self._busy:
                ended = asyncio.get_running_loop().create_future()
                self._ended.append(ended)
                await ended
        except BaseException:
            self.release()
            raise

    def stop(self) -> None:
        """Begin nothing more, ever."""
        self._holds += 1

    def release(self) -> None:
        self._holds -= 1
        self._pump()

    def cancel(self) -> None:
        """Cancel the handler that runs."""
        if self.task is not None:
            self.cancelled = True
            self.task.cancel()

    def _run(self, message: UserMessage) -> None:
        self._busy = True
        try:
            work = self._handle(message)
        except BaseException:
            self._end()
            raise
        if work is None:
            self._end()
        else:
            self.task = asyncio.get_running_loop().create_task(work)
            self.task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self.task = None
        self._end()
        self._pump()

    def _end(self) -> None:
        self._busy = False
        for ended in self._ended:
            if not ended.done():
                ended.set_result(None)
        self._ended.clear()

    @property
    def _ready(self) -> bool:
        return bool(self._waiting) and not self._busy and not self._holds

    def _pump(self) -> None:
        """Handle what waits. A handler that puts something itself finds it busy: its turn comes
        when that handler has ended.
        """
        left = BUDGET
        try:
            while self._ready and left and not self._scheduled:
                left -= 1
                self._run(self._waiting.popleft())
        finally:
            if self._ready and not self._scheduled:
                self._scheduled = True
                asyncio.get_running_loop().call_soon(self._pump_on)

    def _pump_on(self) -> None:
        self._scheduled = False
        self._pump()
