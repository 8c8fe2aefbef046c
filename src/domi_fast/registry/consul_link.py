"""The way to a Consul agent: calls that run on the registry's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeAlias, TypeVar

from ..errors import RegistryError
from .consul_agent import Agent, load_consul
from .link import CLOSED, Calls
from .server_url import Endpoints

T = TypeVar("T")

Work: TypeAlias = Callable[[Agent], Coroutine[Any, Any, T]]


class AgentLink(Calls):
    """All calls of one registry, on its loop.

    Raises RegistryError when py-consul is not installed.
    """

    def __init__(self, endpoints: Endpoints) -> None:
        super().__init__()
        load_consul()
        self._endpoints = endpoints
        self._agent: Agent | None = None
        self._jobs: set[asyncio.Task[Any]] = set()
        self._abandoned = False
        self._ending: asyncio.Task[None] | None = None

    @property
    def agent(self) -> Agent:
        """Raises RegistryError once it is closed, and when the files of TLS are of no use."""
        if self._abandoned:
            raise RegistryError(CLOSED)
        if self._agent is None:
            self._agent = Agent(self._endpoints)
        return self._agent

    async def call(self, work: Work[T], *, again: bool, undo: Work[object] | None = None) -> T:
        """What ``work`` returns or raises, begun after whatever has to be done first.

        :param again: it may be done twice, so that one of which nobody knows is tried again.
        :param undo: is done afterwards if nobody will know of it: the call was cancelled or failed.
        """
        return await self._patiently(
            partial(self._begin, work),
            again=again,
            undo=None if undo is None else partial(self._begin, undo),
        )

    def undo(self, work: Work[object]) -> None:
        """Have it done, before any call that follows; nobody hears of its failure."""
        self._undo_later(partial(self._begin, work))

    def post(self, work: Work[object]) -> None:
        """Have it done; nobody waits for it, nor hears of its failure."""
        if not self._closed:
            self._begin(work)

    async def close(self) -> None:
        await super().close()
        if self._ending is not None:
            await self._ending

    def abandon(self) -> None:
        self._closed = self._abandoned = True
        for job in self._jobs:
            job.cancel()
        if self._agent is not None:
            self._ending = asyncio.ensure_future(self._agent.close())
            self._agent = None

    def _begin(self, work: Work[T]) -> asyncio.Future[T]:
        job = asyncio.ensure_future(self._attempt(work))
        self._jobs.add(job)
        job.add_done_callback(self._done)
        return job

    def _done(self, job: asyncio.Task[Any]) -> None:
        self._jobs.discard(job)
        if not job.cancelled():
            job.exception()  # nobody may wait to hear of it

    async def _attempt(self, work: Work[T]) -> T:
        try:
            return await work(self.agent)
        except asyncio.CancelledError:
            if self._abandoned:
                # Who waits for it was not cancelled.
                raise RegistryError(CLOSED) from None
            raise
