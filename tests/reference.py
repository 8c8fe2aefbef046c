"""The wire protocol in plain Python: what docs/protocol.md says, and the oracle of the tests.

It shares no code with the library: only ``struct``, ``hashlib`` and ``hmac``, and no attempt to be
fast.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterable
from typing import NamedTuple

MAGIC = 2299
LIMIT = 16 * 1024 * 1024
HANDSHAKE_LIMIT = 4096
MAX_EXTEND = 0xFFFF
PROTOCOL = 1
NO_DEADLINE = 0xFFFFFFFF
NO_MACHINE = 0xFFFF
TO_A_GUEST = 1 << 32

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

TAG_REQUEST, TAG_GUEST_CALL, TAG_PUBLISH, TAG_PIPELINE, TAG_GUEST_REPLY = 1, 2, 3, 4, 5
OK, REMOTE_ERROR, NO_SUBSCRIBER, OVERLOADED = 0, 1, 2, 3
PEER_LOST, DEADLINE, REFUSED, CIRCUIT_OPEN = 4, 5, 6, 7
NOTIFY, PUBLISH, CALL, REQUEST, PIPELINE, REPLY = 1, 2, 3, 4, 5, 6
ALL, ADD, REMOVE = 0, 1, 2
SERVING, PAUSED, DRAINING = 0, 1, 2

_HEADER = struct.Struct("<IHH")


class Refused(Exception):
    """The bytes are not what the protocol allows; the text is the library's own."""


# ------------------------------------------------------------------------------------------ frames


class Frame(NamedTuple):
    channel: int
    data: bytes = b""
    extend: bytes = b""


def encode(channel: int, data: bytes = b"", extend: bytes = b"") -> bytes:
    """The bytes of one frame."""
    if not 0 <= channel <= 0xFFFF or len(extend) > MAX_EXTEND:
        raise Refused("the header has no room for it")
    length = _HEADER.size + len(data) + len(extend)
    return _HEADER.pack(length, len(extend), channel) + data + extend


def magic() -> bytes:
    return struct.pack("<I", MAGIC)


class Decoder:
    """Frames out of a stream of bytes, however it is cut.

    A fault is final: each further :meth:`feed` raises it again. ``frames`` holds every frame
    before it, those of the fatal :meth:`feed` included.
    """

    def __init__(self, limit: int = LIMIT, *, magic: bool = False) -> None:
        self.limit = limit
        self.frames: list[Frame] = []
        self._wants_magic = magic
        self._held = b""
        self._fault: str | None = None

    @property
    def pending(self) -> int:
        return len(self._held)

    def feed(self, data: bytes) -> list[Frame]:
        before = len(self.frames)
        self._held += data
        while self._fault is None and self._step():
            pass
        if self._fault is not None:
            raise Refused(self._fault)
        return self.frames[before:]

    def _step(self) -> bool:
        if self._wants_magic:
            if len(self._held) < 4:
                return False
            if struct.unpack_from("<I", self._held)[0] != MAGIC:
                self._fault = "wrong magic"
                return False
            self._wants_magic = False
            self._held = self._held[4:]
        if len(self._held) < _HEADER.size:
            return False
        length, extend_size, channel = _HEADER.unpack_from(self._held)
        if length < _HEADER.size:
            self._fault = "a frame length below 8"
        elif length > self.limit:
            self._fault = "a frame length over the limit"
        elif extend_size > length - _HEADER.size:
            self._fault = "an extend longer than its frame"
        if self._fault is not None or len(self._held) < length:
            return False
        end = length - extend_size
        self.frames.append(Frame(channel, self._held[_HEADER.size : end], self._held[end:length]))
        self._held = self._held[length:]
        return True


# --------------------------------------------------------------------------------------- handshake


class Offer(NamedTuple):
    name: str
    version: str = "0"
    cluster: str = "default"
    epoch: int = 0
    instance: bytes = bytes(16)
    features: int = 0
    protocol: int = PROTOCOL


def mark(instance: bytes) -> bytes:
    """What the registry has of an instance."""
    return hashlib.sha256(b"domi_fast instance\0" + instance).digest()[:16]


def encode_offer(offer: Offer) -> bytes:
    out = struct.pack("<BIQ16s", offer.protocol, offer.features, offer.epoch, offer.instance)
    for text in (offer.name, offer.version, offer.cluster):
        raw = text.encode()
        out += struct.pack("<B", len(raw)) + raw
    return out


def decode_offer(data: bytes) -> Offer:
    """What follows the known fields is ignored."""
    try:
        protocol, features, epoch, instance = struct.unpack_from("<BIQ16s", data)
        offset = 29
        texts = []
        for _ in range(3):
            (size,) = struct.unpack_from("<B", data, offset)
            (raw,) = struct.unpack_from(f"<{size}s", data, offset + 1)
            texts.append(raw.decode())
            offset += 1 + size
    except (struct.error, UnicodeDecodeError) as error:
        raise Refused(f"not an offer: {error}") from None
    if protocol < PROTOCOL:
        raise Refused(f"protocol {protocol}")
    name, version, cluster = texts
    return Offer(name, version, cluster, epoch, instance, features, protocol)


def encode_welcome(machine: int, offer: Offer, ticket: bytes = b"") -> bytes:
    return struct.pack("<H", machine) + encode_offer(offer) + ticket


def decode_welcome(data: bytes) -> tuple[int, Offer]:
    if len(data) < 2:
        raise Refused("a welcome without a machine id")
    return struct.unpack_from("<H", data)[0], decode_offer(data[2:])


def ticket_of(welcome: bytes) -> bytes:
    """What stands behind the offer of a welcome: 16 bytes for the lanes, or nothing."""
    _, offer = decode_welcome(welcome)
    ticket = welcome[2 + len(encode_offer(offer)) :][:16]
    return ticket if len(ticket) == 16 else b""


def lanes(offer: Offer) -> int:
    """The connections that it allows a session with it."""
    return (offer.features >> 4 & 15) + 1


def lane(machine: int, index: int, ticket: bytes) -> bytes:
    """What the dialler of a lane says first."""
    return magic() + encode(LANE, struct.pack("<HB", machine, index), ticket)


def decode_lane(data: bytes) -> tuple[int, int]:
    if len(data) != 3:
        raise Refused(f"a lane of {len(data)} bytes")
    machine, index = struct.unpack("<HB", data)
    return machine, index


def auth_hello(role: int, machine: int, dialled: int, nonce: bytes, cluster: str) -> bytes:
    raw = cluster.encode()
    return struct.pack("<BBBHH32sB", 1, 1, role, machine, dialled, nonce, len(raw)) + raw


def auth_challenge(machine: int, nonce: bytes) -> bytes:
    return struct.pack("<BBH32s", 2, 1, machine, nonce)


def auth_proof(step: int, secret: bytes, hello: bytes, challenge: bytes) -> bytes:
    side = {3: b"dialler", 4: b"dialled"}[step]
    context = b"domi_fast authentication 1\0"
    key = hmac.new(context, secret, "sha256").digest()
    said = context + side + hello + challenge
    return bytes([step]) + hmac.new(key, said, "sha256").digest()


def plain_hello(machine: int) -> bytes:
    """What a dialler of the plain protocol says first."""
    return magic() + encode(NODE_NAME, struct.pack("<H", machine))


def hello(machine: int, offer: Offer) -> bytes:
    """What a dialler of the extended protocol says first."""
    return magic() + encode(NODE_NAME, struct.pack("<H", machine), encode_offer(offer))


def guest_hello(offer: Offer) -> bytes:
    """What a guest says first."""
    return magic() + encode(GUEST_NAME, encode_offer(offer))


# ------------------------------------------------------------------------------------------ extends


def channels(numbers: Iterable[int]) -> bytes:
    """A list of ``u16`` channels: the extend of a plain pipeline, the data of SUBSCRIPTIONS."""
    return b"".join(struct.pack("<H", number) for number in numbers)


def call_extend(machine: int, reply: int) -> bytes:
    return struct.pack("<HH", machine, reply)


def request_extend(correlation: int, milliseconds: int = NO_DEADLINE) -> bytes:
    return struct.pack("<BQI", TAG_REQUEST, correlation, milliseconds)


def guest_call_extend(machine: int, reply: int, guest: int) -> bytes:
    return struct.pack("<BHHI", TAG_GUEST_CALL, machine, reply, guest)


def publish_extend() -> bytes:
    return struct.pack("<B", TAG_PUBLISH)


def pipeline_extend(stages: Iterable[int]) -> bytes:
    return struct.pack("<B", TAG_PIPELINE) + channels(stages)


def guest_reply_extend(guest: int) -> bytes:
    return struct.pack("<BI", TAG_GUEST_REPLY, guest)


def answer_extend(correlation: int, status: int = OK) -> bytes:
    return struct.pack("<QB", correlation, status)


def reject_extend(status: int, channel: int, extend_size: int) -> bytes:
    return struct.pack("<BHH", status, channel, extend_size)


def subscriptions(operation: int, numbers: Iterable[int] = ()) -> bytes:
    """A whole SUBSCRIPTIONS frame."""
    return encode(SUBSCRIPTIONS, channels(numbers), struct.pack("<B", operation))


def state(of: int, *, heard: bool = False) -> bytes:
    """A whole STATE frame."""
    return encode(STATE, struct.pack("<B", of), struct.pack("<B", heard))


def relay_extend(
    verb: int,
    channel: int,
    *,
    to: int = NO_MACHINE,
    reply: int = 0,
    correlation: int = 0,
    milliseconds: int = NO_DEADLINE,
    stages: Iterable[int] = (),
) -> bytes:
    return struct.pack("<BHHHQI", verb, channel, to, reply, correlation, milliseconds) + channels(
        stages
    )


def from_sender(machine: int, extend: bytes = b"") -> bytes:
    """The extend of a message as a guest gets it: the sender's machine id in front."""
    return struct.pack("<H", machine) + extend
