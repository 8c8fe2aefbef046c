"""The frames of clients, and the messages between gateways and zones, byte for byte."""

from __future__ import annotations

import asyncio
import random
import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domi_fast import FrameError, encode_frame
from domi_fast.gateway import CloseCode, LibraryEvent, Refusal, frames, wire
from domi_fast.gateway.events import ENDS_SESSION
from domi_fast.gateway.wire import ToGateway, ToZone
from tests.gateway.clients import Told, connected
from tests.gateway.nodes import gateway
from tests.reference import encode
from tests.support import ROOT, until

PAGE = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
VECTORS = dict(re.findall(r"^([a-z-]+) \| frame [^|]*\| ([0-9a-f]+)$", PAGE, re.M))
SESSION = bytes.fromhex("0110203040506070000102030405060708090a0b0c0d0e0f")

U64 = st.integers(0, 2**64 - 1)
U16 = st.integers(0, 2**16 - 1)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("client-welcome", frames.welcome(SESSION, 10.0)),
        ("client-resumed", frames.resumed(2, 10.0)),
        ("client-expired", frames.expired("the time of grace is over")),
        ("gateway-bye", frames.bye(4002, "flood")),
        ("gateway-refused", frames.refused(666, 50, 3, "all full")),
        ("gateway-lost", frames.lost(666, "gone")),
        ("client-ping", encode_frame(LibraryEvent.HEARTBEAT, frames.PING)),
        ("client-pong", encode_frame(LibraryEvent.HEARTBEAT, frames.PONG)),
        ("group-to-client", encode_frame(51, b"hello")),
    ],
)
def test_what_a_gateway_says_is_as_documented(name: str, made: bytes) -> None:
    assert made.hex() == VECTORS[name]


def test_what_a_client_says_is_understood_as_documented() -> None:
    event, data, extend = frames.parse(bytes.fromhex(VECTORS["client-to-group"]))
    assert (event, data, frames.address_of(extend)) == (8, b"hi", (0, 666, 50))
    assert frames.parse(bytes.fromhex(VECTORS["client-hello"])) == (1, b"token", b"")
    assert frames.parse(bytes.fromhex(VECTORS["client-bye"])) == (6, b"", b"")
    assert frames.parse(bytes.fromhex(VECTORS["client-to-gateway"])) == (60, b"hi", b"")
    event, data, _ = frames.parse(bytes.fromhex(VECTORS["client-resume"]))
    assert (event, frames.RESUME.unpack(data)) == (3, (SESSION, 3))


@pytest.mark.parametrize("kind", [LibraryEvent, Refusal, CloseCode, ToZone, ToGateway])
def test_each_number_stands_in_the_protocol(kind: type) -> None:
    for member in kind:  # type: ignore[attr-defined]
        if member in (LibraryEvent.LEAVE, LibraryEvent.AWAY, LibraryEvent.BACK):
            continue  # of handlers, never on a wire to a client
        name = member.name if kind is not CloseCode else ""
        assert re.search(rf"^\| {int(member)} \| {name}", PAGE, re.M), member


def test_which_ends_are_the_end_of_the_session_stands_in_the_protocol() -> None:
    for code in CloseCode:
        (said,) = re.findall(rf"^\| {int(code)} \|[^|]*\| ([^|]*) \|$", PAGE, re.M)
        assert (said == "is over") == (code in ENDS_SESSION), code


@given(st.binary(max_size=64))
def test_a_message_is_one_frame_or_an_error(message: bytes) -> None:
    try:
        event, data, extend = frames.parse(message)
    except FrameError:
        length, size = struct.unpack_from("<IH", message) if len(message) >= 8 else (0, 0)
        assert length != len(message) or size > len(message) - 8
    else:
        assert encode(event, data, extend) == message


@given(U16, st.binary(max_size=40), st.binary(max_size=40))
def test_every_frame_is_understood(event: int, data: bytes, extend: bytes) -> None:
    assert frames.parse(encode(event, data, extend)) == (event, data, extend)


@given(U64, U64, U16, st.binary(max_size=255), st.binary(max_size=40))
def test_messages_to_a_group(
    group: int, user: int, event: int, identity: bytes, data: bytes
) -> None:
    raw = wire.message(group, user, event, identity, data)
    assert wire.parse_message(raw) == (group, user, event, identity, data)
    for cut in range(wire.MESSAGE.size + len(identity)):
        with pytest.raises(FrameError):
            wire.parse_message(raw[:cut])


@given(U64, U16, st.lists(U64, max_size=10), st.binary(max_size=40))
def test_broadcasts(group: int, event: int, excluded: list[int], data: bytes) -> None:
    raw = wire.broadcast(group, event, data, tuple(excluded))
    assert wire.parse_broadcast(raw) == (group, event, tuple(excluded), data)
    for cut in range(wire.BROADCAST.size + 8 * len(excluded)):
        with pytest.raises(FrameError):
            wire.parse_broadcast(raw[:cut])


async def test_junk_over_raw_tcp_harms_nobody_else() -> None:
    chance = random.Random(7)
    async with gateway(authenticate_timeout=0.5) as gate, connected(gate) as innocent:
        gate.handle(60, lambda message: message.reply(61, message.data))
        await innocent.hello()
        for number in range(200):
            _, writer = await asyncio.open_connection("127.0.0.1", gate.tcp_port)
            junk = chance.randbytes(chance.randrange(1, 64))
            if number % 2:
                junk = encode(chance.randrange(70), junk, chance.randbytes(chance.randrange(20)))
            writer.write(encode(1) + junk if number % 3 else junk)
            await innocent.send(60, b"%d" % number)
            assert await innocent.take() == Told(61, b"%d" % number)
            writer.transport.abort()
        await until(lambda: gate.clients == 1)
