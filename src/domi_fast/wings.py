"""Wings: what stands on a node, uses its public API, and ends before the node does."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol

log = logging.getLogger(__name__)


class Wing(Protocol):
    """What :meth:`Node.attach <domi_fast.Node.attach>` takes."""

    async def drain(self) -> None:
        """Finish what was begun and hand over the rest, while the node still serves.

        It is cancelled at the draining's deadline, and when the node is closed.
        """

    async def close(self) -> None:
        """End, while the node can still send. Idempotent, and without a ``drain`` before it too.

        It is cancelled after the node's ``drain_timeout``.
        """


class Wings:
    """The wings of one node. Belongs to the node's loop."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._wings: list[Wing] = []
        # What each that is waited for sets when it ends, or when it waits for the node itself.
        self._awaited: dict[asyncio.Task[None], asyncio.Future[None]] = {}

    def attach(self, wing: Wing) -> None:
        """Once: one that is attached already stays so."""
        if not any(each is wing for each in self._wings):
            self._wings.append(wing)

    def detach(self, wing: Wing) -> None:
        """One that is not attached stays so."""
        self._wings = [each for each in self._wings if each is not wing]

    def let_go(self, task: asyncio.Task[Any]) -> None:
        """This task waits for the node to end: the node does not wait for it."""
        over = self._awaited.get(task)
        if over is not None and not over.done():
            over.set_result(None)

    async def drain(self) -> None:
        """Drain all, together. Whoever waits here says for how long."""
        await self._all("drain", None)

    async def close(self, timeout: float) -> None:
        """Close all, together, once what drains has stopped.

        :param timeout: seconds; who has not closed then is cancelled, and has as long to obey.
        """
        draining = [task for task, over in self._awaited.items() if not over.done()]
        self._cancel(draining)
        if draining:
            await asyncio.wait(draining, timeout=timeout)
        await self._all("close", timeout)

    async def _all(self, verb: str, timeout: float | None) -> None:
        begun = [self._begin(verb, wing) for wing in self._wings]
        if not begun:
            return
        try:
            await asyncio.wait([self._awaited[task] for task in begun], timeout=timeout)
        finally:
            late = [
                task for task in begun if task in self._awaited and not self._awaited[task].done()
            ]
            self._cancel(late)
        if late:
            log.warning(
                "%s: %d wings did not %s within %g s", self._node, len(late), verb, timeout or 0.0
            )
            await asyncio.wait(late, timeout=timeout)

    def _begin(self, verb: str, wing: Wing) -> asyncio.Task[None]:
        task = asyncio.ensure_future(self._run(verb, wing))
        self._awaited[task] = asyncio.get_running_loop().create_future()

        def ended(_: object) -> None:
            self.let_go(task)
            del self._awaited[task]

        task.add_done_callback(ended)
        return task

    async def _run(self, verb: str, wing: Wing) -> None:
        try:
            await (wing.drain() if verb == "drain" else wing.close())
        except Exception:
            log.exception("%s: a wing failed to %s: %r", self._node, verb, wing)

    def _cancel(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
