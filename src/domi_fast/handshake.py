"""What two ends tell each other before the first message (docs/protocol.md, "Handshake")."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from dataclasses import dataclass

from .errors import FrameError

PROTOCOL = 1
DISPLACED = "a newer node has this machine id"
"""What a node is told whose id has passed to another."""

MOST_LANES = 16
TICKET = 16
_FIXED = struct.Struct("<BIQ16s")
_LANE = struct.Struct("<HB")
_LANES = 4


@dataclass(frozen=True)
class Offer:
    """Who a peer is and what it can do beyond the original protocol.

    :ivar epoch: the epoch of its claim on its machine id; 0 for a guest.
    :ivar instance: 16 random bytes that a node keeps from start to close; only those that it meets
        as a node hear them (docs/protocol.md, "Handshake").
    :ivar features: bits 4 to 7 are the connections that a session with it may have, less one;
        unknown ones are ignored.
    """

    name: str
    version: str
    cluster: str
    epoch: int
    instance: bytes
    features: int = 0

    @property
    def mark(self) -> bytes:
        """What the registry has of the instance, from which nobody can tell what it is."""
        return hashlib.sha256(b"domi_fast instance\0" + self.instance).digest()[:16]

    @property
    def lanes(self) -> int:
        """The connections that a session with it may have, 1-16."""
        return (self.features >> _LANES & MOST_LANES - 1) + 1

    def for_guests(self) -> Offer:
        """The same without what shows whose id it is."""
        return dataclasses.replace(self, epoch=0, instance=bytes(16))

    @staticmethod
    def features_of(lanes: int) -> int:
        """The features of who allows so many connections."""
        return lanes - 1 << _LANES

    def encode(self) -> bytes:
        """The bytes that follow the node name as its extend."""
        out = _FIXED.pack(PROTOCOL, self.features, self.epoch, self.instance)
        for text in (self.name, self.version, self.cluster):
            raw = text.encode()
            out += bytes([len(raw)]) + raw
        return out

    @classmethod
    def decode(cls, data: bytes) -> Offer:
        """The reverse of :meth:`encode`; what follows the known fields is ignored.

        Raises :class:`~domi_fast.errors.FrameError`.
        """
        return cls.read(data)[0]

    @classmethod
    def read(cls, data: bytes) -> tuple[Offer, int]:
        """As :meth:`decode`, and of how many bytes it was."""
        if len(data) < _FIXED.size:
            raise FrameError(f"an offer of {len(data)} bytes: at least {_FIXED.size} are needed")
        protocol, features, epoch, instance = _FIXED.unpack_from(data)
        if protocol < PROTOCOL:
            raise FrameError(f"protocol {protocol}: this node speaks {PROTOCOL} and later")
        texts = []
        offset = _FIXED.size
        for _ in range(3):
            end = offset + 1 + (data[offset] if offset < len(data) else 0)
            if end > len(data):
                raise FrameError("an offer that ends within a text")
            try:
                texts.append(data[offset + 1 : end].decode())
            except UnicodeDecodeError:
                raise FrameError("an offer whose text is not UTF-8") from None
            offset = end
        name, version, cluster = texts
        offer = cls(name, version, cluster, epoch=epoch, instance=instance, features=features)
        return offer, offset


def encode_welcome(machine: int, offer: Offer, ticket: bytes = b"") -> bytes:
    """The data of a WELCOME: ``u16`` machine id, then the offer.

    :param ticket: behind it, what the lanes of the session are known by: ``TICKET`` bytes, or none.
    """
    return machine.to_bytes(2, "little") + offer.encode() + ticket


def decode_welcome(data: bytes) -> tuple[int, Offer, bytes]:
    """The reverse of :func:`encode_welcome`. Raises :class:`~domi_fast.errors.FrameError`."""
    if len(data) < 2:
        raise FrameError("a welcome without a machine id")
    offer, end = Offer.read(data[2:])
    ticket = data[2 + end : 2 + end + TICKET]
    return int.from_bytes(data[:2], "little"), offer, ticket if len(ticket) == TICKET else b""


def lanes_between(one: Offer, other: Offer) -> int:
    """How many connections a session of the two has: as many as both allow."""
    return min(one.lanes, other.lanes)


def encode_lane(machine: int, index: int) -> bytes:
    """The data of a LANE: who dials, and which connection of its session this is."""
    return _LANE.pack(machine, index)


def decode_lane(data: bytes) -> tuple[int, int]:
    """The reverse of :func:`encode_lane`. Raises :class:`~domi_fast.errors.FrameError`."""
    if len(data) != _LANE.size:
        raise FrameError(f"a lane of {len(data)} bytes: {_LANE.size} are wanted")
    machine, index = _LANE.unpack(data)
    return machine, index
