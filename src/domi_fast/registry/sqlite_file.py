"""The file of a SQLite registry: making it, opening it, noticing that it was replaced, forks."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from contextlib import suppress
from typing import Final
from urllib.parse import quote

from ..errors import RegistryError
from .database import Busy, Database
from .store import Store

# SQLite's own patience within one try, in seconds. It blocks the thread, so it is short.
_TRY: Final = 0.004
# SQLite's smallest page, in bytes: no database is shorter.
_SMALLEST: Final = 512
_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"

# Connections of this process, so that a fork can be kept from touching them.
_connections: dict[int, sqlite3.Connection] = {}


def _before_fork() -> None:
    # Loaded here, since most processes never fork, and a child of threads is no place to import.
    if _connections:
        import ctypes  # noqa: F401


def _after_fork_in_child() -> None:
    if _connections:
        import ctypes

        # The parent's thread may be in the middle of a transaction. Closing the child's copy of the
        # connection would undo it in the memory that both share: it must outlive the interpreter.
        for db in _connections.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(db))
        _connections.clear()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)


class StoreFile:
    """The open file. Belongs to the thread that makes it.

    Raises :class:`Busy` when another process is just making it and
    :class:`~domi_fast.errors.RegistryError` when it cannot be a registry.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        boot_id = _read_boot_id()
        _make(path)
        try:
            # Before it is opened: should it be replaced in between, the next look finds that.
            self._identity = _identity(path)
            _refuse_stub(path)
            db = sqlite3.connect(
                f"file:{quote(path)}?mode=rw", uri=True, timeout=_TRY, isolation_level=None
            )
        except (OSError, sqlite3.Error) as exc:
            raise RegistryError(f"cannot open the registry {path}: {exc}") from exc
        self._db = db
        _connections[id(db)] = db
        self.database = Database(db, path, os.path.dirname(path))
        self.store = Store(self.database)
        try:
            # Before anything is changed: a file of another program is left as it is.
            self.store.check()
            self.database.use_wal()
            self.store.prepare(boot_id)
        except BaseException:
            self.close()
            raise

    def is_there(self) -> bool:
        """Whether the path still leads to this file."""
        try:
            return _identity(self._path) == self._identity
        except OSError:
            return False

    def close(self) -> None:
        _connections.pop(id(self._db), None)
        self.store.close()


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _refuse_stub(path: str) -> None:
    # SQLite takes a file too short to be a database for an empty one and writes over it.
    if 0 < os.stat(path).st_size < _SMALLEST:
        raise RegistryError(f"{path} is no registry (too short); choose another path")


def _read_boot_id() -> str:
    try:
        with open(_BOOT_ID, encoding="utf-8") as file:
            return file.read().strip()
    except OSError as exc:
        raise RegistryError(f"a SQLite registry needs Linux and its /proc: {exc}") from exc


def _make(path: str) -> None:
    """Make the empty file, for this user alone, if there is none."""
    if os.path.lexists(path):
        return
    import tempfile  # which loads the compressors, for the one process that makes the file

    try:
        directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise RegistryError(
            f"cannot make the registry {path}: {exc}; its directory must exist"
        ) from exc
    try:
        # One process at a time, since it clears away what a removed file has left: processes that
        # still have that open would share its -shm with the new one, and both would be spoilt.
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.lexists(path):
            for tail in ("-wal", "-shm"):
                with suppress(FileNotFoundError):
                    os.unlink(path + tail)
            # Made under another name and linked: closing a descriptor of the file itself would
            # drop the locks that another thread's connection has on it.
            fd, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".registry-")
            os.close(fd)
            os.link(temporary, path)
            os.unlink(temporary)
        fcntl.flock(directory, fcntl.LOCK_UN)
    except BlockingIOError as exc:
        raise Busy(f"{path} is being made by another process") from exc
    except OSError as exc:
        raise RegistryError(f"cannot make the registry {path}: {exc}") from exc
    finally:
        os.close(directory)
