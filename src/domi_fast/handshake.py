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

_FIXED = struct.Struct("<BIQ16s")


@dataclass(frozen=True)
class Offer:
    """Who a peer is and what it can do beyond the original protocol.

    :ivar epoch: the epoch of its claim on its machine id; 0 for a guest.
    :ivar instance: 16 random bytes that a node keeps from start to close; only those that it meets
        as a node hear them (docs/protocol.md, "Handshake").
    :ivar features: a bit a feature; none is defined yet, unknown ones are ignored.
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

    def for_guests(self) -> Offer:
        """The same without what shows whose id it is."""
        return dataclasses.replace(self, epoch=0, instance=bytes(16))

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
        return cls(name, version, cluster, epoch=epoch, instance=instance, features=features)


def encode_welcome(machine: int, offer: Offer) -> bytes:
    """The data of a WELCOME: ``u16`` machine id, then the offer."""
    return machine.to_bytes(2, "little") + offer.encode()


def decode_welcome(data: bytes) -> tuple[int, Offer]:
    """The reverse of :func:`encode_welcome`. Raises :class:`~domi_fast.errors.FrameError`."""
    if len(data) < 2:
        raise FrameError("a welcome without a machine id")
    return int.from_bytes(data[:2], "little"), Offer.decode(data[2:])
