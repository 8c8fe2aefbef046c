"""The way to an etcd: blocking calls in threads, over whichever endpoint answers.

The channel to one endpoint is used until a call over it fails as if the server were away; it is
closed then, which ends every call and watch on it, and the next call opens one to the next
endpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from ..errors import RegistryError
from .base import LeaseLost
from .etcd_client import load_etcd3

T = TypeVar("T")

TIMEOUT: Final = 2.0
"""Seconds that one call may take before its endpoint counts as away."""

PATIENCE: Final = 5.0
"""Seconds for which a call goes on trying endpoints."""

_PAUSE: Final = 0.1
_THREADS: Final = 8

# A server that hangs answers no pings: known after 6 + 2 s. etcd forbids pings closer than 5 s.
_OPTIONS: Final = (
    ("grpc.keepalive_time_ms", 6000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", -1),
    # A new channel is a new connection, and not one to the server that has just failed.
    ("grpc.use_local_subchannel_pool", 1),
)
_WITH_LEADER: Final = (("hasleader", "true"),)


def prefix_end(prefix: bytes) -> bytes:
    """The first key behind all that begin with the prefix, which is not empty."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


@dataclass(frozen=True)
class Endpoints:
    """Where an etcd is, and how it is spoken to.

    :ivar addresses: ``(host, port)`` of each member, tried in this order.
    :ivar ca: path of the certificate authority's file; with it, TLS.
    :ivar cert: path of the client's certificate, with ``key``.
    """

    addresses: tuple[tuple[str, int], ...]
    user: str | None = None
    password: str | None = None
    ca: str | None = None
    cert: str | None = None
    key: str | None = None


class Away(RegistryError):
    """The endpoint could not be reached, or did not answer.

    :ivar sent: it may have got the call all the same, and done what it says.
    """

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class Channel:
    """A channel to one endpoint. Its calls block; any thread may make them."""

    def __init__(self, etcd3: Any, endpoints: Endpoints, address: tuple[str, int]) -> None:
        import grpc

        self.rpc = etcd3.etcdrpc
        self.address = f"{address[0]}:{address[1]}"
        self._error: type[Exception] = grpc.RpcError
        self._away = (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.StatusCode.CANCELLED,
            grpc.StatusCode.UNAUTHENTICATED,  # a token that has expired; the next channel asks anew
        )
        self._not_found = grpc.StatusCode.NOT_FOUND
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        with self.errors():
            self._client = etcd3.client(
                host=host,
                port=address[1],
                ca_cert=endpoints.ca,
                cert_cert=endpoints.cert,
                cert_key=endpoints.key,
                timeout=TIMEOUT,
                user=endpoints.user,
                password=endpoints.password,
                grpc_options=_OPTIONS,
            )
        # The token alone: with a channel that is not encrypted, call credentials are refused.
        self._metadata = tuple(self._client.metadata or ())

    def close(self) -> None:
        self._client.close()

    def errors(self) -> _Errors:
        """A context in which what gRPC raises becomes Away, LeaseLost or RegistryError."""
        return _Errors(self)

    def translated(self, error: Exception) -> RegistryError:
        code, details = error.code(), error.details() or ""  # type: ignore[attr-defined]
        text = f"etcd at {self.address}: {details or code}"
        if code in self._away:
            # gRPC's words for a connection that was never there.
            return Away(text, sent="failed to connect to all addresses" not in details)
        if code is self._not_found and "lease not found" in details:
            return LeaseLost(text)
        return RegistryError(text)

    def range(self, **fields: Any) -> Any:
        return self._call(self._client.kvstub.Range, self.rpc.RangeRequest(**fields))

    def txn(self, compare: list[Any], success: list[Any], failure: list[Any] | None = None) -> Any:
        request = self.rpc.TxnRequest(compare=compare, success=success, failure=failure or [])
        return self._call(self._client.kvstub.Txn, request)

    def grant(self, number: int, ttl: int) -> None:
        request = self.rpc.LeaseGrantRequest(ID=number, TTL=ttl)
        self._call(self._client.leasestub.LeaseGrant, request)

    def revoke(self, number: int) -> None:
        self._call(self._client.leasestub.LeaseRevoke, self.rpc.LeaseRevokeRequest(ID=number))

    def keep_alive(self, number: int, timeout: float) -> bool:
        """Renew a lease; whether it was still there."""
        request = self.rpc.LeaseKeepAliveRequest(ID=number)
        with self.errors():
            stream = self._client.leasestub.LeaseKeepAlive(
                iter((request,)), timeout, metadata=self._metadata + _WITH_LEADER
            )
            try:
                return bool(next(stream).TTL > 0)
            finally:
                stream.cancel()

    def watch(self, requests: Iterator[Any]) -> Any:
        """The stream of responses, an iterator with ``cancel()``; errors come out untranslated."""
        stub = self.rpc.WatchStub(self._client.channel)
        return stub.Watch(requests, metadata=self._metadata + _WITH_LEADER)

    def _call(self, method: Any, request: Any) -> Any:
        with self.errors():
            return method(request, TIMEOUT, metadata=self._metadata)


class _Errors:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if isinstance(error, self._channel._error):
            raise self._channel.translated(error) from error
        if isinstance(error, ValueError) and "closed" in str(error).lower():
            raise Away(f"etcd at {self._channel.address}: {error}", sent=False) from error


class Link:
    """All calls of one registry. :meth:`call` and :meth:`post` belong to its loop."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints
        self._etcd3 = load_etcd3()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="registry etcd")
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._next = 0
        self._closed = False
        self._undoing: set[asyncio.Task[None]] = set()

    async def call(
        self,
        work: Callable[[Channel], T],
        *,
        again: bool,
        undo: Callable[[Channel], object] | None = None,
    ) -> T:
        """What ``work`` returns or raises, done in a thread, after whatever is being undone.

        :param again: it may be done twice, so that one of which nobody knows is tried again.
        :param undo: is done afterwards if nobody will know of it: the call was cancelled or failed.
        """
        if self._undoing:
            await asyncio.wait(self._undoing)
        end = time.monotonic() + PATIENCE
        job: Future[T] | None = None
        try:
            while True:
                job = self._pool.submit(self._attempt, work)
                try:
                    return await asyncio.wrap_future(job)
                except Away as away:
                    if (away.sent and not again) or time.monotonic() >= end:
                        raise
                await asyncio.sleep(_PAUSE)
        except (Away, asyncio.CancelledError):
            if undo is not None and job is not None:
                self.undo(undo, after=job)
            raise

    def undo(self, work: Callable[[Channel], object], *, after: Future[Any] | None = None) -> None:
        """Have it done, before any call that follows; nobody hears of its failure."""
        if not self._closed:
            task = asyncio.ensure_future(self._undo(work, after))
            self._undoing.add(task)
            task.add_done_callback(self._undoing.discard)

    async def _undo(self, work: Callable[[Channel], object], after: Future[Any] | None) -> None:
        if after is not None and not after.cancelled():
            await asyncio.gather(asyncio.wrap_future(after), return_exceptions=True)
        with contextlib.suppress(RegistryError):
            await asyncio.wrap_future(self._pool.submit(self._attempt, work))

    def post(self, work: Callable[[Channel], object]) -> None:
        """Have it done; nobody waits for it, nor hears of its failure."""
        if not self._closed:
            self._pool.submit(self._attempt, work)

    async def close(self) -> None:
        """What was begun is still done."""
        self._closed = True
        if self._undoing:
            await asyncio.wait(self._undoing, timeout=TIMEOUT)
        self.abandon()

    def abandon(self) -> None:
        """Be gone: what is queued is not done."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.drop(None)

    # ------------------------------------------------------------------ from any thread

    def channel(self) -> Channel:
        """The channel of the moment. Raises Away."""
        with self._lock:
            if self._channel is None:
                addresses = self._endpoints.addresses
                address = addresses[self._next % len(addresses)]
                self._next += 1
                self._channel = Channel(self._etcd3, self._endpoints, address)
            return self._channel

    def drop(self, channel: Channel | None) -> None:
        """This channel's server is away (None: whichever it is): use another from now on."""
        with self._lock:
            if self._channel is None or channel not in {None, self._channel}:
                return
            channel, self._channel = self._channel, None
        channel.close()

    def _attempt(self, work: Callable[[Channel], T]) -> T:
        channel = self.channel()
        try:
            return work(channel)
        except Away:
            self.drop(channel)
            raise
