"""The settings of nodes and guests, validated once, with what is allowed in each message."""

from __future__ import annotations

import dataclasses
import inspect
import ipaddress
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass
from typing import Any, ClassVar, Literal, get_args

from packaging.version import InvalidVersion, Version

from .breaker import Breaker
from .checks import check_number
from .errors import DomiError
from .handshake import MOST_LANES
from .limiter import RateLimit
from .tls import Tls
from .transport import LOOPBACK

MIB = 1024 * 1024
WhenFull = Literal["raise", "drop_oldest", "drop_newest", "disconnect"]
_CLUSTER = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,256}")
SECRET_VARIABLE = "DOMI_SECRET"
_SECRET_LEAST, _SECRET_MOST = 16, 1024
_BRACKETED = re.compile(r"\[([^\[\]]*:[^\[\]]*)\]")


def parse_version(text: str) -> Version:
    """The version as PEP 440 orders it; a leading ``V`` or ``v`` is ignored."""
    try:
        return Version(text)
    except InvalidVersion:
        raise ValueError(
            f"version {text!r}: a version is written as PEP 440 says, for example 1.4.2 or v2.0rc1"
        ) from None


def is_loopback(host: str) -> bool:
    """Whether the address can be reached from this machine alone."""
    if host in LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_token(what: str, token: object) -> None:
    """Raise ValueError, which does not repeat it, unless it is a bearer token of RFC 6750."""
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise ValueError(
            f"{what} is no token: 16 to 256 letters, digits and ._~+/=- are wanted, as "
            'python -c "import secrets; print(secrets.token_urlsafe())" makes them'
        )


def checked_secret(what: str, secret: object) -> bytes:
    """The secret as bytes. Raises TypeError or ValueError, which do not repeat it."""
    if not isinstance(secret, (str, bytes)):
        raise TypeError(f"{what} of type {type(secret).__name__}: str or bytes are wanted")
    try:
        raw = secret.encode() if isinstance(secret, str) else secret
    except UnicodeEncodeError:
        raise ValueError(f"{what} of characters that UTF-8 has no form for: give bytes") from None
    if not _SECRET_LEAST <= len(raw) <= _SECRET_MOST:
        raise ValueError(
            f"{what} of {len(raw)} bytes: {_SECRET_LEAST} to {_SECRET_MOST} are wanted, as "
            'python -c "import secrets; print(secrets.token_urlsafe())" makes them'
        )
    return raw


def check_on_error(function: object) -> None:
    """Raise TypeError unless it is None or a callable that need not be awaited."""
    if function is not None:
        check_callback("on_error", function, "a function or None")


def check_callback(name: str, function: object, wanted: str = "a function") -> None:
    """Raise TypeError unless it is a callable that need not be awaited."""
    if not callable(function):
        raise TypeError(f"{name} {function!r} is not callable: {wanted} is wanted")
    if any(map(inspect.iscoroutinefunction, (function, type(function).__call__))):
        raise TypeError(
            f"{name} {function!r} is an async def, which nobody would await: a plain function "
            "is wanted; it may start a task"
        )


class Checked:
    """What all settings have in common: how they are checked, and what is said of a wrong one."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @classmethod
    def check_names(cls, owner: str, settings: Iterable[str]) -> None:
        """Raise TypeError, which names them all, when ``owner`` is given what is no setting."""
        fields = cls.__dataclass_fields__
        unknown = sorted(set(settings) - set(fields))
        if unknown:
            raise TypeError(
                f"{owner} has no setting {', '.join(unknown)}; it has {', '.join(fields)}"
            )

    def _check_type(self, field: str, kind: type) -> None:
        value = getattr(self, field)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            # Not what it is: a key or a password is easily put where something else belongs.
            raise TypeError(f"{field} of type {type(value).__name__}: {kind.__name__} is wanted")

    def _check_port(self, field: str) -> None:
        if not 0 <= getattr(self, field) <= 65535:
            raise ValueError(
                f"{field} {getattr(self, field)}: 0 (the system chooses) to 65535 are allowed"
            )

    def _check_range(self, field: str, low: float, high: float) -> None:
        check_number(field, getattr(self, field), low, high)


class EndpointConfig(Checked):
    """The settings that nodes and guests have in common, and their checks.

    No dataclass itself: its fields would come before those of :class:`NodeConfig`, whose order is
    public.
    """

    name: str
    heartbeat_interval: float
    heartbeat_timeout: float
    phi_threshold: float | None
    request_timeout: float
    queue_limit: int
    frame_limit: int
    secret: str | bytes | None
    tls: Tls | None
    on_error: Callable[[DomiError, Any], object] | None

    def __post_init__(self) -> None:
        secret = os.environb.get(SECRET_VARIABLE.encode()) if self.secret is None else self.secret
        if secret is not None:
            where = SECRET_VARIABLE if self.secret is None else "secret"
            object.__setattr__(self, "secret", checked_secret(where, secret))
        if self.tls is not None:
            self._check_type("tls", Tls)
        self._check_type("queue_limit", int)
        self._check_type("frame_limit", int)
        if not isinstance(self.name, str) or not 1 <= _utf8_length(self.name) <= 255:
            raise ValueError(f"name {self.name!r}: a name is text of 1 to 255 bytes of UTF-8")
        check_on_error(self.on_error)
        self._check_range("heartbeat_interval", 0.1, 3600)
        self._check_range("heartbeat_timeout", 0.1, 86400)
        if self.heartbeat_timeout <= self.heartbeat_interval:
            raise ValueError(
                f"heartbeat_timeout {self.heartbeat_timeout}: it must be above the "
                f"heartbeat_interval of {self.heartbeat_interval}"
            )
        if self.phi_threshold is not None:
            self._check_range("phi_threshold", 1, 100)
        self._check_range("request_timeout", 0.001, 86400)
        self._check_range("queue_limit", 64 * 1024, 1 << 40)
        self._check_range("frame_limit", 4096, 0xFFFFFFFF)


@dataclass(frozen=True)
class GuestConfig(EndpointConfig):
    """The settings of a guest. ``connect(url, ...)`` fills it from its keyword arguments.

    :ivar name: what the node's log calls this guest: 1-255 bytes of UTF-8.
    :ivar cluster: refuse to talk to a node of another cluster; empty: whatever it is.
    :ivar secret: the cluster's, where its nodes have one; None is the environment's
        ``DOMI_SECRET``.
    :ivar tls: the certificate that it shows, where the nodes of the cluster show theirs.
    :ivar node: refuse to talk to a node of another name; empty: whichever it is.

    All others are as in :class:`NodeConfig`.
    """

    name: str = "guest"
    cluster: str = ""
    secret: str | bytes | None = dataclasses.field(default=None, repr=False)
    tls: Tls | None = None
    node: str = ""
    heartbeat_interval: float = 5.0
    heartbeat_timeout: float = 10.0
    phi_threshold: float | None = None
    request_timeout: float = 5.0
    queue_limit: int = 16 * MIB
    frame_limit: int = 16 * MIB
    on_error: Callable[[DomiError, Any], object] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_type("node", str)
        if self.cluster != "":
            check_cluster(self.cluster)


@dataclass(frozen=True)
class NodeConfig(EndpointConfig):
    """The settings of a node. ``Node(name, ...)`` fills it from its keyword arguments.

    :ivar name: what the node is, for people and for versions: 1-255 bytes of UTF-8.
    :ivar version: compared as PEP 440; an older node may not join once a newer one of its name is
        in the cluster.
    :ivar cluster: letters, digits, ``.``, ``_`` and ``-``, 1-64 of them.
    :ivar host: the address to listen on and to be found at; an IPv6 address may have brackets,
        which are taken off. Anything but loopback needs ``secret``, ``tls``, or
        ``insecure=True``.
    :ivar port: the TCP port; 0 lets the system choose.
    :ivar unix_path: listen on this UNIX socket as well; peers on this machine prefer it. A relative
        path is made absolute here; it may then have 107 bytes.
    :ivar http_port: serve the admin pages (docs/admin.md) on this TCP port of ``host``; 0 lets the
        system choose, None serves none. Needs ``domi-fast[admin]``.
    :ivar admin_token: what a caller must show before the admin pages change anything: 16-256
        letters, digits and ``._~+/=-``. None is the environment's ``DOMI_ADMIN_TOKEN``; without
        either, only callers from this machine may.
    :ivar registry: a registry URL; None is an SQLite file for the cluster in the user's runtime
        directory.
    :ivar secret: 16-1,024 bytes (or text, as UTF-8) that all nodes and guests of the cluster
        share; None is the environment's ``DOMI_SECRET``. Who does not know it is refused
        (docs/security.md). It alone does not encrypt.
    :ivar tls: the certificate by which the node is known to others, and theirs to it
        (:class:`~domi_fast.tls.Tls`); everything is encrypted.
    :ivar insecure: listen on ``host`` though others can reach it, and there is neither.
    :ivar busy_poll: seconds to keep polling after the last traffic before blocking, at most 1; it
        costs a core meanwhile.
    :ivar heartbeat_interval: seconds between heartbeats, 0.1 or more.
    :ivar heartbeat_timeout: seconds of silence after which a peer is lost; above the interval.
    :ivar phi_threshold: a peer is lost before that, once the chance that its silence ends by itself
        is 10 to the minus so many, by the rhythm in which it has answered heartbeats until then
        (the phi-accrual detector; 8 is usual, and 2.4 intervals of a regular peer). None: the
        timeout alone decides.
    :ivar handshake_timeout: seconds within which a new connection must have named itself.
    :ivar handshakes_per_address: connections of one address that may be in their handshake at a
        time; more are closed at once. None: 1,024, with TLS 256, or a quarter of the descriptors
        that the process may have if that is less.
    :ivar session_limit: connections that others may have to this node, guests' among them; more are
        closed at once. Half of them may be in their handshake at a time: for one more, the oldest
        such of the address that has most is closed. None: three quarters of the descriptors that
        the process may have.
    :ivar sessions_per_address: of them, those of one address. None: half of ``session_limit``.
    :ivar channel_limit: channels that may be subscribed on this node, or by one peer or guest: a
        subscription more raises Overloaded here, and closes the session of who asks for it.
    :ivar subscriber_limit: guests of this node that may subscribe to one channel: the session of
        one more is closed, which hears why, and it is counted (``refused_subscribers``).
    :ivar handler_limit: ``async def`` handlers that may run at a time: a request more is answered
        with Overloaded, any other message is dropped and counted (``handlers_overloaded``).
    :ivar request_timeout: seconds: the deadline of a ``request`` that names none.
    :ivar start_timeout: seconds that ``start`` waits for the registered peers.
    :ivar drain_timeout: seconds that ``close`` waits for handlers and queues.
    :ivar roll_deadline: seconds to finish in when a newer version of the name has come, and this
        node drains by itself; None stays.
    :ivar weight: how much of the others' messages the node is to get, beside the other subscribers,
        where a weighted policy chooses; above 0.
    :ivar balance: the policy of every channel that has none of its own: a name, or an object
        (:mod:`domi_fast.balance`).
    :ivar breaker: when a peer that does not answer is left alone
        (:class:`~domi_fast.breaker.Breaker`); None for never.
    :ivar rate_limit: of what is sent to all peers together
        (:class:`~domi_fast.limiter.RateLimit`); None for no limit.
    :ivar peer_rate_limit: of what is sent to each peer; None for no limit.
    :ivar memory_interval: seconds between two looks at how much memory this machine (or this
        cgroup) uses, which the peers are told, for ``least_memory``.
    :ivar lease_ttl: seconds after which the registry forgets a node that has died.
    :ivar queue_limit: bytes that may wait on each connection to a peer; for more, ``when_full``
        says what is done.
    :ivar node_queue_limit: bytes that may wait for all peers and guests together, beyond 64 KiB for
        each of them; at least ``queue_limit``. None: 256 MiB, or ``queue_limit`` if that is more.
    :ivar when_full: what is done with a message for a peer whose queue is full: ``raise``
        Overloaded, ``drop_oldest`` or ``drop_newest`` of what nobody waits for an answer to, or
        ``disconnect`` that peer. A ``request`` waits for room. ``node.when_full`` says otherwise
        for a channel or a peer.
    :ivar frame_limit: the largest frame in bytes, header included.
    :ivar on_error: called with (exception, Frame) for what is refused or lost after its verb
        returned, and for each subscriber that a publish has left out; None logs it. No
        ``async def``. Whom its own publishes leave out is only counted.
    :ivar sessions_per_peer: connections that make up the session with each peer, 1-16, over which
        the channels are spread; with a peer that has fewer, as many as it has. Each channel keeps
        its order (docs/concepts.md, "Lanes").
    """

    name: str
    version: str = "0"
    cluster: str = "default"
    host: str = "127.0.0.1"
    port: int = 0
    unix_path: str | None = None
    http_port: int | None = None
    admin_token: str | None = dataclasses.field(default=None, repr=False)
    registry: str | None = dataclasses.field(default=None, repr=False)
    secret: str | bytes | None = dataclasses.field(default=None, repr=False)
    tls: Tls | None = None
    insecure: bool = False
    busy_poll: float = 0.0
    heartbeat_interval: float = 5.0
    heartbeat_timeout: float = 10.0
    phi_threshold: float | None = None
    handshake_timeout: float = 2.0
    handshakes_per_address: int | None = None
    session_limit: int | None = None
    sessions_per_address: int | None = None
    channel_limit: int = 16_384
    subscriber_limit: int = 16_384
    handler_limit: int = 65_536
    request_timeout: float = 5.0
    start_timeout: float = 5.0
    drain_timeout: float = 2.0
    roll_deadline: float | None = 30.0
    weight: float = 1.0
    balance: Any = "round_robin"
    memory_interval: float = 1.0
    breaker: Breaker | None = dataclasses.field(default_factory=Breaker)
    rate_limit: RateLimit | None = None
    peer_rate_limit: RateLimit | None = None
    lease_ttl: float = 3.0
    queue_limit: int = 16 * MIB
    node_queue_limit: int | None = None
    when_full: WhenFull = "raise"
    frame_limit: int = 16 * MIB
    on_error: Callable[[DomiError, Any], object] | None = None
    sessions_per_peer: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, kind in (("version", str), ("host", str), ("port", int), ("insecure", bool)):
            self._check_type(field, kind)
        for field, kind in (("unix_path", str), ("registry", str), ("http_port", int)):
            if getattr(self, field) is not None:
                self._check_type(field, kind)
        check_cluster(self.cluster)
        parse_version(self.version)
        if len(self.version) > 255:
            raise ValueError(f"version {self.version!r}: at most 255 characters are allowed")
        self._check_port("port")
        if self.http_port is not None:
            self._check_port("http_port")
        if self.admin_token is not None:
            check_token("admin_token", self.admin_token)
            if self.http_port is None:
                raise ValueError("admin_token without http_port: there is nothing that it keeps")
        if self.registry == "":
            raise ValueError(
                "registry '': a registry URL is wanted, or None for the cluster's file in your "
                "runtime directory"
            )
        if self.unix_path is not None:
            object.__setattr__(self, "unix_path", _socket_path(self.unix_path))
        object.__setattr__(self, "host", _host(self.host))
        guarded = self.secret is not None or self.tls is not None
        if not (guarded or self.insecure or is_loopback(self.host)):
            raise DomiError(
                f"host {self.host!r} can be reached from other machines, and nothing keeps "
                "strangers out: give all nodes and guests a secret= or tls=, listen on 127.0.0.1, "
                "or say insecure=True"
            )
        self._check_range("busy_poll", 0.0, 1.0)
        self._check_range("handshake_timeout", 0.01, 60)
        for field in ("handshakes_per_address", "session_limit", "sessions_per_address"):
            if getattr(self, field) is not None:
                self._check_type(field, int)
                self._check_range(field, 1, 1 << 20)
        for field, most in (
            ("channel_limit", 65_536),
            ("subscriber_limit", 1 << 20),
            ("handler_limit", 1 << 24),
        ):
            self._check_type(field, int)
            self._check_range(field, 1, most)
        self._check_type("sessions_per_peer", int)
        self._check_range("sessions_per_peer", 1, MOST_LANES)
        self._check_lanes()
        self._check_range("start_timeout", 0, 3600)
        self._check_range("drain_timeout", 0, 3600)
        self._check_range("weight", 1e-6, 1e6)
        if self.breaker is not None:
            self._check_type("breaker", Breaker)
        for limit in ("rate_limit", "peer_rate_limit"):
            if getattr(self, limit) is not None:
                self._check_type(limit, RateLimit)
        self._check_range("memory_interval", 0.01, 3600)
        if self.roll_deadline is not None:
            self._check_range("roll_deadline", 0, 3600)
        self._check_range("lease_ttl", 0.1, 3600)
        if self.node_queue_limit is not None:
            self._check_type("node_queue_limit", int)
            self._check_range("node_queue_limit", self.queue_limit, 1 << 50)
        if self.when_full not in get_args(WhenFull):
            allowed = ", ".join(map(repr, get_args(WhenFull)))
            raise ValueError(f"when_full {self.when_full!r}: one of {allowed} is wanted")

    def _check_lanes(self) -> None:
        # A peer has as many connections of this one as it has lanes itself.
        for field, each in (
            ("handshakes_per_address", 1),
            ("sessions_per_address", 1),
            ("session_limit", 2),  # half of them may be in their handshake, or of one address
        ):
            most, least = getattr(self, field), each * self.sessions_per_peer
            if most is not None and self.sessions_per_peer > 1 and most < least:
                raise ValueError(
                    f"{field} {most}: no peer of {self.sessions_per_peer} connections "
                    f"(sessions_per_peer) would get in: at least {least} is wanted"
                )


@dataclass(frozen=True)
class SerialConfig(Checked):
    """The settings of serial mode. ``Serial(node, ...)`` fills it from its keyword arguments.

    :ivar ring_size: bytes of the ring in which messages wait: a power of two, 2**12 to 2**30.
    :ivar tick: seconds: the resolution of ``call_later`` and ``every``, 0.00001 to 1.
    :ivar thread: run handlers and timers on a thread of their own, not on the node's loop.
    :ivar max_pending: messages of a channel that may wait for those that they are joined with.
    :ivar drain_budget: seconds that the ring may take of a tick before the timers have their turn.
    :ivar timer_budget: seconds that due timers may take of a tick before the ring has its turn.
    :ivar busy_poll: seconds to keep looking for more after the last message before sleeping, at
        most 1; it costs a core meanwhile.
    """

    ring_size: int = 2 * MIB
    tick: float = 0.001
    thread: bool = False
    max_pending: int = 65536
    drain_budget: float = 0.0005
    timer_budget: float = 0.0005
    busy_poll: float = 0.0

    def __post_init__(self) -> None:
        self._check_type("ring_size", int)
        self._check_type("thread", bool)
        self._check_type("max_pending", int)
        if not 1 << 12 <= self.ring_size <= 1 << 30 or self.ring_size & (self.ring_size - 1):
            raise ValueError(
                f"ring_size {self.ring_size}: a power of two from {1 << 12} to {1 << 30} bytes is "
                "wanted"
            )
        self._check_range("busy_poll", 0.0, 1.0)
        self._check_range("tick", 0.00001, 1.0)
        self._check_range("max_pending", 1, 1 << 30)
        self._check_range("drain_budget", 0.00001, 1.0)
        self._check_range("timer_budget", 0.00001, 1.0)


def _utf8_length(text: str) -> int:
    """Bytes of UTF-8; 0 for what has no such form."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return 0


def check_cluster(cluster: object) -> None:
    """Raise ValueError unless it is the name of a cluster."""
    if not isinstance(cluster, str) or not _CLUSTER.fullmatch(cluster):
        raise ValueError(
            f"cluster {cluster!r}: 1 to 64 letters, digits, '.', '_' and '-' are allowed"
        )


def _socket_path(path: str) -> str:
    """The absolute path: the socket's file is to be found also after a ``chdir``."""
    # An empty path would become that of the current directory.
    absolute = os.path.abspath(path) if path else ""
    try:
        length = len(os.fsencode(absolute))
    except UnicodeEncodeError:
        length = 0
    if "\0" in absolute or not 1 <= length <= 107:
        raise ValueError(
            f"unix_path {path!r}: the absolute path of a UNIX socket has 1 to 107 bytes, none of "
            f"them NUL; this one is {absolute!r}"
        )
    return absolute


def _host(host: str) -> str:
    """The host without the brackets that an IPv6 address has in a URL."""
    bracketed = _BRACKETED.fullmatch(host)
    plain = bracketed[1] if bracketed else host
    if not plain or not plain.isprintable() or any(sign in plain for sign in "[] "):
        raise ValueError(
            f"host {host!r}: an address or a name is wanted, for example 127.0.0.1 or ::1"
        )
    return plain
