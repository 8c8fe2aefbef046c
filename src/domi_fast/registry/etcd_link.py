"""A channel to one member of an etcd, and the next one to the next member."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any, Final

from ..errors import RegistryError
from .base import LeaseLost
from .etcd_client import load_etcd3
from .link import TIMEOUT, Away
from .server_url import Endpoints

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


def connector(endpoints: Endpoints) -> Callable[[], Channel]:
    """Gives a channel at each call, to one member after the other."""
    etcd3 = load_etcd3()
    addresses = itertools.cycle(endpoints.addresses)
    return lambda: Channel(etcd3, endpoints, next(addresses))


class Channel:
    """A channel to one endpoint. Its calls block; any thread may make them."""

    def __init__(self, etcd3: Any, endpoints: Endpoints, address: tuple[str, int]) -> None:
        import grpc

        self.rpc = etcd3.etcdrpc
        self.address = f"{address[0]}:{address[1]}"
        self._error: type[Exception] = grpc.RpcError
        # The time of this call is over, or that of another, by which the channel was closed.
        self._silent = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
        self._away = (*self._silent, grpc.StatusCode.UNAVAILABLE)
        self._unauthenticated = grpc.StatusCode.UNAUTHENTICATED
        self._unknown = grpc.StatusCode.UNKNOWN
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

    def __str__(self) -> str:
        return f"etcd at {self.address}"

    def close(self) -> None:
        self._client.close()

    def errors(self) -> _Errors:
        """A context in which what gRPC raises becomes Away, LeaseLost or RegistryError."""
        return _Errors(self)

    def translated(self, error: Exception) -> RegistryError:
        code, details = error.code(), error.details() or ""  # type: ignore[attr-defined]
        text = f"{self}: {details or code}"
        if code in self._silent:
            text = f"{self} does not answer"
        # A token that has expired, or is older than the last change of users and roles: nothing was
        # done, and the next channel asks for another.
        if code is self._unauthenticated or "revision of auth store is old" in details:
            return Away(text, sent=False)
        # A member that gives up on one that is gone says so in Go's words, without a code.
        if code in self._away or (code is self._unknown and details.startswith("context ")):
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
            raise Away(f"{self._channel} does not answer", sent=False) from error
