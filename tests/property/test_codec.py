"""Bytes to frames and back: the core, the reference codec and the vectors of docs/protocol.md."""

from __future__ import annotations

import os
import random
import re
import sys
from collections import Counter, deque
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from domi_fast import handshake
from domi_fast._core import Frame, FrameReader, WriteQueue, encode_frame
from domi_fast.channels import LibraryChannel
from domi_fast.errors import FrameError
from tests import reference
from tests.reference import Decoder, Offer, Refused

# ----------------------------------------------------------------------------------------- vectors

PAGE = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"
DEBUG, SANITIZE, SOAK = (
    os.environ.get(f"DOMI_{name}") == "1" for name in ("DEBUG", "SANITIZE", "SOAK")
)


class Vector(NamedTuple):
    name: str
    kind: str
    fields: dict[str, Any]
    raw: bytes


def _value(text: str) -> int | str | bytes | list[int]:
    if text.startswith("'"):
        return text[1:-1]
    if text.startswith("x"):
        return bytes.fromhex(text[1:])
    if text.startswith("["):
        return [int(number) for number in text[1:-1].split(",") if number]
    return int(text)


def _parse(page: str) -> list[Vector]:
    found = []
    for block in re.findall(r"^```vectors\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            name, spec, raw = (part.strip() for part in line.split("|"))
            kind, _, rest = spec.partition(" ")
            pattern = r"(\w+)=('[^']*'|x[0-9a-f]*|\[[0-9,]*\]|[0-9]+)(?: |$)"
            fields = {key: _value(value) for key, value in re.findall(pattern, rest)}
            assert not re.sub(pattern, "", rest), f"{name}: {rest!r} is not all fields"
            found.append(Vector(name, kind, fields, bytes.fromhex(raw)))
    return found


VECTORS = _parse(PAGE.read_text(encoding="utf-8"))


def _frame_fields(channel: int, data: str | bytes = b"", extend: bytes = b"") -> Frame:
    return Frame(channel, data.encode() if isinstance(data, str) else data, extend)


def _frame(**fields: Any) -> bytes:
    return reference.encode(*_frame_fields(**fields))


def _offer(**fields: Any) -> bytes:
    return reference.encode_offer(Offer(**fields))


def _welcome(machine: int, **fields: Any) -> bytes:
    return reference.encode_welcome(machine, Offer(**fields))


def _plain_pipeline(stages: list[int]) -> bytes:
    return reference.channels(stages)


def _subscriptions(operation: int, channels: list[int]) -> bytes:
    return reference.subscriptions(operation, channels)


BUILDERS: dict[str, Callable[..., bytes]] = {
    "frame": _frame,
    "magic": reference.magic,
    "hello": reference.plain_hello,
    "offer": _offer,
    "welcome": _welcome,
    "call": reference.call_extend,
    "plain_pipeline": _plain_pipeline,
    "request": reference.request_extend,
    "guest_call": reference.guest_call_extend,
    "publish": reference.publish_extend,
    "pipeline": reference.pipeline_extend,
    "guest_reply": reference.guest_reply_extend,
    "answer": reference.answer_extend,
    "reject": reference.reject_extend,
    "relay": reference.relay_extend,
    "subscriptions": _subscriptions,
    "from_sender": reference.from_sender,
    "auth_hello": reference.auth_hello,
    "auth_challenge": reference.auth_challenge,
    "auth_proof": reference.auth_proof,
}
FAULTS = ("fault", "fault_magic")


def of_kind(*kinds: str) -> pytest.MarkDecorator:
    chosen = [vector for vector in VECTORS if vector.kind in kinds]
    assert chosen, f"the page has no vectors of {kinds}"
    return pytest.mark.parametrize("vector", chosen, ids=[vector.name for vector in chosen])


def test_the_page_has_vectors_of_every_kind_and_no_other() -> None:
    assert {vector.kind for vector in VECTORS} == {*BUILDERS, *FAULTS}
    names = [vector.name for vector in VECTORS]
    assert len(set(names)) == len(names)
    assert len(VECTORS) >= 60


def test_the_page_has_a_vector_of_every_library_channel_with_a_meaning() -> None:
    shown = {vector.fields["channel"] for vector in VECTORS if vector.kind == "frame"}
    shown |= {reference.SUBSCRIPTIONS for vector in VECTORS if vector.kind == "subscriptions"}
    # NIL has no meaning, and what wings say on theirs is not the node's.
    apart = {LibraryChannel.NIL, LibraryChannel.ZONE, LibraryChannel.GATEWAY}
    assert set(LibraryChannel) - apart <= shown


@of_kind(*BUILDERS)
def test_a_vector_is_what_the_reference_builds(vector: Vector) -> None:
    assert BUILDERS[vector.kind](**vector.fields).hex() == vector.raw.hex()


@of_kind("frame")
def test_a_frame_vector_on_both_codecs(vector: Vector) -> None:
    frame = _frame_fields(**vector.fields)
    assert encode_frame(*frame).hex() == vector.raw.hex()
    assert FrameReader().feed(vector.raw) == [frame]
    assert Decoder().feed(vector.raw) == [tuple(frame)]
    queue = WriteQueue()
    queue.push(*frame)
    assert queue.pull(1 << 20).hex() == vector.raw.hex()


@of_kind("hello", "subscriptions")
def test_a_stream_vector_is_read_by_both_codecs(vector: Vector) -> None:
    magic = vector.kind == "hello"
    frames = FrameReader(magic=magic).feed(vector.raw)
    assert Decoder(magic=magic).feed(vector.raw) == [tuple(frame) for frame in frames]
    if magic:
        machine = vector.fields["machine"].to_bytes(2, "little")
        assert frames == [Frame(LibraryChannel.NODE_NAME, machine, b"")]
    else:
        numbers = reference.channels(vector.fields["channels"])
        operation = bytes([vector.fields["operation"]])
        assert frames == [Frame(LibraryChannel.SUBSCRIPTIONS, numbers, operation)]


@of_kind("offer", "welcome")
def test_an_offer_vector_on_both_codecs(vector: Vector) -> None:
    fields = dict(vector.fields)
    machine = fields.pop("machine", None)
    assert (
        reference.decode_offer(vector.raw)
        if machine is None
        else reference.decode_welcome(vector.raw)
    ) == (Offer(**fields) if machine is None else (machine, Offer(**fields)))
    protocol = fields.pop("protocol", handshake.PROTOCOL)
    offer = handshake.Offer(**fields)
    if machine is not None:
        assert handshake.encode_welcome(machine, offer).hex() == vector.raw.hex()
        assert handshake.decode_welcome(vector.raw) == (machine, offer, b"")
        ticket = bytes(range(16))
        assert handshake.decode_welcome(vector.raw + ticket) == (machine, offer, ticket)
        assert handshake.decode_welcome(vector.raw + ticket[:-1]) == (machine, offer, b"")
        assert reference.ticket_of(vector.raw + ticket) == ticket
        return
    assert handshake.Offer.decode(vector.raw) == offer
    assert handshake.Offer.decode(vector.raw + b"of a later version") == offer
    assert bytes([protocol]) + offer.encode()[1:] == vector.raw


@of_kind(*FAULTS)
def test_a_fault_vector_on_both_codecs(vector: Vector) -> None:
    magic = vector.kind == "fault_magic"
    for pieces in ([vector.raw], single_bytes(vector.raw)):
        core = read_core(pieces, magic=magic)
        assert core.fault == vector.fields["reason"]
        assert core == read_oracle(pieces, magic=magic)


# -------------------------------------------------------------------------- reading, cut anywhere


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    """The stream in pieces; a place beyond its end counts from its beginning again."""
    edges = sorted(place % (len(stream) + 1) for place in places)
    return [stream[a:b] for a, b in pairwise([0, *edges, len(stream)])]


class Outcome(NamedTuple):
    frames: list[tuple[int, bytes, bytes]]
    fault: str | None


def read_core(pieces: list[bytes], *, limit: int = reference.LIMIT, magic: bool = False) -> Outcome:
    reader = FrameReader(limit, magic=magic)
    frames: list[tuple[int, bytes, bytes]] = []
    try:
        for piece in pieces:
            frames += reader.feed(piece)
    except FrameError as error:
        return Outcome(frames, str(error))
    return Outcome(frames, None)


def read_oracle(
    pieces: list[bytes], *, limit: int = reference.LIMIT, magic: bool = False
) -> Outcome:
    decoder = Decoder(limit, magic=magic)
    frames: list[tuple[int, bytes, bytes]] = []
    try:
        for piece in pieces:
            frames += decoder.feed(piece)
    except Refused as error:
        return Outcome(frames, str(error))
    return Outcome(frames, None)


def single_bytes(stream: bytes) -> list[bytes]:
    return [stream[i : i + 1] for i in range(len(stream))]


channels = st.integers(0, 0xFFFF)
small_frames = st.tuples(channels, st.binary(max_size=48), st.binary(max_size=16))
places = st.lists(st.integers(0, 1 << 20), max_size=12)
BIG = 16384
large_sizes = st.one_of(
    st.integers(BIG - 16, BIG + 16), st.integers(0, 200_000), st.sampled_from([0, 1, 65536, 131072])
)
extend_sizes = st.one_of(
    st.integers(0, 16), st.integers(BIG - 16, BIG + 16), st.integers(65_500, 65_535)
)


@st.composite
def large_frames(draw: st.DrawFn) -> tuple[int, bytes, bytes]:
    noise = random.Random(draw(st.integers(0, 1 << 32)))
    return (
        draw(channels),
        noise.randbytes(draw(large_sizes)),
        noise.randbytes(draw(extend_sizes)),
    )


@settings(max_examples=10_000)
@given(st.lists(small_frames, max_size=3), st.binary(max_size=8))
def test_the_codecs_agree_on_ten_thousand_streams(
    frames: list[tuple[int, bytes, bytes]], at: bytes
) -> None:
    stream = b"".join(encode_frame(*frame) for frame in frames)
    assert stream == b"".join(reference.encode(*frame) for frame in frames)
    magic = len(at) % 2 == 1
    if magic:
        stream = reference.magic() + stream
    expected = Outcome(frames, None)
    pieces = cut(stream, list(at))
    assert read_core(pieces, magic=magic) == expected
    assert read_oracle(pieces, magic=magic) == expected
    assert read_core([stream], magic=magic) == expected


# Under a sanitizer or with checks this would take minutes.
@settings(max_examples=10_000 if SOAK or not (DEBUG or SANITIZE) else 200)
@given(st.lists(small_frames, max_size=6), st.booleans())
def test_every_boundary_and_every_single_byte(
    frames: list[tuple[int, bytes, bytes]], magic: bool
) -> None:
    stream = b"".join(reference.encode(*frame) for frame in frames)
    if magic:
        stream = reference.magic() + stream
    expected = Outcome(frames, None)
    assert read_core(single_bytes(stream), magic=magic) == expected
    assert read_oracle(single_bytes(stream), magic=magic) == expected
    for place in range(len(stream) + 1):
        assert read_core([stream[:place], stream[place:]], magic=magic) == expected


def test_every_pair_of_boundaries() -> None:
    frames = [(50, b"ab", b"c"), (65535, b"", b""), (0, b"", b"de"), (51, b"f", b"")]
    stream = reference.magic() + b"".join(reference.encode(*frame) for frame in frames)
    for first in range(len(stream) + 1):
        for second in range(first, len(stream) + 1):
            pieces = [stream[:first], stream[first:second], stream[second:]]
            assert read_core(pieces, magic=True) == Outcome(frames, None)


@given(st.lists(st.one_of(large_frames(), small_frames), min_size=1, max_size=4), places)
def test_large_frames_cut_at_random(frames: list[tuple[int, bytes, bytes]], at: list[int]) -> None:
    stream = b"".join(encode_frame(*frame) for frame in frames)
    assert stream == b"".join(reference.encode(*frame) for frame in frames)
    pieces = cut(stream, at)
    expected = Outcome(frames, None)
    assert read_core(pieces) == expected
    assert read_oracle(pieces) == expected


@pytest.mark.parametrize(
    ("size", "extend_size"),
    [
        (BIG - 9, 0),
        (BIG - 8, 0),
        (BIG - 8 - 5, 5),
        (0, BIG - 8),
        (1, BIG - 8),
        (8192, 8192),
        (0, BIG - 9),
    ],
)
def test_a_large_frame_cut_at_every_boundary(size: int, extend_size: int) -> None:
    noise = random.Random(size)
    frames = [
        (50, b"before", b""),
        (51, noise.randbytes(size), noise.randbytes(extend_size)),
        (52, b"behind", b"x"),
    ]
    stream = b"".join(reference.encode(*frame) for frame in frames)
    for place in range(len(stream) + 1):
        assert read_core([stream[:place], stream[place:]]).frames == frames


@pytest.mark.parametrize(
    ("size", "extend_size"), [(0, 65_535), (1, 65_535), (16_384, 65_535), (300_000, 65_535)]
)
def test_the_largest_extends(size: int, extend_size: int) -> None:
    noise = random.Random(size)
    frames = [
        (50, noise.randbytes(size), noise.randbytes(extend_size)),
        (51, b"", noise.randbytes(extend_size)),
        (52, b"end", b""),
    ]
    stream = b"".join(reference.encode(*frame) for frame in frames)
    expected = Outcome(frames, None)
    assert read_core([stream]) == expected
    assert read_core([*single_bytes(stream[:20_000]), stream[20_000:]]) == expected
    edges = [0, 8, 8 + size, 8 + size + extend_size, len(stream) - 11 - extend_size]
    for edge in edges:
        for place in range(max(0, edge - 9), min(edge + 10, len(stream))):
            assert read_core([stream[:place], stream[place:]]) == expected
    for step in (64, 1000, 4096, 65_536, 65_537):
        pieces = [stream[i : i + step] for i in range(0, len(stream), step)]
        assert read_core(pieces) == expected


@given(st.lists(st.one_of(st.binary(max_size=64), small_frames), max_size=6), places, st.booleans())
def test_the_codecs_agree_on_garbage(
    parts: list[bytes | tuple[int, bytes, bytes]], at: list[int], magic: bool
) -> None:
    stream = b"".join(
        part if isinstance(part, bytes) else reference.encode(*part) for part in parts
    )
    pieces = cut(stream, at)
    for limit in (8, 40, reference.LIMIT):
        assert read_core(pieces, limit=limit, magic=magic) == read_oracle(
            pieces, limit=limit, magic=magic
        )


bad_headers = st.one_of(
    st.tuples(st.integers(0, 7), st.integers(0, 0xFFFF), channels),
    st.tuples(st.integers(257, 0xFFFFFFFF), st.integers(0, 0xFFFF), channels),
    st.integers(8, 256).flatmap(
        lambda length: st.tuples(st.just(length), st.integers(length - 7, 0xFFFF), channels)
    ),
)


@given(st.lists(small_frames, max_size=4), bad_headers, st.binary(max_size=20), places)
def test_a_fault_after_valid_frames(
    frames: list[tuple[int, bytes, bytes]],
    header: tuple[int, int, int],
    rest: bytes,
    at: list[int],
) -> None:
    length, extend_size, channel = header
    good = b"".join(reference.encode(*frame) for frame in frames)
    bad = (
        length.to_bytes(4, "little")
        + extend_size.to_bytes(2, "little")
        + channel.to_bytes(2, "little")
    )
    if length < 8:
        fault = "a frame length below 8"
    elif length > 256:
        fault = "a frame length over the limit"
    else:
        fault = "an extend longer than its frame"
    assert read_core(single_bytes(good + bad), limit=256) == Outcome(frames, fault)
    assert read_core([good, bad + rest], limit=256) == Outcome(frames, fault)
    pieces = cut(good + bad + rest, at)
    outcome = read_core(pieces, limit=256)
    assert outcome.fault == fault
    assert outcome == read_oracle(pieces, limit=256)
    # The header decides as soon as it is there, and not before.
    assert read_core([good + bad[:7]], limit=256).fault is None


def test_a_fault_is_final() -> None:
    reader = FrameReader(64)
    with pytest.raises(FrameError, match="below 8") as caught:
        reader.feed(bytes(8))
    assert caught.value.limit == 64
    for piece in (b"x", encode_frame(50, b"good")):
        with pytest.raises(FrameError, match="below 8"):
            reader.feed(piece)


@pytest.mark.parametrize("limit", [8, 9, 64, 4096, BIG, BIG + 1, 100_000])
def test_the_limit_counts_the_whole_frame(limit: int) -> None:
    for extend_size in {0, min(5, limit - 8)}:
        exact = reference.encode(50, bytes(limit - 8 - extend_size), bytes(extend_size))
        over = reference.encode(50, bytes(limit - 7 - extend_size), bytes(extend_size))
        reader = FrameReader(limit)
        assert reader.limit == limit
        assert len(reader.feed(exact)) == 1
        with pytest.raises(FrameError, match="over the limit") as caught:
            reader.feed(over[:8])
        assert caught.value.limit == limit


@pytest.mark.parametrize("limit", [7, 0, -1, 1 << 32])
def test_a_limit_that_no_frame_has(limit: int) -> None:
    with pytest.raises(ValueError, match=r"8 to 4294967295"):
        FrameReader(limit)


@pytest.mark.parametrize("place", range(1, 4))
def test_magic_in_pieces(place: int) -> None:
    stream = reference.plain_hello(7)
    reader = FrameReader(magic=True)
    assert reader.feed(stream[:place]) == []
    assert reader.pending == place
    assert reader.feed(stream[place:]) == [Frame(LibraryChannel.NODE_NAME, b"\x07\0", b"")]
    assert reader.pending == 0


@pytest.mark.parametrize("wrong", [b"\xfb\x08\0\1", b"\xfa\x08\0\0", b"GET ", b"\0\0\x08\xfb"])
def test_wrong_magic_is_refused_with_its_fourth_byte(wrong: bytes) -> None:
    reader = FrameReader(magic=True)
    for i in range(3):
        assert reader.feed(wrong[i : i + 1]) == []
    with pytest.raises(FrameError, match="wrong magic"):
        reader.feed(wrong[3:])


def test_pending_is_what_was_fed_and_not_delivered() -> None:
    reader = FrameReader()
    stream = encode_frame(50, bytes(100), bytes(10))
    for i in range(len(stream) - 1):
        assert reader.pending == i
        assert reader.feed(stream[i : i + 1]) == []
    assert len(reader.feed(stream[-1:])) == 1
    assert reader.pending == 0


def test_what_is_fed_may_be_any_contiguous_buffer() -> None:
    stream = encode_frame(50, b"hello", b"!!")
    for kind in (bytes, bytearray, memoryview):
        reader = FrameReader()
        half = len(stream) // 2
        assert reader.feed(kind(stream[:half])) == []
        assert reader.feed(kind(stream[half:])) == [Frame(50, b"hello", b"!!")]
        assert reader.feed(kind(b"")) == []


def test_frames_own_their_bytes() -> None:
    buffer = bytearray(encode_frame(50, b"hello", b"!!"))
    [frame] = FrameReader().feed(buffer)
    buffer[:] = bytes(len(buffer))
    assert frame == (50, b"hello", b"!!")


def test_what_no_header_has_room_for() -> None:
    for channel in (-1, 65_536):
        with pytest.raises(FrameError, match="0-65535"):
            encode_frame(channel, b"")
        with pytest.raises(FrameError):
            WriteQueue().push(channel, b"")
    with pytest.raises(FrameError, match="65535") as caught:
        encode_frame(50, b"", bytes(65_536))
    assert caught.value.limit == 65_535
    assert caught.value.channel == 50
    with pytest.raises(FrameError):
        WriteQueue().push(50, b"", bytes(65_536))
    assert len(encode_frame(50, b"", bytes(65_535))) == 65_543


def test_a_frame_is_a_tuple_with_names() -> None:
    frame = Frame(50, b"data", b"extend")
    assert (frame.channel, frame.data, frame.extend) == tuple(frame) == (50, b"data", b"extend")
    assert Frame(50, b"data") == (50, b"data", b"")
    assert repr(frame) == "Frame(channel=50, data=b'data', extend=b'extend')"
    assert encode_frame(*frame) == reference.encode(*frame)


# --------------------------------------------------------------------------------------- the offer

texts = st.text(max_size=80).filter(lambda text: len(text.encode()) <= 255)


@given(
    texts,
    texts,
    texts,
    st.integers(0, 2**64 - 1),
    st.binary(min_size=16, max_size=16),
    st.integers(0, 2**32 - 1),
    st.integers(0, 1023),
    st.binary(max_size=8),
)
def test_offers_agree(
    name: str,
    version: str,
    cluster: str,
    epoch: int,
    instance: bytes,
    features: int,
    machine: int,
    later: bytes,
) -> None:
    oracle = Offer(name, version, cluster, epoch, instance, features)
    offer = handshake.Offer(name, version, cluster, epoch, instance, features)
    raw = offer.encode()
    assert raw == reference.encode_offer(oracle)
    assert handshake.Offer.decode(raw + later) == offer
    assert reference.decode_offer(raw + later) == oracle
    welcome = handshake.encode_welcome(machine, offer)
    assert welcome == reference.encode_welcome(machine, oracle)
    ticket = reference.ticket_of(welcome + later)
    assert handshake.decode_welcome(welcome + later) == (machine, offer, ticket)
    assert offer.lanes == reference.lanes(oracle)


@given(st.binary(max_size=80))
def test_offers_out_of_garbage_agree(raw: bytes) -> None:
    try:
        expected: Offer | None = reference.decode_offer(raw)
    except Refused:
        expected = None
    if expected is None:
        with pytest.raises(FrameError):
            handshake.Offer.decode(raw)
    else:
        found = handshake.Offer.decode(raw)
        assert (found.name, found.version, found.cluster, found.epoch, found.instance) == expected[
            :5
        ]


def test_an_offer_that_ends_early_is_refused_wherever_it_ends() -> None:
    raw = reference.encode_offer(Offer("name", "1.0", "cluster"))
    for size in range(len(raw)):
        with pytest.raises(FrameError):
            handshake.Offer.decode(raw[:size])
    with pytest.raises(FrameError, match="protocol 0"):
        handshake.Offer.decode(b"\0" + raw[1:])
    with pytest.raises(FrameError, match="UTF-8"):
        handshake.Offer.decode(raw[:30] + b"\xff" + raw[31:])


# ---------------------------------------------------------------------------------- the write queue

SMALL = 464
BY_REFERENCE = 8192
CHUNK = 32768
queue_sizes = st.one_of(
    st.integers(0, 64),
    st.integers(SMALL - 24, SMALL + 8),
    st.integers(BY_REFERENCE - 16, BY_REFERENCE + 16),
    st.integers(CHUNK - 24, CHUNK + 8),
    st.integers(0, 40_000),
)
queue_extends = st.one_of(st.integers(0, 16), st.sampled_from([0, 32_760, 32_768, 65_535]))


class QueueMachine(RuleBasedStateMachine):
    """The queue against a list of (frame, its bytes that were not taken)."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = WriteQueue()
        self.model: deque[tuple[tuple[int, bytes, bytes], bytes]] = deque()
        self.count = 0

    def push_frame(self, channel: int, size: int, extend_size: int) -> None:
        self.count += 1
        noise = random.Random(self.count)
        frame = (channel, noise.randbytes(size), noise.randbytes(extend_size))
        self.queue.push(*frame)
        self.model.append((frame, reference.encode(*frame)))

    @rule(channel=channels, size=queue_sizes, extend_size=queue_extends)
    def push(self, channel: int, size: int, extend_size: int) -> None:
        self.push_frame(channel, size, extend_size)

    @rule(channel=channels, sizes=st.lists(st.integers(0, 200), min_size=5, max_size=50))
    def push_a_burst(self, channel: int, sizes: list[int]) -> None:
        for size in sizes:
            self.push_frame(channel, size, size % 5)

    @rule(count=st.integers(1, 40))
    def push_many_by_reference(self, count: int) -> None:
        for _ in range(count):
            self.push_frame(50, BY_REFERENCE, 3)

    def pull_bytes(self, most: int) -> None:
        stream = b"".join(rest for _, rest in self.model)
        taken = self.queue.pull(most)
        assert taken == stream[: len(taken)]
        assert len(taken) <= most
        if len(self.model) <= 20:
            assert len(taken) == min(most, len(stream))
        elif most:
            assert taken
        left = len(taken)
        while left:
            frame, rest = self.model.popleft()
            if len(rest) > left:
                self.model.appendleft((frame, rest[left:]))
                break
            left -= len(rest)

    @rule(most=st.one_of(st.integers(0, 40), st.integers(0, 200_000), st.just(1 << 30)))
    def pull(self, most: int) -> None:
        self.pull_bytes(most)

    @precondition(lambda self: self.model)
    @rule(beyond=st.integers(-9, 9))
    def pull_about_one_frame(self, beyond: int) -> None:
        self.pull_bytes(max(0, len(self.model[0][1]) + beyond))

    @rule(count=st.integers(1, 5), prefix=st.sampled_from([0, 2]))
    def push_requests(self, count: int, prefix: int) -> None:
        """What somebody waits for an answer to."""
        for size in range(count):
            frame = (50, bytes(size), bytes(prefix) + b"\x01" + bytes(12))
            self.queue.push(*frame)
            self.model.append((frame, reference.encode(*frame)))

    @rule(
        wanted=st.one_of(st.integers(0, 300), st.integers(0, 100_000)),
        pinned=st.one_of(st.just(0), st.integers(0, 50_000)),
        prefix=st.sampled_from([0, 2]),
        channels_kept=st.sampled_from([(), (50,)]),
    )
    def shed(self, wanted: int, pinned: int, prefix: int, channels_kept: tuple[int, ...]) -> None:
        """The oldest go, but for what has begun to be sent, is pinned, or is no user's notify."""
        kept: list[tuple[tuple[int, bytes, bytes], bytes]] = []
        dropped: Counter[int] = Counter()
        before = gone = 0
        for frame, rest in self.model:
            channel, data, extend = frame
            length = 8 + len(data) + len(extend)
            asks = len(extend) == prefix + 13 and extend[prefix] == 1
            stays = len(rest) < length or before < pinned or channel > 65499 or asks
            stays = stays or channel in channels_kept
            before += len(rest)
            if gone >= wanted or stays:
                kept.append((frame, rest))
            else:
                gone += length
                dropped[channel] += 1
        assert dropped == self.queue.shed(wanted, pinned=pinned, prefix=prefix, kept=channels_kept)
        self.model = deque(kept)

    @invariant()
    def agrees(self) -> None:
        assert self.queue.queued == sum(len(rest) for _, rest in self.model)
        assert self.queue.frames() == [frame for frame, _ in self.model]


TestWriteQueue = QueueMachine.TestCase


def test_a_queue_that_is_dropped_lets_go_of_large_data() -> None:
    data = bytes(100_000)
    before = sys.getrefcount(data)
    queue = WriteQueue()
    queue.push(50, data)
    assert sys.getrefcount(data) > before
    assert queue.frames()[0][1] is data
    del queue
    assert sys.getrefcount(data) == before
