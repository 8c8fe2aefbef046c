"""The one exception tree of the library, and what its errors may show of a URL.

Every error carries the facts as attributes (``channel``, ``peer``, ``limit``), so that a program
can act on them without reading the message. A fact that does not apply is ``None``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .holder import Holder

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# The files of TLS may be shown; whatever else has a name may be a token or a password.
_OPTION: Final = re.compile(r"([?&](?!(?:ca|cert|key)=)[^=&#]*=)[^&#]*")


class DomiError(Exception):
    """The root: whatever this library refuses or loses is one of these.

    :param message: what was given, what is allowed, what to do.
    :param channel: the channel that the error is about.
    :param peer: the machine id of the node that the error is about.
    :param limit: the limit that was reached (its unit is in the message).
    :ivar sent: from a verb for many messages: how many went before this one; otherwise None.
    """

    sent: int | None = None

    def __init__(
        self,
        message: str = "",
        *,
        channel: int | None = None,
        peer: int | None = None,
        limit: float | None = None,
    ) -> None:
        super().__init__(message)
        self.channel = channel
        self.peer = peer
        self.limit = limit

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.args, self.__dict__.copy()))


def _rebuild(
    kind: type[DomiError], args: tuple[object, ...], facts: dict[str, object]
) -> DomiError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(facts)
    return error


class NoSubscriber(DomiError):
    """Nobody that this node can reach subscribes to the channel."""


class PeerLost(DomiError):
    """The node that should have answered is gone, or was never connected."""


class DeadlineExceeded(DomiError, TimeoutError):
    """No answer came before the deadline, and the work may still have been done; or no lock did."""


class CircuitOpen(DomiError):
    """The circuit of ``peer``, which has left requests without an answer, is open."""


class Overloaded(DomiError):
    """A queue is full, or a limit reached: of this session, this node, or the one that was asked.

    :ivar advice: the end of the message, for who called the verb: others are told the rest.
    """

    advice: str = ""


class RingFull(Overloaded):
    """The ring buffer has no room for the frame."""


class FrameError(DomiError):
    """Bytes that are not a frame, or a frame that may not be sent."""


class AlreadyReplied(DomiError):
    """The message was answered before; a message has one answer."""


class AuthError(DomiError):
    """A peer could not show that it belongs to the cluster."""


class TryAgain(DomiError):
    """This connection is given up without anybody's fault: there is, or will be, another."""


class RegistryError(DomiError):
    """The registry refused an operation or cannot be reached."""


class ClusterFull(RegistryError):
    """All machine ids (0-1023) are taken."""


class LeadershipLost(DomiError):
    """A leadership or a lock is over, and what still relies on it must stop."""


class NameTaken(DomiError):
    """Another claim, of any node, has the name.

    :ivar holder: whose it is, as the registry has it; a node that was killed has its names until
        its lease is over.
    """

    def __init__(self, message: str, holder: Holder) -> None:
        super().__init__(message, peer=holder.id)
        self.holder = holder


class VersionTooOld(DomiError):
    """A newer version of the node of this name is in the cluster; an older one may not join."""


class RemoteError(DomiError):
    """The handler on the other node raised.

    :ivar type: the name of the exception's class there.
    :ivar message: its text; never a traceback.
    """

    def __init__(
        self,
        type: str,
        message: str = "",
        *,
        channel: int | None = None,
        peer: int | None = None,
    ) -> None:
        super().__init__(f"{type}: {message}" if message else type, channel=channel, peer=peer)
        self.type = type
        self.message = message


def masked(url: str) -> str:
    """The URL as an error may show it, whatever is wrong with it: without what is before an ``@``.

    It is not parsed, since a mistyped one has its password in another place.
    """
    scheme = _SCHEME.match(url)
    start = scheme.end() if scheme else 0
    _, at, place = url[start:].rpartition("@")
    return _OPTION.sub(r"\1***", f"{url[:start]}***@{place}" if at else url)
