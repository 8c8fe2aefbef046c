"""Snapshots: the form of one, where they are kept, and what saves them in time."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple, Protocol, TypeVar, runtime_checkable

from ..errors import DomiError

_HEAD: Final = struct.Struct("<4sBQIQ")
_MAGIC: Final = b"DOMg"
_VERSION: Final = 1

T = TypeVar("T")


class Snapshot(NamedTuple):
    """A group at one moment.

    :ivar state: what its ``save`` returned.
    """

    group: int
    members: tuple[int, ...]
    state: bytes


def pack(snapshot: Snapshot) -> bytes:
    """``DOMg``, ``u8`` version, ``u64`` group, ``u32`` count of members, ``u64`` size of the state,
    a ``u64`` of each member, the state; little-endian.
    """
    group, members, state = snapshot
    head = _HEAD.pack(_MAGIC, _VERSION, group, len(members), len(state))
    return b"".join((head, struct.pack(f"<{len(members)}Q", *members), state))


def unpack(data: bytes) -> Snapshot:
    """The snapshot in these bytes.

    :raises DomiError: they are none, or of a version that this one does not know.
    """
    if not isinstance(data, bytes):
        raise TypeError(
            f"a snapshot of type {type(data).__name__}: bytes are wanted, as "
            "'await group.snapshot()' gives them"
        )
    if len(data) < _HEAD.size or data[:4] != _MAGIC:
        raise DomiError(
            f"{len(data)} bytes that are no snapshot: one begins with {_MAGIC!r} and a head of "
            f"{_HEAD.size} bytes; give what Group.snapshot() returned"
        )
    _, version, group, count, size = _HEAD.unpack_from(data)
    if version != _VERSION:
        raise DomiError(
            f"a snapshot of version {version}: this library reads version {_VERSION}; restore it "
            "with the library that made it"
        )
    end = _HEAD.size + 8 * count
    if len(data) != end + size:
        raise DomiError(
            f"a snapshot of {len(data)} bytes whose head says {end + size}: it was cut or changed"
        )
    members = struct.unpack_from(f"<{count}Q", data, _HEAD.size)
    return Snapshot(group, members, data[end:])


@runtime_checkable
class SnapshotStore(Protocol):
    """Where snapshots are kept. One that zones of several machines use is one for all of them."""

    async def save(self, service: str, group: int, data: bytes) -> None:
        """Keep it in the place of the one before."""

    async def load(self, service: str, group: int) -> bytes | None:
        """The latest; None when there is none."""

    async def delete(self, service: str, group: int) -> None:
        """Forget it; there need not be one."""


class SqliteSnapshots:
    """Snapshots in one SQLite file, for the zones of one machine. Used from any loop; its work is
    done on a thread of its own.

    Saved is what survives the death of processes; a machine that loses power may lose the latest.

    :param path: of the file, which is made where there is none.
    :raises OSError: its folder is not there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(os.fspath(path))
        folder = os.path.dirname(self.path)
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{folder}: there is no such folder, for snapshots")
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="domi_fast snapshots")
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()
        self._closed = False

    async def save(self, service: str, group: int, data: bytes) -> None:
        await self._do(
            "INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?)", service, str(group), data
        )

    async def load(self, service: str, group: int) -> bytes | None:
        rows = await self._do(
            "SELECT data FROM snapshots WHERE service = ? AND id = ?", service, str(group)
        )
        return rows[0][0] if rows else None

    async def delete(self, service: str, group: int) -> None:
        await self._do("DELETE FROM snapshots WHERE service = ? AND id = ?", service, str(group))

    def close(self) -> None:
        """Wait for what was begun, and let go of the file. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._worker.submit(self._disconnect)
        self._worker.shutdown()

    async def _do(self, statement: str, *values: object) -> list[Any]:
        with self._lock:
            if self._closed:
                raise DomiError(f"the snapshots in {self.path} were closed: make another store")
            work = self._worker.submit(self._execute, statement, values)
        return await asyncio.wrap_future(work)

    def _execute(self, statement: str, values: tuple[object, ...]) -> list[Any]:
        if self._connection is None:
            # Closed on the same thread, or, where nobody closes it, by the collector on another.
            connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            try:
                connection.execute("PRAGMA busy_timeout = 10000")
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS snapshots (service TEXT NOT NULL, id TEXT NOT "
                    "NULL, data BLOB NOT NULL, PRIMARY KEY (service, id)) WITHOUT ROWID"
                )
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection.execute(statement, values).fetchall()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
