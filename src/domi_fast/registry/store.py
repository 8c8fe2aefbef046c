"""The state of a registry as SQL, without threads, files or an event loop.

One :class:`Store` is one connection to the database; every method is one transaction and blocks
only for that long. The memory backend keeps one store for a name, behind a lock; the SQLite backend
gives every registry its own, on a thread of its own. Whoever calls sees to it that one thread uses
a store at a time.

What holds after every transaction:

- ``meta.revision`` counts changes and never goes back. A key's epoch is the revision of its
  creation, its version the revision of its last change, a cursor the last revision that was seen.
- The log has one row for each revision after ``meta.log_start``, except that a reboot leaves a gap.
- Whatever is bound to a lease (entries, places in a queue) goes with the lease's row. A lease whose
  end has passed is swept by the next write, so that nobody is held up by the dead.
- A deleted key for which somebody waits belongs to the first of the queue at once.

Times are nanoseconds of ``CLOCK_MONOTONIC``, which all processes of a machine share and no change
of the date moves. It starts anew with the machine, hence ``meta.boot_id``. Processes in different
time namespaces do not share it and must not share a registry.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from ..errors import RegistryError
from .base import (
    CompareFailed,
    Cursor,
    Delete,
    Entry,
    Event,
    LeaseLost,
    NoKeyFree,
    Put,
    Reset,
    Snapshot,
    Version,
)
from .database import Database
from .schema import APPLICATION_ID, SCHEMA, SCHEMA_VERSION

LOG_EVENTS: Final = 4096
LOG_BYTES: Final = 16 << 20

# After a loss of power the last commits before it may be missing. No machine makes this many
# changes between two boots, so adding it at a reboot keeps the counter from going back.
REBOOT_GAP: Final = 1 << 32

# Oldest SQLite builds take 999 variables in one statement.
_CHUNK: Final = 500


@dataclass(frozen=True)
class Batch:
    """Some events of the log and the cursor behind the last of them."""

    events: tuple[Event, ...]
    cursor: Cursor


@dataclass(frozen=True)
class Peek:
    """:ivar revision: of the last change. :ivar expiry: the earliest end of a lease, in ns."""

    revision: int
    expiry: int | None


class Store:
    """One connection to the state.

    :param clock: nanoseconds of ``CLOCK_MONOTONIC``.

    Every method raises :class:`~domi_fast.registry.database.Busy` when another process holds the
    write lock and :class:`~domi_fast.errors.RegistryError` when SQLite fails otherwise; then
    nothing was changed.
    """

    def __init__(
        self,
        database: Database,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        log_events: int = LOG_EVENTS,
        log_bytes: int = LOG_BYTES,
    ) -> None:
        self._db = database
        self._clock = clock
        self._max_events = log_events
        self._max_bytes = log_bytes
        # Of the transaction under way; read at its start and written at its end.
        self._incarnation = ""
        self._revision = self._log_start = self._log_count = self._log_bytes = 0

    # ------------------------------------------------------------------ opening and closing

    def check(self) -> bool:
        """Whether the schema is there; False for an empty database. Changes nothing.

        Raises :class:`~domi_fast.errors.RegistryError` for a database of somebody else or of
        another version.
        """
        with self._db.reading():
            return self._check()

    def prepare(self, boot_id: str, first_revision: int = 0) -> None:
        """Make the schema where there is none; end all leases of an earlier boot."""
        with self._db.told():
            with self._db.transaction():
                is_new = not self._check()
                if is_new:
                    for statement in SCHEMA:
                        self._db.execute(statement)
                    self._db.execute(
                        "INSERT INTO meta VALUES (1, ?, ?, ?, ?, 0, 0)",
                        (secrets.token_hex(16), boot_id, first_revision, first_revision),
                    )
                self._load()
                (before,) = self._db.one("SELECT boot_id FROM meta")
                if before != boot_id:
                    self._revision += REBOOT_GAP
                    self._db.execute("UPDATE meta SET boot_id = ?", (boot_id,))
                    self._end([row[0] for row in self._db.execute("SELECT id FROM lease")])
                self._sweep(self._clock())
                self._flush()
            if is_new:
                # What the tables take is theirs then, should the disk fill up.
                self._db.write_back("RESTART")

    def close(self) -> None:
        self._db.close()

    def _check(self) -> bool:
        (application,) = self._db.one("PRAGMA application_id")
        (version,) = self._db.one("PRAGMA user_version")
        (tables,) = self._db.one("SELECT count(*) FROM sqlite_master")
        if application == APPLICATION_ID:
            if version != SCHEMA_VERSION:
                raise RegistryError(
                    f"{self._db.where} has version {version} of the registry's schema, this "
                    f"release knows version {SCHEMA_VERSION}; use one release in the whole "
                    "cluster, or remove the file while none of its nodes runs"
                )
            return True
        if application or version or tables:
            raise RegistryError(
                f"{self._db.where} is a database of another program, not a registry; "
                "choose another path"
            )
        return False

    # ------------------------------------------------------------------ leases

    def grant(self, lease: int, ttl: int) -> None:
        with self._write() as now:
            self._db.execute("INSERT INTO lease VALUES (?, ?)", (lease, now + ttl))

    def renew(self, leases: Mapping[int, int]) -> list[int]:
        """Move the ends of the leases (id to ttl in ns) on; those that were over already."""
        over = []
        with self._write() as now:
            for lease, ttl in leases.items():
                done = self._db.execute(
                    "UPDATE lease SET expires = ? WHERE id = ?", (now + ttl, lease)
                )
                if not done.rowcount:
                    over.append(lease)
        return over

    def revoke(self, leases: Sequence[int]) -> None:
        with self._write():
            self._end(leases)

    def sweep(self) -> None:
        """End the leases whose time has come."""
        with self._write():
            pass

    def peek(self) -> Peek:
        with self._db.reading():
            return Peek(
                *self._db.one("SELECT revision, (SELECT min(expires) FROM lease) FROM meta")
            )

    def data_version(self) -> int:
        """Another number than before if another connection has committed since."""
        with self._db.reading():
            version: int = self._db.one("PRAGMA data_version")[0]
            return version

    # ------------------------------------------------------------------ keys

    def get(self, key: str) -> Entry | None:
        with self._swept():
            row = self._find(key)
            return self._entry(row) if row else None

    def list(self, prefix: str) -> Snapshot:
        with self._swept():
            return self._snapshot(prefix)

    def put(self, key: str, value: bytes, expect: Version | None, lease: int | None) -> Entry:
        with self._write():
            row = self._find(key)
            if expect is not None:
                self._compare(key, row, expect)
            return self._set(key, value, lease, None, row)

    def create(self, key: str, value: bytes, lease: int | None) -> Entry:
        with self._write():
            if self._find(key):
                raise CompareFailed(f"the key {key!r} exists already")
            return self._set(key, value, lease, None, None)

    def delete(self, key: str, expect: Version | None) -> bool:
        with self._write():
            row = self._find(key)
            if row is None:
                return False
            if expect is not None:
                self._compare(key, row, expect)
            self._delete(key)
            return True

    def events(self, prefix: str, cursor: Cursor, limit: int) -> Batch:
        """At most ``limit`` events after the cursor, or one Reset where the log does not reach."""
        with self._db.reading():
            self._load()
            match cursor:
                case (self._incarnation, int(seen)) if self._log_start <= seen <= self._revision:
                    rows = self._db.execute(
                        "SELECT revision, key, value, epoch FROM log"
                        " WHERE revision > ? AND key >= ? AND key < ? ORDER BY revision LIMIT ?",
                        (seen, prefix, _end_of(prefix), limit),
                    ).fetchall()
                    last = rows[-1][0] if len(rows) == limit else self._revision
                    return Batch(tuple(map(self._event, rows)), self._stamp(last))
            snapshot = self._snapshot(prefix)
            return Batch((Reset(snapshot),), snapshot.cursor)

    # ------------------------------------------------------------------ claims and locks

    def claim(self, keys: Sequence[str], value: bytes, lease: int, claim: int) -> tuple[str, int]:
        """The first free key and its epoch. ``claim`` is a random number that names the claim."""
        with self._write():
            for start in range(0, len(keys), _CHUNK):
                chunk = keys[start : start + _CHUNK]
                marks = ",".join("?" * len(chunk))
                held = {
                    row[0]
                    for row in self._db.execute(
                        f"SELECT key FROM entry WHERE key IN ({marks})", chunk
                    )
                }
                for key in chunk:
                    if key not in held:
                        return key, self._set(key, value, lease, claim, None).epoch
            raise NoKeyFree(f"all {len(keys)} keys are held, from {keys[:1]} to {keys[-1:]}")

    def update(self, claim: int, value: bytes) -> None:
        with self._write():
            row = self._db.one("SELECT key, lease FROM entry WHERE claim = ?", (claim,))
            if row is None:
                raise LeaseLost("the claim is no longer held: its lease is over or it was released")
            self._set(row[0], value, row[1], claim, self._find(row[0]))

    def withdraw(self, claim: int) -> None:
        """Give the key of the claim back, or its place in the queue, if there is one."""
        with self._write():
            self._db.execute("DELETE FROM waiter WHERE claim = ?", (claim,))
            row = self._db.one("SELECT key FROM entry WHERE claim = ?", (claim,))
            if row:
                self._delete(row[0])

    def enqueue(self, name: str, value: bytes, lease: int, claim: int) -> int | None:
        """Queue up for the key ``name``; its epoch if it was free."""
        with self._write():
            if self._find(name) is None:
                return self._set(name, value, lease, claim, None).epoch
            self._require(lease)
            self._db.execute(
                "INSERT INTO waiter (name, lease, claim, value) VALUES (?, ?, ?, ?)",
                (name, lease, claim, value),
            )
            return None

    def turn(self, claim: int) -> int | None:
        """The epoch once the claim's turn has come, None while it waits in the queue."""
        with self._db.reading():
            row = self._db.one("SELECT epoch FROM entry WHERE claim = ?", (claim,))
            if row:
                epoch: int = row[0]
                return epoch
            if self._db.one("SELECT 1 FROM waiter WHERE claim = ?", (claim,)):
                return None
            raise LeaseLost("the lease ended before the turn came")

    # ------------------------------------------------------------------ inside a transaction

    @contextmanager
    def _write(self) -> Iterator[int]:
        """A transaction that may change something, begun by a sweep; the time at its start."""
        with self._db.writing(self._forget_half):
            # Read only once the lock is ours: waiting for it, or being stopped, takes time.
            now = self._clock()
            self._load()
            self._sweep(now)
            yield now
            self._flush()

    def _forget_half(self) -> bool:
        """Make room in a file that may not grow: whether there was a log of events to shorten."""
        if self._db.grows:
            return False
        shortened = False
        with suppress(sqlite3.Error):
            with self._db.transaction():
                self._load()
                count = self._log_count
                while self._log_count > count // 2:
                    self._forget()
                self._save()
            shortened = count > 0
        return shortened

    @contextmanager
    def _swept(self) -> Iterator[None]:
        """A reading transaction that does not see the keys of leases that are over."""
        with self._db.reading():
            late = self._db.one("SELECT 1 FROM lease WHERE expires <= ?", (self._clock(),))
            if not late:
                self._load()
                yield
        if late:
            with self._write():
                yield

    def _load(self) -> None:
        row = self._db.one(
            "SELECT incarnation, revision, log_start, log_count, log_bytes FROM meta"
        )
        self._incarnation, self._revision, self._log_start, self._log_count, self._log_bytes = row
        self._loaded = self._revision

    def _flush(self) -> None:
        if self._revision == self._loaded:
            return
        while self._log_count > self._max_events or self._log_bytes > self._max_bytes:
            self._forget()
        self._save()

    def _save(self) -> None:
        self._db.execute(
            "UPDATE meta SET revision = ?, log_start = ?, log_count = ?, log_bytes = ?",
            (self._revision, self._log_start, self._log_count, self._log_bytes),
        )

    def _forget(self) -> None:
        """Drop the oldest event of the log."""
        revision, size = self._db.one(
            "SELECT revision, length(key) + ifnull(length(value), 0) FROM log"
            " ORDER BY revision LIMIT 1"
        )
        self._db.execute("DELETE FROM log WHERE revision = ?", (revision,))
        self._log_start = revision
        self._log_count -= 1
        self._log_bytes -= size

    def _sweep(self, now: int) -> None:
        over = self._db.execute("SELECT id FROM lease WHERE expires <= ?", (now,)).fetchall()
        if over:
            self._end([row[0] for row in over])

    def _end(self, leases: Sequence[int]) -> None:
        # All their places in queues go before the first key does: a key that is deleted is handed
        # to the next in its queue, who must be alive.
        keys: list[str] = []
        for lease in leases:
            self._db.execute("DELETE FROM lease WHERE id = ?", (lease,))
            self._db.execute("DELETE FROM waiter WHERE lease = ?", (lease,))
            rows = self._db.execute("SELECT key FROM entry WHERE lease = ? ORDER BY key", (lease,))
            keys += [row[0] for row in rows]
        for key in keys:
            self._delete(key)

    def _require(self, lease: int) -> None:
        if not self._db.one("SELECT 1 FROM lease WHERE id = ?", (lease,)):
            raise LeaseLost("the lease is over: it has expired or was revoked")

    def _find(self, key: str) -> Any:
        return self._db.one("SELECT key, value, revision, epoch FROM entry WHERE key = ?", (key,))

    def _compare(self, key: str, row: Any, expect: Version) -> None:
        if row is None:
            raise CompareFailed(f"the key {key!r} does not exist")
        if self._stamp(row[2]) != expect:
            raise CompareFailed(f"the key {key!r} is at another version than was expected")

    def _set(self, key: str, value: bytes, lease: int | None, claim: int | None, row: Any) -> Entry:
        """Write the key; ``row`` is what is there now."""
        if lease is not None:
            self._require(lease)
        epoch = row[3] if row else self._revision + 1
        self._log(key, value, epoch)
        self._db.execute(
            "INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?, ?, ?)",
            (key, value, epoch, self._revision, lease, claim),
        )
        return Entry(key, value, self._stamp(self._revision), epoch)

    def _delete(self, key: str) -> None:
        self._db.execute("DELETE FROM entry WHERE key = ?", (key,))
        self._log(key, None, 0)
        first = self._db.one(
            "SELECT place, lease, claim, value FROM waiter WHERE name = ? ORDER BY place LIMIT 1",
            (key,),
        )
        if first:
            place, lease, claim, value = first
            self._db.execute("DELETE FROM waiter WHERE place = ?", (place,))
            self._set(key, value, lease, claim, None)

    def _log(self, key: str, value: bytes | None, epoch: int) -> None:
        self._revision += 1
        self._log_count += 1
        # Counted as SQLite's length() does: characters of the text, bytes of the value.
        self._log_bytes += len(key) + len(value or b"")
        self._db.execute("INSERT INTO log VALUES (?, ?, ?, ?)", (self._revision, key, value, epoch))

    def _snapshot(self, prefix: str) -> Snapshot:
        rows = self._db.execute(
            "SELECT key, value, revision, epoch FROM entry WHERE key >= ? AND key < ? ORDER BY key",
            (prefix, _end_of(prefix)),
        )
        return Snapshot(tuple(map(self._entry, rows)), self._stamp(self._revision))

    def _entry(self, row: Any) -> Entry:
        key, value, revision, epoch = row
        return Entry(key, value, self._stamp(revision), epoch)

    def _event(self, row: Any) -> Event:
        revision, key, value, epoch = row
        cursor = self._stamp(revision)
        if value is None:
            return Delete(key, cursor)
        return Put(Entry(key, value, cursor, epoch), cursor)

    def _stamp(self, revision: int) -> tuple[str, int]:
        # With the database's name in it, so that the numbers of a file that was removed mean
        # nothing to the one that took its place.
        return (self._incarnation, revision)


def _end_of(prefix: str) -> str:
    """A text behind all keys that start with the prefix: no key has a character so high."""
    return prefix + "\U0010ffff"
