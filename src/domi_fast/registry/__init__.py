"""The registry: who is in the cluster, who holds which id, who leads.

:func:`open_registry` picks the backend from a URL, :func:`default_url` names the one that needs
nothing to be set up. What a backend must do is the :class:`Registry` protocol in ``base``.
"""

from __future__ import annotations

import os
import re
import stat
from urllib.parse import quote, unquote, urlsplit

from ..errors import RegistryError, masked
from .base import (
    Claim,
    CompareFailed,
    Cursor,
    Delete,
    Entry,
    Event,
    Lease,
    LeaseLost,
    Limits,
    NoKeyFree,
    Put,
    Registry,
    Reset,
    Snapshot,
    Version,
    Watch,
)

__all__ = [
    "Claim",
    "CompareFailed",
    "Cursor",
    "Delete",
    "Entry",
    "Event",
    "Lease",
    "LeaseLost",
    "Limits",
    "NoKeyFree",
    "Put",
    "Registry",
    "RegistryError",
    "Reset",
    "Snapshot",
    "Version",
    "Watch",
    "default_url",
    "open_registry",
]

_FORMS = (
    "sqlite:///absolute/path, memory://name, etcd://host:2379,host:2379, "
    "zookeeper://host:2181/chroot or consul://host:8500"
)
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def open_registry(url: str) -> Registry:
    """The registry that the URL names, not yet connected: ``await registry.open()`` does that.

    Raises :class:`~domi_fast.errors.RegistryError` when the URL is none of the known forms.
    """
    shown = masked(url)
    try:
        parts = urlsplit(url)
    except ValueError:
        # Which may repeat a part of it.
        raise RegistryError(f"registry URL {shown!r} is no URL; use {_FORMS}") from None
    if parts.scheme in _SERVERS:
        return _SERVERS[parts.scheme](url)
    if parts.query or parts.fragment:
        raise RegistryError(
            f"registry URL {shown!r}: no options are known; write '?' as %3F and '#' as %23 in a "
            "path"
        )
    # Imported here so that a program loads only the backend that it uses.
    if parts.scheme == "sqlite":
        path = unquote(parts.path)
        if path.startswith("//"):
            path = "/" + path.lstrip("/")  # others write sqlite:////absolute/path
        if parts.netloc or not path.startswith("/") or path.endswith("/") or "\0" in path:
            raise RegistryError(
                f"registry URL {shown!r}: a SQLite registry is sqlite:// and the absolute path of "
                "a file, so three slashes: sqlite:///run/user/1000/domi/default.sqlite"
            )
        from .sqlite import SqliteRegistry

        return SqliteRegistry(path)
    if parts.scheme == "memory":
        if parts.path or not _NAME.fullmatch(parts.netloc):
            raise RegistryError(
                f"registry URL {shown!r}: a memory registry is memory://name, the name being "
                "1 to 64 letters, digits, '.', '_' or '-'"
            )
        from .memory import MemoryRegistry

        return MemoryRegistry(parts.netloc)
    raise RegistryError(f"registry URL {shown!r} is of no known kind; use {_FORMS}")


def _etcd(url: str) -> Registry:
    from .server_url import parse_server_url

    endpoints, root, shown = parse_server_url(url)
    from .etcd import EtcdRegistry

    return EtcdRegistry(shown, endpoints, root)


def _zookeeper(url: str) -> Registry:
    from .server_url import parse_server_url

    endpoints, root, shown = parse_server_url(url)
    from .zookeeper import ZooKeeperRegistry

    return ZooKeeperRegistry(shown, endpoints, root)


def _consul(url: str) -> Registry:
    from .server_url import parse_server_url

    endpoints, root, shown = parse_server_url(url)
    from .consul import ConsulRegistry

    return ConsulRegistry(shown, endpoints, root)


_SERVERS = {"etcd": _etcd, "zookeeper": _zookeeper, "consul": _consul}


def default_url(cluster: str) -> str:
    """The URL of the cluster's SQLite file in the runtime directory of this user.

    The directory is made (mode 0700) when it is missing. It is ``$XDG_RUNTIME_DIR/domi`` where
    that is ours to write to, else ``/tmp/domi-<uid>``: one fixed place, since processes that
    disagree about it would form two clusters.

    Raises :class:`~domi_fast.errors.RegistryError` when the cluster's name is not 1 to 64 letters,
    digits, ``.``, ``_`` or ``-``, and when the directory belongs to or is open to somebody else.
    """
    if not _NAME.fullmatch(cluster):
        raise RegistryError(
            f"cluster name {cluster!r}: it must be 1 to 64 letters, digits, '.', '_' or '-'"
        )
    directory = _runtime_directory()
    _make_private(directory)
    return f"sqlite://{quote(os.path.join(directory, cluster))}.sqlite"


def _runtime_directory() -> str:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    # sudo may hand down the variable of another user: what is not ours is not used.
    usable = os.path.isabs(runtime) and os.access(runtime, os.W_OK | os.X_OK)
    if usable and os.stat(runtime).st_uid == os.geteuid():
        return os.path.join(runtime, "domi")
    return f"/tmp/domi-{os.geteuid()}"


def _make_private(directory: str) -> None:
    """Make the directory, or see that it is ours alone: /tmp is open to everybody."""
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        pass
    except OSError as exc:
        raise RegistryError(
            f"cannot make the registry's directory: {exc}; set XDG_RUNTIME_DIR to a directory of "
            "your own or give the registry's URL"
        ) from exc
    found = os.lstat(directory)
    if not stat.S_ISDIR(found.st_mode):
        problem = "is not a directory"
    elif found.st_uid != os.geteuid():
        problem = f"belongs to user {found.st_uid}, not to you ({os.geteuid()})"
    elif found.st_mode & 0o077:
        problem = f"is open to others (mode {found.st_mode & 0o777:04o}, it must be 0700)"
    else:
        return
    raise RegistryError(
        f"{directory} {problem}; remove it or give the registry's URL (sqlite:///absolute/path)"
    )
