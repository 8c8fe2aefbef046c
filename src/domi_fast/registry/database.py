"""A connection to an SQLite database of several processes: transactions, errors, and its disk.

A commit outlives the death of every process. Where the disk fills up the file stays as large as it
is, and the write-ahead log small: what has been committed and cannot be written back would stop
everybody. One thread uses a database at a time.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

from ..errors import RegistryError

# Commits of one process after which the write-ahead log is written back, which syncs the file.
COMMITS, COMMITS_IN_LITTLE_ROOM = 64, 4
# Bytes on the disk that are little; and with which the file does not grow any more.
LITTLE_ROOM, NO_ROOM = 8 << 20, 64 << 10
_MOST_PAGES: Final = 0xFFFFFFFE


class Busy(RegistryError):
    """Not possible now, mostly since another process is writing; try again a moment later."""


class Full(Busy):
    """There was no room, and some was made."""


class Database:
    """One connection.

    :param connection: in autocommit mode (``isolation_level=None``).
    :param where: how error messages call the database.
    :param folder: where its file is; None where it has none.
    :ivar grows: whether the file may.
    """

    def __init__(
        self, connection: sqlite3.Connection, where: str, folder: str | None = None
    ) -> None:
        self._connection = connection
        self.where = where
        self._folder = folder
        self._room = LITTLE_ROOM  # bytes on its disk
        self.grows = True
        self._commits = 0  # since the write-ahead log was written back

    def use_wal(self) -> None:
        """Let readers go on while somebody writes. Not inside a transaction.

        Raises :class:`~domi_fast.errors.RegistryError` where the file system cannot do that.
        """
        with self.told():
            (mode,) = self.one("PRAGMA journal_mode = WAL")
            # A commit outlives the death of every process without a sync; only a loss of power
            # may take the last ones away, and that ends all leases anyway.
            self.execute("PRAGMA synchronous = NORMAL")
        if mode != "wal":
            raise RegistryError(
                f"{self.where} cannot keep a write-ahead log (mode {mode!r}); "
                "choose a path on a local file system"
            )

    def close(self) -> None:
        self._connection.close()

    # ------------------------------------------------------------------ statements

    def execute(self, sql: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        return self._connection.execute(sql, values)

    def one(self, sql: str, values: Sequence[object] = ()) -> Any:
        """The first row; None if there is none."""
        return self._connection.execute(sql, values).fetchone()

    # ------------------------------------------------------------------ transactions

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A transaction that sees one moment.

        Raises :class:`Busy` and :class:`~domi_fast.errors.RegistryError` for SQLite's errors.
        """
        with self.told():
            try:
                self.execute("BEGIN")
                yield
            finally:
                self._rollback()

    @contextmanager
    def writing(self, make_room: Callable[[], bool]) -> Iterator[None]:
        """A transaction that may change something.

        :param make_room: called once it was undone, if there was no room: whether there is now.

        Raises as :meth:`reading`, and :class:`Full`; then nothing was changed.
        """
        with self.told():
            self._look_at_disk()
            try:
                with self.transaction():
                    yield
            except sqlite3.Error as exc:
                if "disk is full" in str(exc) and (make_room() or self.write_back("RESTART")):
                    raise Full(f"{self.where}: {exc}") from exc
                raise
            self._commits += 1

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """One that may change something, with SQLite's own errors, after which it is undone."""
        try:
            self.execute("BEGIN IMMEDIATE")
            yield
            self.execute("COMMIT")
        finally:
            self._rollback()

    def _rollback(self) -> None:
        if self._connection.in_transaction:
            # Whatever made the transaction fail is being raised; a failing rollback adds nothing,
            # and SQLite undoes the transaction when the connection closes.
            with suppress(sqlite3.Error):
                self.execute("ROLLBACK")

    @contextmanager
    def told(self) -> Iterator[None]:
        """With SQLite's errors as :class:`Busy` and :class:`~domi_fast.errors.RegistryError`."""
        try:
            yield
        except sqlite3.Error as exc:
            if isinstance(exc, sqlite3.OperationalError) and "locked" in str(exc):
                raise Busy(f"{self.where} is locked by another process") from exc
            if "not a database" in str(exc):
                raise RegistryError(
                    f"{self.where} is no registry ({exc}); choose another path"
                ) from exc
            raise RegistryError(f"{self.where}: {exc}") from exc

    # ------------------------------------------------------------------ its disk

    def tidy(self) -> None:
        """Write the write-ahead log back now and again, while there is nothing else to do."""
        if self._commits >= (COMMITS_IN_LITTLE_ROOM if self._room < LITTLE_ROOM else COMMITS):
            self.write_back("PASSIVE")

    def write_back(self, mode: str) -> bool:
        """Have the write-ahead log begin anew; whether there was anything in it, and it has.

        In the file that it is: on a full disk somebody else would take what is given back.
        """
        try:
            busy, pages, _ = self.one(f"PRAGMA wal_checkpoint({mode})")
        except sqlite3.Error:
            return False
        self._commits = 0
        return not busy and pages > 0

    def _look_at_disk(self) -> None:
        """Have the file stay as large as it is while there is no room on its disk."""
        if self._folder is None:
            return
        with suppress(OSError):
            disk = os.statvfs(self._folder)
            self._room = disk.f_bavail * disk.f_frsize
        grows = self._room >= NO_ROOM
        if grows != self.grows:
            most = _MOST_PAGES if grows else self.one("PRAGMA page_count")[0]
            self.one(f"PRAGMA max_page_count = {most}")
            self.grows = grows
