"""Every channel that the library keeps for itself, in one table."""

from __future__ import annotations

from enum import IntEnum

USER_FIRST = 50
USER_LAST = 65499


class LibraryChannel(IntEnum):
    """Channels 0-49 and 65500-65535 belong to the library; users have 50-65499.

    65500-65510 are the original's. The rest is ours, and spoken only with peers that offered it in
    the handshake (docs/protocol.md). The core serves those from HEARTBEAT_REPLY on; the others are
    subscribed and sent on as those of users are, by their member, and not by guests.

    :cvar ZONE: a client's message on its way to a group.
    :cvar GATEWAY: what gateways and zones say to each other.
    """

    ZONE = 8
    GATEWAY = 9
    NIL = 65500
    HEARTBEAT_REPLY = 65501
    HEARTBEAT = 65502
    EXIT = 65503
    PING = 65504
    PONG = 65505
    NODE_NAME = 65510
    WELCOME = 65511
    ANSWER = 65512
    SUBSCRIPTIONS = 65513
    GUEST_NAME = 65514
    REJECT = 65515
    RELAY = 65516
    STATE = 65517
    MEMORY = 65518
    AUTH = 65519
    LANE = 65520
