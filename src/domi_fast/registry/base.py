"""What the library needs of a registry: a small ordered key-value store with leases and watches.

The protocol is as small as etcd, ZooKeeper, Consul and SQLite can all keep it exactly. Keys are
``/``-separated text, values are bytes. Versions and cursors are opaque: compare them for equality,
hand them back, never order them. Every method runs on the event loop that opened the registry and
raises :class:`~domi_fast.errors.RegistryError` when the backend cannot be reached.

A cancelled call leaves nothing behind that would have to be given back: no lease, no claim, no
place in a queue. A cancelled write may or may not have been done.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from ..errors import RegistryError

Version: TypeAlias = Hashable
Cursor: TypeAlias = Hashable

MAX_KEY = 400
"""The longest key, in bytes of UTF-8: Consul takes 512 and a root path wants room in front."""
_NO_TEXT = re.compile("[\x00-\x1f\x7f\ud800-\udfff\U0010fffe\U0010ffff]")


class CompareFailed(RegistryError):
    """The key is not at the expected version (or exists although it was to be created)."""


class NoKeyFree(RegistryError):
    """Every key that was offered to :meth:`Registry.claim` is held."""


class LeaseLost(RegistryError):
    """The lease has expired or was revoked; what was bound to it is gone."""


@dataclass(frozen=True)
class Limits:
    """What a backend can do.

    :ivar min_ttl: the shortest lease, in seconds.
    :ivar expiry_bound: a dead holder's keys are gone at most this many seconds after the lease's
        end,
    :ivar expiry_share: and this part of its length more (Consul waits up to twice the lease).
    :ivar max_value: the largest value, in bytes.
    """

    min_ttl: float
    expiry_bound: float
    max_value: int
    expiry_share: float = 0.0

    def gone_after(self, ttl: float) -> float:
        """Seconds from the end of a lease of ``ttl`` seconds, by which a dead holder's keys go."""
        return self.expiry_bound + self.expiry_share * ttl

    def check_ttl(self, ttl: float) -> None:
        """Raise :class:`~domi_fast.errors.RegistryError` for a lease this backend cannot keep."""
        number = isinstance(ttl, (int, float)) and not isinstance(ttl, bool)
        if not (number and self.min_ttl <= ttl <= MAX_TTL):
            raise RegistryError(
                f"a lease of {ttl!r} s: it must last from {self.min_ttl} to {MAX_TTL:.0f} s",
                limit=self.min_ttl,
            )

    def check_value(self, value: bytes) -> None:
        """Raise :class:`~domi_fast.errors.RegistryError` for a value this backend cannot hold."""
        if not isinstance(value, bytes):
            raise RegistryError(f"a value must be bytes, not {type(value).__name__}")
        if len(value) > self.max_value:
            raise RegistryError(
                f"a value of {len(value)} bytes: at most {self.max_value} are allowed here",
                limit=self.max_value,
            )


MAX_TTL = 86400.0
"""The longest lease, in seconds: Consul's limit is one day."""


def check_key(key: str) -> None:
    """Raise :class:`~domi_fast.errors.RegistryError` unless every backend can hold the key.

    A key is ``/``-separated text without empty, ``.`` or ``..`` parts, without control characters,
    and at most :data:`MAX_KEY` bytes long.
    """
    check_prefix(key)
    parts = key.split("/")
    if "" in parts or "." in parts or ".." in parts:
        raise RegistryError(f"the key {key!r}: its parts between '/' may not be empty, '.' or '..'")


def check_prefix(prefix: str) -> None:
    """As :func:`check_key` for the beginning of a key, which may be empty or end anywhere."""
    if not isinstance(prefix, str):
        raise RegistryError(f"a key must be a str, not {type(prefix).__name__}")
    if _NO_TEXT.search(prefix):
        raise RegistryError(f"the key {prefix!r} has characters that are no text")
    if len(prefix.encode()) > MAX_KEY:
        raise RegistryError(
            f"a key of {len(prefix.encode())} bytes: at most {MAX_KEY} are allowed", limit=MAX_KEY
        )


@dataclass(frozen=True)
class Entry:
    """A key with its value, at one version.

    :ivar epoch: grows with every creation of the key, also across its deletion.
    """

    key: str
    value: bytes
    version: Version
    epoch: int


@dataclass(frozen=True)
class Snapshot:
    """All entries under a prefix, sorted by key, and the cursor from which a watch goes on."""

    entries: tuple[Entry, ...]
    cursor: Cursor


@dataclass(frozen=True)
class Put:
    """A key was created or changed."""

    entry: Entry
    cursor: Cursor


@dataclass(frozen=True)
class Delete:
    """A key was deleted, or its lease ended."""

    key: str
    cursor: Cursor


@dataclass(frozen=True)
class Reset:
    """The backend cannot replay from the cursor: this is everything there is now."""

    snapshot: Snapshot


Event: TypeAlias = Put | Delete | Reset


class Watch(Protocol):
    """An async iterator of events. One task at a time may wait in it.

    A cancelled wait loses nothing: the next one gives the event that the first would have given.
    """

    def __aiter__(self) -> Watch: ...

    async def __anext__(self) -> Event: ...

    async def aclose(self) -> None:
        """End the watch; whoever waits in it gets ``StopAsyncIteration``. Idempotent."""


class Lease(Protocol):
    """A promise that ends unless it is kept alive; the backend keeps it alive until it is revoked.

    :ivar ttl: its length in seconds.
    :ivar valid_until: the end, on this process's ``time.monotonic()``, moved on by each renewal.
        It is never later than the registry's own end. The owner of a lock stops at this time.
    :ivar lost: set once the lease has ended without being revoked by its owner.
    """

    ttl: float
    lost: asyncio.Event

    @property
    def valid_until(self) -> float:
        """In seconds of ``time.monotonic()``; once the lease is over, a time that has passed."""

    async def revoke(self) -> None:
        """End the lease now and delete what is bound to it. A second call does nothing."""


class Claim(Protocol):
    """A key that is held until it is released or its lease ends.

    :ivar key: the key that was won.
    :ivar epoch: a fencing token: larger than that of every earlier holder of the key, also when
        the key was deleted in between.
    """

    key: str
    epoch: int
    lease: Lease

    async def update(self, value: bytes) -> None:
        """Put another value under the key. Raises :class:`LeaseLost` when it is no longer held."""

    async def release(self) -> None:
        """Give the key back, if it is still held. The lease lives on."""


@dataclass(frozen=True)
class Service:
    """What a node is to those who know the registry and not us.

    :ivar id: which no other has.
    :ivar tags: words by which it can be asked for.
    :ivar meta: whatever else is to be known of it.
    """

    name: str
    id: str
    host: str
    port: int
    tags: tuple[str, ...] = ()
    meta: Mapping[str, str] = field(default_factory=dict)


class Registry(Protocol):
    """The service that all nodes of a cluster share."""

    url: str
    limits: Limits

    async def open(self) -> None:
        """Connect, once: a registry that was closed is not opened again.

        Raises :class:`~domi_fast.errors.RegistryError`.
        """

    async def close(self) -> None:
        """Revoke this registry's leases, end its watches and disconnect. Idempotent."""

    async def grant(self, ttl: float) -> Lease:
        """Start a lease of ``ttl`` seconds, at least ``limits.min_ttl``."""

    async def get(self, key: str) -> Entry | None:
        """The entry, or None."""

    async def list(self, prefix: str) -> Snapshot:
        """All entries whose key starts with ``prefix``, read at one moment."""

    async def put(
        self, key: str, value: bytes, *, expect: Version | None = None, lease: Lease | None = None
    ) -> Entry:
        """Write the value. With ``expect``, only over that version (:class:`CompareFailed`).

        The key is bound to ``lease``, or to none.
        """

    async def create(self, key: str, value: bytes, *, lease: Lease | None = None) -> Entry:
        """Write the value of a key that does not exist (:class:`CompareFailed` if it does)."""

    async def delete(self, key: str, *, expect: Version | None = None) -> bool:
        """Delete the key; False when there is none, whatever ``expect`` says.

        With ``expect``, only at that version (:class:`CompareFailed`).
        """

    def watch(self, prefix: str, *, since: Cursor) -> Watch:
        """Everything that happens under ``prefix`` after the cursor, in order, without a gap.

        The iterator ends only with the registry (or with ``aclose``); when the backend is away it
        waits, reconnects and goes on, with a :class:`Reset` where it cannot replay. Where the
        backend tells only what there is and not how it came to be (Consul, ZooKeeper), the watch
        begins with a Reset, and of changes in quick succession to one key it gives the last: a
        value that was overwritten at once, or a key that came and went, may not be seen.
        """

    async def claim(self, keys: Sequence[str], value: bytes, lease: Lease) -> Claim:
        """Take the first of ``keys`` that is free, at once, bound to the lease.

        Raises :class:`NoKeyFree` when all are held and :class:`LeaseLost` when the lease is over.
        """

    async def acquire(self, name: str, lease: Lease, value: bytes = b"") -> Claim:
        """Wait for the lock (or leadership) ``name``, first come first served, and take it.

        The key of the claim is ``name`` itself, so that ``get`` and ``watch`` show who holds it,
        and ``claim([name], ...)`` is the attempt that does not wait. The queue is not visible.
        Raises :class:`LeaseLost` when the lease ends before the turn comes.
        """

    def announce(self, service: Service, lease: Lease) -> None:
        """Have the service shown in the registry's own catalog for as long as the lease is renewed.

        Where there is no such catalog (all but Consul) nothing is done. Nobody waits for it, and
        nothing depends on it: what keeps it from being shown is logged.
        """
