"""NodeConfig: every setting of a node, validated once, with what is allowed in each message."""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

from .errors import DomiError

MIB = 1024 * 1024
_CLUSTER = re.compile(r"[A-Za-z0-9._-]{1,64}")


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
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class NodeConfig:
    """The settings of a node. ``Node(name, ...)`` fills it from its keyword arguments.

    :ivar name: what the node is, for people and for versions: 1-255 bytes of UTF-8.
    :ivar version: compared as PEP 440; an older node may not join once a newer one of its name is
        in the cluster.
    :ivar cluster: letters, digits, ``.``, ``_`` and ``-``, 1-64 of them.
    :ivar host: the address to listen on and to be found at. Anything but loopback needs
        ``insecure=True`` as long as there is neither a secret nor TLS.
    :ivar port: the TCP port; 0 lets the system choose.
    :ivar unix_path: listen on this UNIX socket as well; peers on this machine prefer it.
    :ivar registry: a registry URL; None is an SQLite file for the cluster in the user's runtime
        directory.
    :ivar heartbeat_interval: seconds between heartbeats, 0.1 or more.
    :ivar heartbeat_timeout: seconds of silence after which a peer is lost; above the interval.
    :ivar handshake_timeout: seconds within which a new connection must have named itself.
    :ivar request_timeout: seconds: the deadline of a ``request`` that names none.
    :ivar start_timeout: seconds that ``start`` waits for the registered peers.
    :ivar drain_timeout: seconds that ``close`` waits for handlers and queues.
    :ivar lease_ttl: seconds after which the registry forgets a node that has died.
    :ivar queue_limit: bytes that may wait for one peer before sending to it raises Overloaded.
    :ivar frame_limit: the largest frame in bytes, header included.
    :ivar on_error: called with (exception, Frame) for what is refused or lost after its verb
        returned; None logs it.
    """

    name: str
    version: str = "0"
    cluster: str = "default"
    host: str = "127.0.0.1"
    port: int = 0
    unix_path: str | None = None
    http_port: int | None = None
    registry: str | None = None
    secret: str | bytes | None = None
    tls: object | None = None
    insecure: bool = False
    busy_poll: float = 0.0
    heartbeat_interval: float = 5.0
    heartbeat_timeout: float = 10.0
    handshake_timeout: float = 2.0
    request_timeout: float = 5.0
    start_timeout: float = 5.0
    drain_timeout: float = 2.0
    lease_ttl: float = 3.0
    queue_limit: int = 16 * MIB
    frame_limit: int = 16 * MIB
    on_error: Callable[[DomiError, Any], object] | None = None

    def __post_init__(self) -> None:
        for field, unset in (
            ("http_port", None),
            ("secret", None),
            ("tls", None),
            ("busy_poll", 0.0),
        ):
            if getattr(self, field) != unset:
                raise DomiError(
                    f"{field}={getattr(self, field)!r}: this version has no {field} yet; leave it "
                    f"at {unset!r}"
                )
        for field, kind in (
            ("version", str),
            ("host", str),
            ("port", int),
            ("insecure", bool),
            ("queue_limit", int),
            ("frame_limit", int),
        ):
            self._check_type(field, kind)
        for field, kind in (("unix_path", str), ("registry", str)):
            if getattr(self, field) is not None:
                self._check_type(field, kind)
        if not isinstance(self.name, str) or not 1 <= len(self.name.encode()) <= 255:
            raise ValueError(f"name {self.name!r}: a name is text of 1 to 255 bytes")
        if not isinstance(self.cluster, str) or not _CLUSTER.fullmatch(self.cluster):
            raise ValueError(
                f"cluster {self.cluster!r}: 1 to 64 letters, digits, '.', '_' and '-' are allowed"
            )
        parse_version(self.version)
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port {self.port}: 0 (the system chooses) to 65535 are allowed")
        if self.unix_path is not None and not 1 <= len(os.fsencode(self.unix_path)) <= 107:
            raise ValueError(
                f"unix_path {self.unix_path!r}: the path of a UNIX socket has 1 to 107 bytes"
            )
        if not is_loopback(self.host) and not self.insecure:
            raise DomiError(
                f"host {self.host!r} can be reached from other machines, and nothing keeps "
                "strangers out: listen on 127.0.0.1, or say insecure=True"
            )
        if self.on_error is not None and not callable(self.on_error):
            raise TypeError(f"on_error {self.on_error!r} is not callable")
        self._check_range("heartbeat_interval", 0.1, 3600.0)
        self._check_range("heartbeat_timeout", 0.1, 86400.0)
        if self.heartbeat_timeout <= self.heartbeat_interval:
            raise ValueError(
                f"heartbeat_timeout {self.heartbeat_timeout}: it must be above the "
                f"heartbeat_interval of {self.heartbeat_interval}"
            )
        self._check_range("handshake_timeout", 0.01, 60.0)
        self._check_range("request_timeout", 0.001, 86400.0)
        self._check_range("start_timeout", 0.0, 3600.0)
        self._check_range("drain_timeout", 0.0, 3600.0)
        self._check_range("lease_ttl", 0.1, 3600.0)
        self._check_range("queue_limit", 64 * 1024, 1 << 40)
        self._check_range("frame_limit", 4096, 0xFFFFFFFF)

    def _check_type(self, field: str, kind: type) -> None:
        value = getattr(self, field)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise TypeError(f"{field} {value!r}: {kind.__name__} is wanted")

    def _check_range(self, field: str, low: float, high: float) -> None:
        value = getattr(self, field)
        if not isinstance(value, (int, float)) or math.isnan(value) or not low <= value <= high:
            raise ValueError(f"{field} {value!r}: {low:g} to {high:g} are allowed")
