"""The settings of a gateway, and what its ``authenticate`` is asked."""

from __future__ import annotations

import inspect
import ssl
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias
from urllib.parse import urlsplit

from ..config import MIB, Checked
from ..errors import DomiError

Identity: TypeAlias = "str | bytes | bool | None"


@dataclass(frozen=True)
class Login:
    """A client that wants in, as ``authenticate`` sees it.

    :ivar data: of its HELLO: a token, a password, whatever the program has agreed on.
    :ivar address: where its connection comes from, for people.
    :ivar path: of the WebSocket's URL, with its query; empty over raw TCP.
    :ivar headers: of the WebSocket's request, with names in lower case, the last of each name;
        empty over raw TCP.
    """

    data: bytes
    address: str
    path: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


Authenticate: TypeAlias = Callable[[Login], "Identity | Awaitable[Identity]"]


@dataclass(frozen=True)
class GatewayConfig(Checked):
    """The settings of a gateway. ``Gateway(node, ...)`` fills it from its keyword arguments.

    :ivar host: the address that clients find it at.
    :ivar port: the TCP port for WebSockets; 0 lets the system choose, None takes none.
    :ivar tcp_port: the TCP port for raw frames; 0 lets the system choose, None takes none.
    :ivar http_port: the TCP port of ``GET /place/<service>``; 0 lets the system choose, None
        serves no pages.
    :ivar tls: the context by which all three ports speak TLS; None for plain sockets.
    :ivar service: the name of the nodes whose groups are meant where a client names no node; None:
        of the only service there is.
    :ivar authenticate: ``def`` or ``async def``, called with a :class:`Login` for each HELLO. It
        returns who that is, up to 255 bytes of ``bytes`` or text, which the handlers of groups
        get; True for nobody in particular; None or False refuses. One that raises
        :class:`~domi_fast.errors.AuthError` refuses too, with its text for a reason. None takes
        everybody.
    :ivar authenticate_timeout: seconds from the opening of a connection to its end, unless it has
        been let in by then.
    :ivar origins: the origins that a browser's page may come from (``https://example.com``), or
        ``"*"`` for all. None: only pages of the host and port that they connect to. A client that
        names no origin is no browser, and not kept out by this.
    :ivar message_limit: bytes of a client's frame, header included.
    :ivar rate: messages a second that a client may send, each fragment and control frame counted,
    :ivar burst: and how many at once after a pause. For one more it is cut (4002).
    :ivar write_limit: bytes that may wait for a client. For more it is cut (4003), and may resume
        its session: so it has to be more than the largest frame that groups send.
    :ivar ping_interval: seconds of silence after which a client is pinged,
    :ivar ping_timeout: and seconds after that in which it has to answer; else it is cut (4005).
    :ivar grace: seconds that a session outlives its connection; 0 for none.
    :ivar history: frames that are kept for a client that may come back,
    :ivar history_bytes: and how many bytes they may have together.
    :ivar client_limit: connections of clients. None: three quarters of the descriptors that the
        process may have. More are refused (1013; with HTTP status 503 where a WebSocket begins).
        Of the sessions whose clients are away there are as many at most: for one more, the session
        ends whose client has been away for longest.
    :ivar groups_per_client: groups that a client may be in, or write to.
    :ivar held_limit: messages that wait for a group to be found, for each group,
    :ivar held_bytes: and how many bytes they may have, of all groups together.
    :ivar handler_limit: ``async def`` handlers of the gateway's own events that may run at a time:
        a message more is refused (OVERLOADED).
    :ivar place_timeout: seconds in which a group has to be found or made.
    """

    host: str = "127.0.0.1"
    port: int | None = 0
    tcp_port: int | None = None
    http_port: int | None = None
    tls: ssl.SSLContext | None = None
    service: str | None = None
    authenticate: Authenticate | None = None
    authenticate_timeout: float = 5.0
    origins: Collection[str] | None = None
    message_limit: int = 64 * 1024
    rate: float = 1000.0
    burst: int = 2000
    write_limit: int = MIB
    ping_interval: float = 20.0
    ping_timeout: float = 20.0
    grace: float = 30.0
    history: int = 256
    history_bytes: int = MIB // 4
    client_limit: int | None = None
    groups_per_client: int = 64
    held_limit: int = 1024
    held_bytes: int = 16 * MIB
    handler_limit: int = 4096
    place_timeout: float = 10.0

    def __post_init__(self) -> None:
        self._check_type("host", str)
        for name in ("port", "tcp_port", "http_port"):
            if getattr(self, name) is not None:
                self._check_type(name, int)
                self._check_port(name)
        if self.port is None and self.tcp_port is None:
            raise ValueError("port and tcp_port are None: a gateway listens on one of them")
        if self.tls is not None:
            self._check_type("tls", ssl.SSLContext)
        if self.service is not None:
            self._check_type("service", str)
        if self.authenticate is not None and not callable(self.authenticate):
            raise TypeError(
                f"authenticate {self.authenticate!r} is not callable: a function of a Login is "
                "wanted, or None to take everybody"
            )
        if inspect.isgeneratorfunction(self.authenticate):
            raise TypeError("authenticate is a generator, which nobody would run: return who it is")
        self._check_origins()
        for name, low, high in (
            ("message_limit", 64, 1 << 30),
            ("burst", 1, 1 << 30),
            ("write_limit", 4096, 1 << 40),
            ("history", 0, 1 << 20),
            ("history_bytes", 0, 1 << 40),
            ("groups_per_client", 1, 1 << 20),
            ("held_limit", 1, 1 << 24),
            ("held_bytes", 4096, 1 << 40),
            ("handler_limit", 1, 1 << 24),
        ):
            self._check_type(name, int)
            self._check_range(name, low, high)
        if self.client_limit is not None:
            self._check_type("client_limit", int)
            self._check_range("client_limit", 1, 1 << 24)
        self._check_range("rate", 1e-3, 1e9)
        for name, least in (
            ("authenticate_timeout", 0.05),
            ("ping_interval", 0.05),
            ("ping_timeout", 0.05),
            ("grace", 0.0),
            ("place_timeout", 0.05),
        ):
            self._check_range(name, least, 86400)

    def _check_origins(self) -> None:
        if self.origins is None or self.origins == "*":
            return
        if isinstance(self.origins, (str, bytes)):
            raise TypeError(
                f"origins {self.origins!r}: a list of origins is wanted, or '*' for all"
            )
        for origin in self.origins:
            try:
                parts = urlsplit(origin) if isinstance(origin, str) else None
            except ValueError:
                parts = None
            if parts is None or not parts.scheme or not parts.netloc or parts.path or parts.query:
                raise ValueError(
                    f"origin {origin!r}: a scheme and a host are wanted, and the port where it is "
                    "not the usual one, for example https://example.com or http://127.0.0.1:8000"
                )
        origins = frozenset(origin.lower() for origin in self.origins)
        object.__setattr__(self, "origins", origins)

    def allows(self, origin: str, host: str) -> bool:
        """Whether a page of this origin may connect.

        :param host: what the request was sent to, as its Host says.
        """
        if self.origins == "*":
            return True
        if self.origins is not None:
            return origin.lower() in self.origins
        try:
            return urlsplit(origin).netloc.lower() == host.lower() != ""
        except ValueError:  # it is no URL
            return False


def identity_of(answer: object) -> bytes | None:
    """What ``authenticate`` has said, as bytes; None refuses.

    :raises DomiError: it is nothing that it may say.
    """
    if answer is None or answer is False:
        return None
    if answer is True:
        return b""
    raw = answer.encode() if isinstance(answer, str) else answer
    if not isinstance(raw, bytes) or len(raw) > 255:
        what = f"{len(raw)} bytes" if isinstance(raw, bytes) else type(answer).__name__
        raise DomiError(
            f"authenticate returned {what}: text or bytes of at most 255 bytes are wanted, True "
            "for nobody in particular, None to refuse"
        )
    return raw
