"""What a Consul agent is asked to do for a write, a claim or a lock: a look, and a transaction that
is done only if nothing has changed since; both again until that is so.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from .base import LeaseLost, NoKeyFree
from .consul_agent import Agent, Conflict, Op, Row, absent, delete, let_go, unchanged, write


def new_mark() -> int:
    """By which a write is known again that was done, and of which nobody has heard.

    It also makes a change of every write, where Consul would see none in the same value.
    """
    return secrets.randbits(62) + 1


async def change(
    agent: Agent, key: str, decide: Callable[[Row | None], Sequence[Op]]
) -> Row | None:
    """Do to a key what ``decide`` says of it as it is.

    Returns how it was left, or, if that was nothing or the key was deleted, how it was found.
    """
    while True:
        row = await agent.read(key)
        ops = decide(row)
        if not ops:
            return row
        try:
            return await agent.transact([absent(key) if row is None else unchanged(row), *ops])
        except Conflict:
            continue


async def put(
    agent: Agent, key: str, value: bytes, session: str | None, expect: int | None
) -> Row | None:
    """Write a key, held by the session or by none; None if it is not as expected."""
    mark = new_mark()

    def decide(row: Row | None) -> list[Op]:
        if row is None:
            return [] if expect is not None else [write(key, value, mark, session)]
        if row.mark == mark or expect not in {None, row.modified}:
            return []
        if row.session is None or row.session == session:
            return [write(key, value, mark, session)]
        free = let_go(row, value, mark)
        return [free] if session is None else [free, write(key, value, mark, session)]

    return _marked(await change(agent, key, decide), mark)


async def create(
    agent: Agent, key: str, value: bytes, session: str | None, mark: int
) -> Row | None:
    """Write a key, held by the session or by none; None if another write has made one."""

    def decide(row: Row | None) -> list[Op]:
        return [write(key, value, mark, session)] if row is None else []

    return _marked(await change(agent, key, decide), mark)


async def remove(agent: Agent, key: str, expect: int | None) -> bool | None:
    """Delete a key, and whether there was one; None if it is not as expected."""

    def decide(row: Row | None) -> list[Op]:
        return [] if row is None or expect not in {None, row.modified} else [delete(key)]

    row = await change(agent, key, decide)
    if row is None:
        return False
    return True if expect in {None, row.modified} else None


def _marked(row: Row | None, mark: int) -> Row | None:
    return row if row is not None and row.mark == mark else None


@dataclass(frozen=True)
class Hold:
    """A key that a session has held since it was created.

    :ivar epoch: Consul's index at that time.
    """

    key: str
    epoch: int
    session: str

    async def update(self, agent: Agent, value: bytes) -> bool:
        """Write another value, if it is still held."""
        mark = new_mark()

        def decide(row: Row | None) -> list[Op]:
            if not self._is_on(row) or _marked(row, mark):
                return []
            return [write(self.key, value, mark, self.session)]

        return self._is_on(await change(agent, self.key, decide))

    async def release(self, agent: Agent) -> None:
        """Delete it, if it is still held."""
        await change(agent, self.key, lambda row: [delete(self.key)] if self._is_on(row) else [])

    def _is_on(self, row: Row | None) -> bool:
        return row is not None and (row.created, row.session) == (self.epoch, self.session)


class Attempt:
    """To take the first of some keys that is free, for a session."""

    def __init__(self, session: str, keys: Sequence[str], value: bytes) -> None:
        self._session = session
        self._keys = keys
        # What all of them begin with, and so what the first and the last in order do.
        first, last = min(keys), max(keys)
        same = (a == b for a, b in zip(first, last, strict=False))
        self._prefix = first[: sum(takewhile(bool, same))]
        self._value = value
        self._mark = new_mark()
        self._tried: str | None = None

    async def take(self, agent: Agent) -> Hold:
        """Raises NoKeyFree and LeaseLost."""
        hold = await self._held(agent)
        while hold is None:
            taken = set(await agent.names(self._prefix))
            self._tried = next((key for key in self._keys if key not in taken), None)
            if self._tried is None:
                raise NoKeyFree(f"all {len(self._keys)} keys are held")
            row = await create(agent, self._tried, self._value, self._session, self._mark)
            hold = self._hold_of(row)
        return hold

    async def withdraw(self, agent: Agent) -> None:
        hold = await self._held(agent)
        if hold is not None:
            await hold.release(agent)

    async def _held(self, agent: Agent) -> Hold | None:
        """What an earlier try has taken."""
        if self._tried is None:
            return None
        return self._hold_of(_marked(await agent.read(self._tried), self._mark))

    def _hold_of(self, row: Row | None) -> Hold | None:
        return None if row is None else Hold(row.key, row.created, self._session)


class Place:
    """A place of a session in the queue for a lock: a key whose index says who came first.

    :param queue: what the keys of the queue begin with.
    """

    def __init__(self, session: str, lock: str, queue: str, value: bytes) -> None:
        self._session = session
        self._lock = lock
        self._queue = queue
        self._key = queue + secrets.token_hex(16)
        self._value = value
        self._mark = new_mark()

    async def enter(self, agent: Agent) -> None:
        """Raises LeaseLost."""
        await create(agent, self._key, b"", self._session, self._mark)

    async def look(self, agent: Agent) -> Hold | Row:
        """The lock, if it is ours now; else what has to go first. Raises LeaseLost."""
        while True:
            queue, _ = await agent.list(self._queue)
            own = next((row for row in queue if row.key == self._key), None)
            before = [row for row in queue if own is not None and row.created < own.created]
            if before:
                return max(before, key=lambda row: row.created)
            lock = await agent.read(self._lock)
            if _marked(lock, self._mark) is not None:
                assert lock is not None
                return Hold(lock.key, lock.created, self._session)
            if own is None:
                raise LeaseLost("the place in the queue is gone: the lease has ended")
            if lock is not None:
                return lock
            take = write(self._lock, self._value, self._mark, self._session)
            with contextlib.suppress(Conflict):
                await agent.transact([absent(self._lock), unchanged(own), take, delete(own.key)])

    async def withdraw(self, agent: Agent) -> None:
        await agent.transact([delete(self._key)])
        lock = _marked(await agent.read(self._lock), self._mark)
        if lock is not None:
            await Hold(lock.key, lock.created, self._session).release(agent)
