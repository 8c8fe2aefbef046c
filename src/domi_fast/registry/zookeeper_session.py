"""A session with a ZooKeeper: kazoo's client, its waits bounded and its errors ours.

The client finds another server by itself when its connection breaks, and goes on with the same
session. When the server has ended the session, the client of a lease ends with it; that of the
registry itself begins another.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final, cast

from ..errors import RegistryError
from .base import LeaseLost
from .link import TIMEOUT, Away
from .server_url import Endpoints

# kazoo warns at each attempt to connect again; what cannot be reached is told by the calls.
log = logging.getLogger("domi_fast.kazoo")
if log.level == logging.NOTSET:
    log.setLevel(logging.ERROR)

_BOTH_WAYS: Final = 2  # of a socket's shutdown
_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 0.5
# Seconds that a server may take to greet at first; of a session that ends, half its length at most.
_GREETING: Final = 1.0


def load_kazoo() -> Any:
    """The package ``kazoo``. Raises RegistryError when it is not installed."""
    try:
        import kazoo.client
        import kazoo.exceptions
        import kazoo.handlers.threading
        import kazoo.protocol.connection
        import kazoo.security
    except ImportError as error:
        raise RegistryError(
            f"the ZooKeeper registry needs the extra [zookeeper], which cannot be imported "
            f"({error}): pip install 'domi-fast[zookeeper]'"
        ) from error
    return kazoo


class Session:
    """One session. Its calls block; any thread may make them.

    A node that is not there, is there or has another version gives kazoo's own exception.

    :param timeout: seconds without a word from us after which the server may end it, as wished.
    :param told: is called by a thread of the client when what a watch was set on has changed, with
        its path; with None when the connection was lost, and all watches with it.
    :param mortal: it ends for good when the server ends it, and only the calls made over it keep
        it alive: kazoo's own pings would outlast a loop that hangs.
    :ivar timeout: seconds as the server has granted them.
    :ivar number: what the server knows it by; with its password, the identity.
    :ivar heard: when the session and its renewals that were answered were asked for, on
        ``time.monotonic()``: those that still matter.
    :ivar prepared: whether the nodes that have to be there have been seen to.
    """

    def __init__(
        self,
        kazoo: Any,
        endpoints: Endpoints,
        timeout: float,
        *,
        told: Callable[[str | None], None] | None = None,
        mortal: bool = False,
    ) -> None:
        self.errors = kazoo.exceptions
        self.timeout = timeout
        self.number = 0
        self.identity: tuple[int, bytes] | None = None
        self.heard: deque[float] = deque()
        self.prepared = False
        self._told = told
        self.mortal = mortal
        self._shown = ",".join(f"{host}:{port}" for host, port in endpoints.addresses)
        self.lock = threading.Lock()
        self.connection: Any = None  # the socket
        self.problem = "it cannot be reached"
        self._stopping = False
        self.lost = threading.Event()  # the server has ended it, or we have
        self._broken = False  # the connection was lost after its end was asked for
        self._away_since: float | None = time.monotonic()
        self._connected = threading.Event()
        self._make_client = partial(_make_client, self, kazoo, endpoints, timeout)
        self._client = self._make_client()
        self._client.add_listener(self._on_state)

    def __str__(self) -> str:
        return f"ZooKeeper at {self._shown}"

    # ------------------------------------------------------------------ its life

    def start(self) -> None:
        """Begin to connect. Does not block; whatever is called waits for the connection."""
        self._client.start_async()

    def wait(self, limit: float = TIMEOUT) -> None:
        """Wait for the connection. Raises Away, and LeaseLost if the session is over."""
        if self.lost.is_set():
            raise self._over()
        if not self._connected.wait(limit):
            raise Away(f"{self}: {self.problem}", sent=False)

    def end(self) -> None:
        """End it in the server, with all that is bound to it. Raises Away if that is uncertain."""
        if self.lost.is_set():
            return
        self.wait()
        self._stop()
        if self._broken:
            # What was not told to the server has to be told by another client.
            self._stopping = self._broken = False
            self.lost.clear()
            self._client = self._make_client(self.identity)
            self._client.add_listener(self._on_state)
            self.start()
            raise Away(f"{self}: the connection was lost at the session's end", sent=True)

    def close(self) -> None:
        """End it if the server can be reached while it lasts; nobody waits for that."""
        threading.Thread(target=self._close, name=f"end of a session {self}", daemon=True).start()

    def abandon(self) -> None:
        """Be gone as a killed process is: the server is not told."""
        with self.lock:
            self.lost.set()
        self.sever()
        self.close()

    def sever(self) -> None:
        """Break the connection: kazoo is slow to notice that a server hangs."""
        if self.connection is not None:
            with contextlib.suppress(OSError):
                self.connection.shutdown(_BOTH_WAYS)

    def away_for(self) -> float:
        """Seconds since it was connected."""
        since = self._away_since
        return 0.0 if since is None else time.monotonic() - since

    def _close(self) -> None:
        if not self.lost.is_set():
            self._connected.wait(self.timeout)
        self._stop()

    def _stop(self) -> None:
        with self.lock:
            if self._stopping:
                return
            self._stopping = True
        self._broken = not self._connected.is_set()
        # A server that hangs is not waited for longer.
        timer = threading.Timer(TIMEOUT, self.sever)
        timer.start()
        try:
            self._client.stop()
            self._client.close()
        finally:
            timer.cancel()
            self.lost.set()

    def _on_state(self, state: str) -> None:
        """Called by the connection's thread."""
        if state == "CONNECTED":
            self._away_since = None
            self._connected.set()
            return
        self._connected.clear()
        if self._away_since is None:
            self._away_since = time.monotonic()
        if state == "SUSPENDED":
            self._broken = self._broken or self._stopping
        elif self.mortal:
            with self.lock:
                self.lost.set()
        if self._told is not None:
            self._told(None)

    # ------------------------------------------------------------------ calls

    def pipeline(self, *calls: Callable[[Any], Any]) -> list[Any]:
        """What each asynchronous call of kazoo's client gives; None where there is no such node.

        The server answers them in this order. Raises Away, and LeaseLost if the session is over.
        """
        self.wait()
        pending = [call(self._client) for call in calls]
        return [self._result(each, missing=None) for each in pending]

    def read(self, *calls: Callable[[Any], Any]) -> list[Any]:
        """As :meth:`pipeline`, and none of it older than this call."""
        return self.pipeline(lambda c: c.sync_async("/"), *calls)[1:]

    def commit(self, fill: Callable[[Any], None]) -> list[Any]:
        """The results of a transaction that is done as a whole.

        Raises what the first operation that could not be done gave.
        """
        self.wait()
        transaction = self._client.transaction()
        fill(transaction)
        results: list[Any] = self._result(transaction.commit_async())
        for result in results:
            if isinstance(result, self.errors.RolledBackError):
                continue
            if isinstance(result, Exception):
                raise self._translated(result) from None
        return results

    def sync(self, limit: float) -> None:
        """A round trip to the ensemble's leader, of at most so many seconds."""
        self.wait(limit)
        self._result(self._client.sync_async("/"), limit)

    def on_change(self, event: Any) -> None:
        """To be set as kazoo's watch."""
        if self._told is not None and event.path is not None:
            self._told(event.path)

    def _result(self, pending: Any, limit: float = TIMEOUT, **default: Any) -> Any:
        try:
            return pending.get(timeout=limit)
        except self._client.handler.timeout_exception as error:
            self.sever()
            raise Away(f"{self}: it does not answer", sent=True) from error
        except self.errors.NoNodeError:
            if "missing" in default:
                return default["missing"]
            raise
        except self.errors.KazooException as error:
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> Exception:
        errors = self.errors
        if isinstance(error, (errors.NoNodeError, errors.NodeExistsError, errors.BadVersionError)):
            return cast(Exception, error)
        if isinstance(error, (errors.SessionExpiredError, errors.ConnectionClosedError)):
            return self._over()
        if isinstance(error, (errors.ConnectionLoss, errors.SessionMovedError)):
            return Away(f"{self}: the connection was lost", sent=True)
        if isinstance(error, (errors.NoAuthError, errors.AuthFailedError)):
            return RegistryError(
                f"{self}: the nodes there are not open to this user; check the URL's user and "
                "password, or use another root"
            )
        return RegistryError(f"{self}: {type(error).__name__} {error}")

    def _over(self) -> RegistryError:
        if self.mortal:
            return LeaseLost(f"{self}: the session of the lease is over")
        return Away(f"{self}: the session is over", sent=True)


def _make_client(
    session: Session,
    kazoo: Any,
    endpoints: Endpoints,
    timeout: float,
    identity: tuple[int, bytes] | None = None,
) -> Any:
    """kazoo's client for a session: a new one, or that of this identity."""
    shortest = min(_GREETING, timeout / 2) if session.mortal else _GREETING
    patience = shortest

    class Handler(kazoo.handlers.threading.SequentialThreadingHandler):  # type: ignore[misc]
        def create_connection(self, *args: Any, **kwargs: Any) -> Any:
            """Where every connection begins; not a further one for a session that is over."""
            with session.lock:
                if session.lost.is_set():
                    raise ConnectionError("the session is over")
            try:
                made = super().create_connection(*args, **{**kwargs, "timeout": TIMEOUT})
            except Exception as error:
                session.problem = str(error) or type(error).__name__
                raise
            session.connection = made
            return made

    class Connection(kazoo.protocol.connection.ConnectionHandler):  # type: ignore[misc]
        def _invoke(self, timeout: float, request: Any, xid: int | None = None) -> Any:
            """The greeting says how long a session the server grants, and is heard only here.

            kazoo would wait for it no longer than the session is wished to be. A server that is
            just starting may take a connection and never greet: another is tried in good time, and
            one that is slow has longer with each try.
            """
            if not isinstance(request, kazoo.protocol.connection.Connect):
                return super()._invoke(timeout, request, xid)
            nonlocal patience
            asked = time.monotonic()
            try:
                made = super()._invoke(patience, request, xid)
            except Exception as error:
                session.problem = str(error) or "it does not answer"
                patience = min(TIMEOUT, 2 * patience)
                raise
            patience = shortest
            if made[0].time_out > 0:
                session.timeout = made[0].time_out / 1000.0
                if not session.heard:
                    session.heard.append(asked)
                session.number = made[0].session_id
                session.identity = (made[0].session_id, made[0].passwd)
            return made

        def _send_ping(self, connect_timeout: float) -> None:
            if not session.mortal:
                super()._send_ping(connect_timeout)

    login = endpoints.user is not None
    client = kazoo.client.KazooClient(
        hosts=",".join(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            for host, port in endpoints.addresses
        ),
        timeout=timeout,
        handler=Handler(),
        client_id=identity,
        auth_data=[("digest", f"{endpoints.user}:{endpoints.password}")] if login else None,
        default_acl=kazoo.security.CREATOR_ALL_ACL if login else None,
        connection_retry={
            "max_tries": -1,
            "delay": _PAUSE,
            "backoff": 2,
            "max_delay": _LONGEST_PAUSE,
        },
        logger=log,
        use_ssl=endpoints.ca is not None,
        ca=endpoints.ca,
        certfile=endpoints.cert,
        keyfile=endpoints.key,
        check_hostname=endpoints.ca is not None,
    )
    client._connection = Connection(client, client._conn_retry.copy(), logger=log)
    return client
