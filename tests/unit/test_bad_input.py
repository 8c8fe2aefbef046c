"""What bad input gets: each session fails alone, for a reason that is logged and counted."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import resource
import socket
import struct
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from domi_fast import (
    CircuitOpen,
    Context,
    DeadlineExceeded,
    DomiError,
    Frame,
    FrameError,
    FrameReader,
    Node,
    NoSubscriber,
    Overloaded,
    PeerLost,
    RemoteError,
    connect,
    encode_frame,
)
from tests import reference
from tests.reference import Offer
from tests.strangers import SECONDS, Stranger, extended, guest, plain, registered, stranger
from tests.support import until

MIB = 1 << 20


# -------------------------------------------------------------------------------------- the arena


class Arena(NamedTuple):
    node: Node
    other: Node
    caplog: pytest.LogCaptureFixture
    before: dict[str, int]

    def counted(self, name: str) -> int:
        return int(self.node.counters().get(name, 0)) - self.before.get(name, 0)

    def refused(self, reason: str) -> None:
        """One session was closed, and why was logged and counted."""
        assert self.counted("protocol_errors") == 1
        lines = [
            record.getMessage()
            for record in self.caplog.records
            if record.levelname == "WARNING" and record.name.startswith("domi_fast.")
        ]
        assert len(lines) == 1
        assert re.match(r"closed the session with 127\.0\.0\.1:\d+: ", lines[0])
        assert reason in lines[0]

    def unharmed(self) -> None:
        assert self.counted("protocol_errors") == 0
        assert not [r for r in self.caplog.records if r.levelno >= 30]


def echo(ctx: Context) -> None:
    with contextlib.suppress(DomiError):
        ctx.reply(ctx.data)


@asynccontextmanager
async def arena(
    url: str, caplog: pytest.LogCaptureFixture, **settings: Any
) -> AsyncIterator[Arena]:
    """A node with another live session, which has to go on as if nothing had been."""
    async with (
        Node("target", registry=url, **settings) as node,
        Node("other", registry=url) as other,
    ):
        node.subscribe(50, echo)
        await other.wait_subscribed(50, 1, SECONDS)
        ends = node.peers[other.id], other.peers[node.id]
        yield Arena(node, other, caplog, node.counters())
        for _ in range(3):
            assert await other.request(50, b"still there", SECONDS) == b"still there"
        assert (node.peers[other.id], other.peers[node.id]) == ends
        assert not [r for r in caplog.records if r.exc_info], "something raised"


# ----------------------------------------------------------------------------- before the handshake

MAGIC = reference.magic()
HEADER = struct.Struct("<IHH")


def name(data: bytes, extend: bytes = b"") -> bytes:
    return MAGIC + reference.encode(reference.NODE_NAME, data, extend)


def offered(**fields: Any) -> bytes:
    return reference.hello(7, Offer(**{"name": "x", **fields}))


BEFORE = {
    "magic of zeros": (bytes(4), "wrong magic"),
    "magic in big-endian": (MAGIC[::-1], "wrong magic"),
    "magic off by one": (b"\xfa\x08\0\0", "wrong magic"),
    "an HTTP request": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "wrong magic"),
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "wrong magic"),
    "no magic": (reference.encode(reference.NODE_NAME, b"\x07\0"), "wrong magic"),
    "length 0": (MAGIC + HEADER.pack(0, 0, 65510), "a frame length below 8"),
    "length 7": (MAGIC + HEADER.pack(7, 0, 65510), "a frame length below 8"),
    "length of 4,097": (MAGIC + HEADER.pack(4097, 0, 65510), "a frame length over the limit"),
    "length of 16 MiB": (MAGIC + HEADER.pack(16 * MIB, 0, 65510), "a frame length over the limit"),
    "length of 4 GiB": (MAGIC + HEADER.pack(2**32 - 1, 0, 65510), "a frame length over the limit"),
    "extend over its frame": (
        MAGIC + HEADER.pack(10, 3, 65510) + b"\x07\0",
        "an extend longer than its frame",
    ),
    "extend of 65,535": (MAGIC + HEADER.pack(8, 65535, 65510), "an extend longer than its frame"),
    "id 1024": (name(struct.pack("<H", 1024)), "machine id 1024: ids are 0-1023"),
    "id 65535": (name(struct.pack("<H", 65535)), "machine id 65535: ids are 0-1023"),
    "empty name": (name(b""), "a node name that is not two bytes"),
    "name of one byte": (name(b"\x07"), "a node name that is not two bytes"),
    "name of four bytes": (name(b"\x07\0\0\0"), "a node name that is not two bytes"),
    "the node's own id": (name(b"\0\0"), "machine id 0 is this node's own"),
    "the id of a live leased peer": (name(b"\x01\0"), "machine id 1 is held by a live node"),
    "a guest of another cluster": (
        reference.guest_hello(Offer("guest", cluster="elsewhere")),
        "the guest wants cluster 'elsewhere'",
    ),
    "a guest without an offer": (MAGIC + reference.encode(65514), "an offer of 0 bytes"),
    "a guest with half an offer": (
        MAGIC + reference.encode(65514, reference.encode_offer(Offer("guest"))[:-1]),
        "an offer that ends within a text",
    ),
}
for _channel in (0, 49, 50, 65499, *range(65500, 65510), 65511, 65512, 65513, 65515, 65516, 65535):
    BEFORE[f"channel {_channel} before the name"] = (
        MAGIC + reference.encode(_channel, b"\x07\0"),
        f"a frame on channel {_channel} before the handshake is complete",
    )


@pytest.mark.parametrize("row", list(BEFORE))
async def test_before_the_handshake(
    row: str, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    raw, reason = BEFORE[row]
    async with arena(registry_url, caplog) as scene, stranger(scene.node) as peer:
        await peer.say(raw)
        frames = await peer.closed()
        if row.startswith("a guest"):
            # It speaks the extended protocol, and hears why it is refused.
            [(channel, data, _)] = frames
            assert channel == reference.EXIT
            assert reason.encode() in data
        else:
            assert frames == []
        scene.refused(reason)


OFFERED = {
    "id 1024": (
        name(struct.pack("<H", 1024), reference.encode_offer(Offer("x"))),
        "machine id 1024: ids are 0-1023",
    ),
    "an offer cut short": (
        name(b"\x07\0", reference.encode_offer(Offer("x"))[:28]),
        "an offer of 28 bytes",
    ),
    "an offer cut within a text": (
        name(b"\x07\0", reference.encode_offer(Offer("x"))[:-1]),
        "an offer that ends within a text",
    ),
    "an offer that is not UTF-8": (
        name(b"\x07\0", bytes([1]) + bytes(28) + b"\x01\xff\0\0"),
        "an offer whose text is not UTF-8",
    ),
    "an older protocol": (offered(protocol=0), "protocol 0: this node speaks 1"),
    "another cluster": (offered(cluster="elsewhere"), "node 7 belongs to cluster 'elsewhere'"),
    "the node's own id": (
        reference.hello(0, Offer("x", epoch=99)),
        "machine id 0 is this node's own",
    ),
    "the id of a live leased peer": (
        reference.hello(1, Offer("x", epoch=0)),
        "machine id 1 is leased to another node",
    ),
}


@pytest.mark.parametrize("row", list(OFFERED))
async def test_an_offer_that_is_refused_is_told_why(
    row: str, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    raw, reason = OFFERED[row]
    async with arena(registry_url, caplog) as scene, stranger(scene.node) as peer:
        await peer.say(raw)
        [(channel, data, extend)] = await peer.closed()
        assert (channel, extend) == (reference.EXIT, b"")
        assert reason in data.decode()
        scene.refused(reason)


async def test_the_epoch_of_a_live_peer_with_another_instance(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, stranger(scene.node) as peer:
        epoch = scene.node._mesh._members.view[scene.other.id].epoch
        await peer.say(reference.hello(scene.other.id, Offer("x", epoch=epoch)))
        [(channel, data, _)] = await peer.closed()
        assert channel == reference.EXIT
        assert b"leased to another node" in data
        scene.refused("leased to another node")


async def test_an_epoch_that_the_registry_never_gave(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, stranger(scene.node) as peer:
        await peer.say(
            reference.hello(scene.other.id, Offer("x", epoch=2**63)),
            reference.subscriptions(reference.ALL, [50]),
        )
        assert [frame.channel for frame in await peer.closed()] == [reference.EXIT]
        scene.refused("a frame on channel 65513 before the handshake is complete")
        async with stranger(scene.node) as patient:
            await patient.say(reference.hello(scene.other.id, Offer("x", epoch=2**63)))
            reason = b"the registry does not know this node as 1"
            assert await patient.closed() == [(reference.EXIT, reason, b"")]


async def test_what_the_registry_refuses_is_logged_and_counted(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, stranger(scene.node) as peer:
        await peer.say(reference.hello(scene.other.id, Offer("x", epoch=2**63)))
        await peer.closed()
        scene.refused("the registry does not know this node as 1")


async def test_a_node_that_the_registry_does_not_know(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, stranger(scene.node) as peer:
        await peer.say(reference.hello(7, Offer("x", epoch=5)))
        frames = await peer.closed()
        assert frames == [(reference.EXIT, b"the registry does not know this node as 7", b"")]
        assert 7 not in scene.node.peers
        assert scene.node.subscribers(50) == [scene.node.id]


UNCONFIRMED = [0, 50, 65500, 65501, 65502, 65504, 65510, 65511, 65512, 65515, 65516, 65520]


@pytest.mark.parametrize("channel", UNCONFIRMED)
async def test_between_the_welcome_and_the_confirmation(
    channel: int, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        arena(registry_url, caplog) as scene,
        registered(registry_url, 7) as offer,
        stranger(scene.node) as peer,
    ):
        await peer.say(reference.hello(7, offer))
        assert (await peer.hear()).channel == reference.WELCOME
        await peer.say(reference.encode(channel, b"\x07\0"))
        reason = f"a frame on channel {channel} before the handshake is complete"
        assert await peer.closed() == [(reference.EXIT, reason.encode(), b"")]
        scene.refused(reason)


async def test_an_unconfirmed_dialler_may_say_goodbye(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        arena(registry_url, caplog) as scene,
        registered(registry_url, 7) as offer,
        stranger(scene.node) as peer,
    ):
        await peer.say(reference.hello(7, offer))
        assert (await peer.hear()).channel == reference.WELCOME
        await peer.say(reference.encode(reference.EXIT, b"another one stays"))
        assert await peer.closed() == []
        scene.unharmed()


async def test_magic_and_name_in_pieces_are_waited_for(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, stranger(scene.node) as peer:
        hello = reference.plain_hello(7)
        for i in range(len(hello)):
            assert 7 not in scene.node.peers
            await peer.say(hello[i : i + 1])
            assert await scene.other.request(50, b"between", SECONDS) == b"between"
        await peer.settled()
        assert 7 in scene.node.peers
        scene.unharmed()


@pytest.mark.parametrize("size", range(15))
async def test_a_handshake_that_ends_early(
    size: int, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    hello = reference.plain_hello(7)
    assert len(hello) == 14
    async with arena(registry_url, caplog) as scene:
        async with stranger(scene.node) as peer:
            await peer.say(hello[:size])
            peer.sock.shutdown(socket.SHUT_WR)
            assert await peer.closed() == []
        assert 7 not in scene.node.peers
        scene.unharmed()


@pytest.mark.parametrize("size", [0, 3, 4, 12, 13])
async def test_a_handshake_that_stands_still(
    size: int, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    hello = reference.plain_hello(7)
    async with (
        arena(registry_url, caplog, handshake_timeout=0.1) as scene,
        stranger(scene.node) as peer,
    ):
        await peer.say(hello[:size])
        assert await peer.closed() == []
        scene.refused("no complete handshake in time")


async def test_a_confirmation_that_does_not_come(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        arena(registry_url, caplog, handshake_timeout=0.1) as scene,
        registered(registry_url, 7) as offer,
        stranger(scene.node) as peer,
    ):
        await peer.say(reference.hello(7, offer))
        assert (await peer.hear()).channel == reference.WELCOME
        await peer.closed()
        scene.refused("no complete handshake in time")


# ------------------------------------------------------------------------------ after the handshake

AFTER = {
    "length 0": (HEADER.pack(0, 0, 50), "a frame length below 8"),
    "length 7": (HEADER.pack(7, 0, 65504), "a frame length below 8"),
    "one byte over the limit": (
        HEADER.pack(16 * MIB + 1, 0, 50),
        "a frame length over the limit",
    ),
    "length of 4 GiB": (HEADER.pack(2**32 - 1, 0, 50), "a frame length over the limit"),
    "extend over its frame": (HEADER.pack(8, 1, 50), "an extend longer than its frame"),
    "extend over its large frame": (
        HEADER.pack(20_000, 19_993, 50),
        "an extend longer than its frame",
    ),
    "a second node name": (
        reference.encode(reference.NODE_NAME, b"\x08\0"),
        "a second node name",
    ),
    "the same node name": (
        reference.encode(reference.NODE_NAME, b"\x07\0"),
        "a second node name",
    ),
    "an empty node name": (reference.encode(reference.NODE_NAME), "a second node name"),
}


@pytest.mark.parametrize("row", list(AFTER))
async def test_after_the_handshake(
    row: str, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    raw, reason = AFTER[row]
    async with arena(registry_url, caplog) as scene, plain(scene.node) as peer:
        # The valid frames before the fault are served, those behind it are not.
        got: list[bytes] = []
        scene.node.subscribe(51, lambda ctx: got.append(ctx.data))
        await peer.say(reference.encode(51, b"before"), raw, reference.encode(51, b"behind"))
        assert await peer.closed() == []
        assert got == [b"before"]
        scene.refused(reason)
        assert 7 not in scene.node.peers


@pytest.mark.parametrize("row", list(AFTER))
async def test_after_the_extended_handshake(
    row: str, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    raw, reason = AFTER[row]
    async with arena(registry_url, caplog) as scene, extended(scene.node, registry_url) as peer:
        await peer.say(raw)
        assert await peer.closed() == []
        scene.refused(reason)
        assert 7 not in scene.node.peers


async def test_a_frame_of_exactly_the_limit_is_served(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        arena(registry_url, caplog, frame_limit=4096) as scene,
        plain(scene.node) as peer,
    ):
        data = bytes(4096 - 8 - 4)
        await peer.say(reference.encode(50, data, reference.call_extend(7, 51)))
        assert await peer.hear() == (51, data, b"")
        await peer.say(reference.encode(50, data + b"!", reference.call_extend(7, 51)))
        assert await peer.closed() == []
        scene.refused("a frame length over the limit")


async def test_what_the_core_serves(registry_url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with arena(registry_url, caplog) as scene, plain(scene.node) as peer:
        await peer.say(reference.encode(reference.HEARTBEAT))
        assert await peer.hear() == (reference.HEARTBEAT_REPLY, b"", b"")
        await peer.say(
            reference.encode(reference.HEARTBEAT_REPLY), reference.encode(reference.PONG)
        )
        # Whatever comes with them.
        for channel in (reference.HEARTBEAT, reference.HEARTBEAT_REPLY, reference.PONG):
            await peer.say(reference.encode(channel, b"data", b"extend"))
        assert await peer.settled() == [(reference.HEARTBEAT_REPLY, b"", b"")]
        await peer.say(reference.encode(reference.EXIT, b"\xff not UTF-8"))
        assert await peer.closed() == []
        scene.unharmed()
        assert 7 not in scene.node.peers


LIBRARY = [65506, 65507, 65508, 65509, 65511, 65513, 65514, 65515, 65516, 65517, 65520, 65535]


@pytest.mark.parametrize("channel", [*LIBRARY, reference.NIL, reference.ANSWER])
async def test_library_channels_that_a_plain_peer_did_not_offer(
    channel: int, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, plain(scene.node) as peer:
        for data in (b"", b"data", bytes(100)):
            for extend in (b"", b"\0", b"\x07\0\x33\0", bytes(9), bytes(19)):
                await peer.say(reference.encode(channel, data, extend))
        assert await peer.settled() == []
        scene.unharmed()
        if channel != reference.NIL:
            assert scene.counted("dropped_not_negotiated") == 15


@pytest.mark.parametrize("channel", [0, 49, 51, 65499])
async def test_a_user_channel_without_a_handler(
    channel: int, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene:
        async with plain(scene.node) as peer:
            await peer.say(reference.encode(channel, b"data"))
            await peer.say(reference.encode(channel, b"data", reference.call_extend(7, 51)))
            assert await peer.settled() == []
            assert scene.counted("dropped_no_subscriber") == 2
        async with extended(scene.node, registry_url, 8) as peer:
            await peer.say(reference.encode(channel, b"data"))
            assert await peer.hear() == (
                reference.REJECT,
                b"data",
                reference.reject_extend(reference.NO_SUBSCRIBER, channel, 0),
            )
            address = reference.call_extend(8, 51)
            await peer.say(reference.encode(channel, b"data", address))
            assert await peer.hear() == (
                reference.REJECT,
                address + b"data",
                reference.reject_extend(reference.NO_SUBSCRIBER, channel, 4),
            )
            await peer.say(reference.encode(channel, b"data", reference.request_extend(99, 1000)))
            assert await peer.hear() == (
                reference.ANSWER,
                b"",
                reference.answer_extend(99, reference.NO_SUBSCRIBER),
            )
            await peer.say(reference.encode(channel, b"data", reference.publish_extend()))
            assert await peer.settled() == []
            assert scene.counted("dropped_no_subscriber") == 6
        scene.unharmed()


# ------------------------------------------------------------------------------- unfit extends

UNFIT_PLAIN = [b"\x07", b"\x07\0\x33", bytes(5), reference.request_extend(1, 1000), bytes(255)]
UNFIT_EXTENDED = [
    b"\x07",
    b"\x07\0",
    bytes(5),
    bytes(6),
    bytes(13),
    reference.request_extend(1)[:-1],
    reference.request_extend(1) + b"\0",
    bytes([9]) + bytes(12),
    bytes(255),
    bytes(65_000),
]


async def answers_of(node: Node, extend: bytes, peer: Stranger) -> None:
    """The message reaches the handler, whose reply and next raise, and nothing comes back."""
    contexts: list[Context] = []
    node.subscribe(51, contexts.append)
    await peer.settled()
    await peer.say(reference.encode(51, b"data", extend))
    assert await peer.settled() == []
    [ctx] = contexts
    assert (ctx.data, ctx.extend, ctx.sender) == (b"data", extend, 7)
    with pytest.raises(FrameError):
        ctx.reply(b"reply")
    with pytest.raises(FrameError):
        ctx.next(b"next")
    assert not ctx.answered
    assert await peer.settled() == []


@pytest.mark.parametrize("extend", UNFIT_PLAIN, ids=lambda extend: f"{len(extend)} bytes")
async def test_an_extend_that_fits_no_verb_of_a_plain_peer(
    extend: bytes, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, plain(scene.node) as peer:
        await answers_of(scene.node, extend, peer)
        scene.unharmed()


@pytest.mark.parametrize("extend", UNFIT_EXTENDED, ids=lambda extend: f"{len(extend)} bytes")
async def test_an_extend_that_fits_no_verb_of_an_extended_peer(
    extend: bytes, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, extended(scene.node, registry_url) as peer:
        await answers_of(scene.node, extend, peer)
        scene.unharmed()


async def test_a_reply_to_a_machine_that_is_not_there(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, plain(scene.node) as peer:
        contexts: list[Context] = []
        scene.node.subscribe(51, contexts.append)
        for machine in (8, 1023, 1024, 65535):
            await peer.say(reference.encode(51, b"", reference.call_extend(machine, 52)))
        await peer.settled()
        assert len(contexts) == 4
        for ctx in contexts:
            with pytest.raises(PeerLost):
                ctx.reply(b"reply")
        scene.unharmed()


@pytest.mark.parametrize("channel", [0, 49, 65500, 65503, 65510, 65512, 65513, 65535])
async def test_a_reply_to_a_channel_of_the_library(
    channel: int, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, plain(scene.node) as peer:
        contexts: list[Context] = []
        scene.node.subscribe(51, contexts.append)
        # The address is that of another, whose session EXIT would close.
        extend = reference.call_extend(scene.other.id, channel)
        await peer.say(reference.encode(51, b"", extend))
        await peer.settled()
        [ctx] = contexts
        with pytest.raises(FrameError):
            ctx.reply(b"reply")
        with pytest.raises((FrameError, NoSubscriber, ValueError)):
            ctx.next(b"next")
        scene.unharmed()


# ------------------------------------------------------------------------- the extended protocol

SUBSCRIPTIONS = {
    "half a channel": (b"\x32", b"\0"),
    "a channel and a half": (b"\x32\0\x33", b"\1"),
    "no operation": (b"\x32\0", b""),
    "two operations": (b"\x32\0", b"\0\1"),
    "operation 3": (b"\x32\0", b"\3"),
    "operation 255": (b"", b"\xff"),
    "more than there are": (bytes(2 * 65_537), b"\1"),
}


@pytest.mark.parametrize("row", list(SUBSCRIPTIONS))
async def test_malformed_subscriptions(
    row: str, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    data, extend = SUBSCRIPTIONS[row]
    async with (
        arena(registry_url, caplog) as scene,
        extended(scene.node, registry_url, channels=(60,)) as peer,
    ):
        assert scene.node.subscribers(60) == [7]
        await peer.say(reference.encode(reference.SUBSCRIPTIONS, data, extend))
        assert await peer.closed() == []
        scene.refused("a malformed list of subscriptions")
        assert scene.node.subscribers(60) == []


STATES = {
    "no state": (b"", b"\0"),
    "two states": (b"\0\0", b"\0"),
    "state 3": (b"\3", b"\0"),
    "nothing of who says it": (b"\0", b""),
    "neither said nor heard": (b"\0", b"\2"),
    "heard what was not said": (b"\1", b"\1"),
}


@pytest.mark.parametrize("row", list(STATES))
async def test_malformed_states(
    row: str, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    data, extend = STATES[row]
    async with (
        arena(registry_url, caplog) as scene,
        extended(scene.node, registry_url, channels=(60,)) as peer,
    ):
        await peer.say(reference.encode(reference.STATE, data, extend))
        assert await peer.closed() == []
        scene.refused("a malformed state")
        assert scene.node.subscribers(60) == []


MEMORIES = {
    "half a number": (b"\x10", b""),
    "a number and a half": (b"\x10\0\0", b""),
    "more than all": (b"\xe9\x03", b""),
    "an extend": (b"\x10\0", b"\0"),
}


@pytest.mark.parametrize("row", list(MEMORIES))
async def test_malformed_shares_of_memory(
    row: str, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    data, extend = MEMORIES[row]
    async with (
        arena(registry_url, caplog) as scene,
        extended(scene.node, registry_url, channels=(60,)) as peer,
    ):
        await peer.say(reference.encode(reference.MEMORY, b"\xe8\x03"))
        await peer.settled()
        assert scene.node.peers[7].memory == 1.0
        await peer.say(reference.encode(reference.MEMORY, data, extend))
        assert await peer.closed() == []
        scene.refused("a malformed share of memory")


async def test_a_state_is_heard_behind_what_was_sent_before(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And one that is told is heard, too; a paused peer may subscribe."""
    async with (
        arena(registry_url, caplog) as scene,
        extended(scene.node, registry_url, channels=(60,)) as peer,
    ):
        node = scene.node
        node.notify(60, b"before")
        await peer.say(reference.state(reference.PAUSED))
        assert await peer.hear() == (60, b"before", b"")
        assert await peer.hear() == (reference.STATE, b"\1", b"\1")
        assert node.peers[7].state == "paused"
        await peer.say(reference.subscriptions(reference.ADD, [61]))
        await peer.settled()
        assert node.subscribers(60) == node.subscribers(61) == []
        await peer.say(reference.state(reference.SERVING))
        assert await peer.hear() == (reference.STATE, b"\0", b"\1")
        assert node.subscribers(60) == node.subscribers(61) == [7]
        pausing = asyncio.ensure_future(node.pause())
        assert await peer.hear() == (reference.STATE, b"\1", b"\0")
        assert not pausing.done()
        await peer.say(reference.state(reference.PAUSED, heard=True))
        await pausing
        resuming = asyncio.ensure_future(node.resume())
        assert await peer.hear() == (reference.STATE, b"\0", b"\0")
        await peer.say(reference.state(reference.SERVING, heard=True))
        await resuming


async def test_what_a_peer_had_sent_before_it_hung_is_done_by_a_paused_node(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And one that goes on sending is waited for: it lives, and what it sends is on its way."""
    async with (
        arena(registry_url, caplog) as scene,
        extended(scene.node, registry_url, channels=(60,)) as peer,
    ):
        node = scene.node
        pausing = asyncio.ensure_future(node.pause())
        assert await peer.hear() == (reference.STATE, b"\1", b"\0")
        # Longer than a peer may be silent.
        began = time.monotonic()
        correlation = 0
        while time.monotonic() - began < 1.5:
            correlation += 1
            asked = reference.encode(50, b"sent", reference.request_extend(correlation))
            await peer.say(asked)
            answer = (reference.ANSWER, b"sent", reference.answer_extend(correlation))
            assert await peer.hear() == answer
            await asyncio.sleep(0.05)
        assert not pausing.done()
        silent = time.monotonic()
        await pausing
        assert 0.9 <= time.monotonic() - silent < 5.0
        assert "nothing comes of nodes [7], which may not know that it is paused" in caplog.text
        await peer.say(reference.encode(50, b"late", reference.request_extend(1)))
        assert await peer.hear() == (reference.ANSWER, b"late", reference.answer_extend(1))
        await peer.say(reference.state(reference.PAUSED, heard=True))
        await peer.settled()
        assert node.state == "paused"
        assert not node._router.session(7).unheard
        resuming = asyncio.ensure_future(node.resume())
        assert await peer.hear() == (reference.STATE, b"\0", b"\0")
        await peer.say(reference.state(reference.SERVING, heard=True))
        await resuming
        assert scene.counted("protocol_errors") == 0


async def test_a_peer_that_cannot_be_told_of_subscriptions_is_closed(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    limit = 64 * 1024
    async with arena(registry_url, caplog, queue_limit=limit) as scene:
        node = scene.node
        async with extended(node, registry_url, channels=(60,)):
            with contextlib.suppress(Overloaded):
                while True:
                    node.notify(60, bytes(4096), to=7)
            session = node._router.session(7)
            # News may go on top of a full queue, up to a quarter of it.
            told = 0
            while not session.closed:
                assert session.queued <= limit + limit // 4 + 4096
                node.subscribe(61, print)
                node.unsubscribe(61)
                told += 1
            assert told > 500
            await node._mesh.conditions.wait_for(lambda: 7 not in node.peers, SECONDS)
            assert "cannot be told of a change of subscriptions" in str(session.reason)


async def test_odd_subscriptions_that_are_well_formed(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, extended(scene.node, registry_url) as peer:
        for operation, channels in [
            (reference.ADD, [60, 60, 60]),
            (reference.ADD, []),
            (reference.REMOVE, [61]),
            (reference.ADD, [0, 49, 65500, 65503, 65535]),
            (reference.ALL, [60, *range(100, 2100)]),
            (reference.ALL, [60]),
            (reference.ADD, [60]),
        ]:
            await peer.say(reference.subscriptions(operation, channels))
        assert await peer.settled() == []
        assert scene.node.subscribers(60) == [7]
        assert scene.node.subscribers(100) == []
        assert scene.node.peers[7].channels == {60}
        scene.node.notify(60, b"once")
        assert await peer.settled() == [(60, b"once", b"")]
        await peer.say(reference.subscriptions(reference.REMOVE, [60, 60]))
        await peer.settled()
        assert scene.node.subscribers(60) == []
        scene.unharmed()


async def test_answers_to_nothing(registry_url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with (
        arena(registry_url, caplog) as scene,
        extended(scene.node, registry_url, channels=(60,)) as peer,
    ):
        request = scene.node.request(60, b"question", SECONDS)
        channel, data, extend = await peer.hear()
        assert (channel, data, len(extend)) == (60, b"question", 13)
        tag, correlation, milliseconds = struct.unpack("<BQI", extend)
        assert tag == reference.TAG_REQUEST
        assert 9_000 < milliseconds <= 10_000
        address = extend[1:9]
        for malformed in (b"", address, address + b"\0\0", address[:8] + bytes(5)):
            await peer.say(reference.encode(reference.ANSWER, b"no", malformed))
        await peer.settled()
        assert scene.counted("dropped_not_negotiated") == 4
        for other in (
            0,
            correlation + 1,
            correlation ^ (1 << 20),
            correlation ^ (1 << 63),
            2**64 - 1,
        ):
            await peer.say(
                reference.encode(reference.ANSWER, b"no", reference.answer_extend(other))
            )
        await peer.settled()
        assert scene.counted("late_answers") == 5
        # Nor may another session answer.
        async with extended(scene.node, registry_url, 8) as second:
            await second.say(
                reference.encode(reference.ANSWER, b"no", reference.answer_extend(correlation))
            )
            await second.settled()
        assert scene.counted("late_answers") == 6
        assert not request.done()
        answer = reference.encode(reference.ANSWER, b"yes", reference.answer_extend(correlation))
        await peer.say(answer, answer)
        assert await asyncio.wait_for(request, SECONDS) == b"yes"
        await peer.settled()
        assert scene.counted("late_answers") == 7
        scene.unharmed()


STATUSES: dict[int, type[DomiError]] = {
    reference.REMOTE_ERROR: RemoteError,
    reference.NO_SUBSCRIBER: NoSubscriber,
    reference.OVERLOADED: Overloaded,
    reference.PEER_LOST: PeerLost,
    reference.DEADLINE: DeadlineExceeded,
    reference.REFUSED: DomiError,
    reference.CIRCUIT_OPEN: CircuitOpen,
    8: DomiError,
    255: DomiError,
}


@pytest.mark.parametrize("status", list(STATUSES))
async def test_answers_that_are_not_ok(
    status: int, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        arena(registry_url, caplog) as scene,
        extended(scene.node, registry_url, channels=(60,)) as peer,
    ):
        for data in (b"", b"Type\0message", b"\0\0\0", b"\xff\xfe", b"text"):
            request = scene.node.request(60, b"", SECONDS)
            _, _, extend = await peer.hear()
            await peer.say(reference.encode(reference.ANSWER, data, extend[1:9] + bytes([status])))
            with pytest.raises(DomiError) as caught:
                await asyncio.wait_for(request, SECONDS)
            assert type(caught.value) is STATUSES[status]
            # Whose circuit is open stands before the text; 31,060 (`Ty`) and the like are no ids.
            about = 7 if status != reference.CIRCUIT_OPEN else 0 if data == b"\0\0\0" else None
            assert (caught.value.channel, caught.value.peer) == (60, about)
            if isinstance(caught.value, RemoteError) and data == b"Type\0message":
                assert (caught.value.type, caught.value.message) == ("Type", "message")
        scene.unharmed()


async def test_rejects(registry_url: str, caplog: pytest.LogCaptureFixture) -> None:
    errors: list[tuple[DomiError, Frame]] = []
    async with (
        arena(registry_url, caplog, on_error=lambda e, f: errors.append((e, f))) as scene,
        extended(scene.node, registry_url, channels=(60,)) as peer,
    ):
        for data, extend in [
            (b"", b""),
            (b"data", bytes(4)),
            (b"data", bytes(6)),
            (b"abc", reference.reject_extend(2, 60, 4)),
            (b"", reference.reject_extend(2, 60, 65535)),
        ]:
            await peer.say(reference.encode(reference.REJECT, data, extend))
        await peer.settled()
        assert scene.counted("dropped_not_negotiated") == 5
        assert errors == []
        await peer.say(
            reference.encode(reference.REJECT, b"EEdata", reference.reject_extend(2, 60, 2))
        )
        await peer.say(reference.encode(reference.REJECT, b"", reference.reject_extend(99, 0, 0)))
        await peer.settled()
        assert [type(error) for error, _ in errors] == [NoSubscriber, DomiError]
        assert errors[0][0].channel == 60
        assert errors[0][0].peer == 7
        assert errors[0][1] == Frame(60, b"data", b"EE")
        assert errors[1][1] == Frame(0, b"", b"")
        assert scene.counted("rejected") == 2
        scene.unharmed()


@pytest.mark.parametrize("channel", sorted({*LIBRARY} - {65513, 65515, 65517}))
async def test_library_channels_that_have_no_use_on_the_session(
    channel: int, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, extended(scene.node, registry_url) as peer:
        relay = reference.relay_extend(reference.NOTIFY, 50)
        for extend in (b"", bytes(3), relay):
            await peer.say(reference.encode(channel, b"data", extend))
        assert await peer.settled() == []
        assert scene.counted("dropped_not_negotiated") == 3
        scene.unharmed()


@pytest.mark.parametrize("channel", [65500, 65506, 65519, 65535])
async def test_a_request_on_a_library_channel_that_nobody_serves(
    channel: int, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, extended(scene.node, registry_url) as peer:
        await peer.say(reference.encode(channel, b"?", reference.request_extend(77, 1000)))
        answer = reference.answer_extend(77, reference.NO_SUBSCRIBER)
        assert await peer.settled() == [(reference.ANSWER, b"", answer)]
        scene.unharmed()


async def test_the_verbs_of_a_peer_built_by_hand(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    contexts: list[Context] = []
    async with (
        arena(registry_url, caplog) as scene,
        extended(scene.node, registry_url, channels=(60, 61)) as peer,
    ):
        node = scene.node
        # From the node.
        node.notify(60, b"notify")
        assert await peer.hear() == (60, b"notify", b"")
        assert node.publish(60, b"publish") == 1
        assert await peer.hear() == (60, b"publish", reference.publish_extend())
        node.call(60, b"call", 51)
        assert await peer.hear() == (60, b"call", reference.call_extend(node.id, 51))
        node.ventilator([60, 61, 62], b"pipeline")
        assert await peer.hear() == (60, b"pipeline", reference.pipeline_extend([61, 62]))
        node.subscribe(51, contexts.append)
        assert await peer.hear() == (reference.SUBSCRIPTIONS, b"\x33\0", b"\x01")
        # To the node.
        await peer.say(reference.encode(50, b"ask", reference.request_extend(5, 1000)))
        assert await peer.hear() == (reference.ANSWER, b"ask", reference.answer_extend(5))
        await peer.say(reference.encode(50, b"call", reference.call_extend(7, 60)))
        assert await peer.hear() == (60, b"call", b"")
        await peer.say(reference.encode(51, b"stage", reference.pipeline_extend([61, 62])))
        await peer.settled()
        contexts.pop().next(b"next")
        assert await peer.hear() == (61, b"next", reference.pipeline_extend([62]))
        await peer.say(reference.encode(51, b"stage", reference.pipeline_extend([61])))
        await peer.settled()
        contexts.pop().next(b"last")
        assert await peer.hear() == (61, b"last", reference.pipeline_extend([]))
        node.unsubscribe(51)
        assert await peer.hear() == (reference.SUBSCRIPTIONS, b"\x33\0", b"\x02")
        scene.unharmed()
    assert await peer_end(registry_url, caplog) == b"the node is closing"


async def peer_end(url: str, caplog: pytest.LogCaptureFixture) -> bytes:
    """The reason that a node gives when it closes."""
    node = Node("last", registry=url)
    await node.start()
    async with extended(node, url, 9) as peer:
        await node.close()
        [frame] = await peer.closed()
    assert frame.channel == reference.EXIT
    return frame.data


# ------------------------------------------------------------------------------------------ guests


@pytest.mark.parametrize("size", [0, 1, 18])
async def test_a_malformed_relay(
    size: int, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, guest(scene.node) as peer:
        await peer.settled()
        relay = reference.relay_extend(reference.NOTIFY, 50)
        await peer.say(reference.encode(reference.RELAY, b"data", relay[:size]))
        assert await peer.closed() == []
        scene.refused("a malformed relay")


Relay = Callable[..., bytes]
R = reference.relay_extend
REFUSED_RELAYS: dict[str, tuple[bytes, int, int]] = {
    "verb 0": (R(0, 50), reference.REFUSED, 50),
    "verb 7": (R(7, 50), reference.REFUSED, 50),
    "verb 255": (R(255, 50), reference.REFUSED, 50),
    "notify to nobody": (R(reference.NOTIFY, 99), reference.NO_SUBSCRIBER, 99),
    "notify to no such node": (R(reference.NOTIFY, 50, to=900), reference.PEER_LOST, 50),
    "notify to no such id": (R(reference.NOTIFY, 50, to=2000), reference.PEER_LOST, 50),
    "notify a library channel": (R(reference.NOTIFY, 65503), reference.REFUSED, 65503),
    "publish a library channel": (R(reference.PUBLISH, 65503), reference.REFUSED, 65503),
    "notify channel 0": (R(reference.NOTIFY, 0), reference.REFUSED, 0),
    "call nobody": (R(reference.CALL, 99, reply=51), reference.NO_SUBSCRIBER, 99),
    "a pipeline to nobody": (R(reference.PIPELINE, 99), reference.NO_SUBSCRIBER, 99),
    "a reply to nobody": (R(reference.REPLY, 51, to=900), reference.PEER_LOST, 51),
    "a reply to any": (R(reference.REPLY, 51), reference.PEER_LOST, 51),
    "a reply to EXIT": (R(reference.REPLY, 65503, to=1), reference.REFUSED, 65503),
}


@pytest.mark.parametrize("row", list(REFUSED_RELAYS))
async def test_a_relay_that_cannot_be_carried_out(
    row: str, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    extend, status, channel = REFUSED_RELAYS[row]
    async with arena(registry_url, caplog) as scene, guest(scene.node) as peer:
        await peer.say(reference.encode(reference.RELAY, b"data", extend))
        refused = {
            "call nobody": struct.pack("<HH", scene.node.id, 51),
            "a pipeline to nobody": b"\x04",
        }.get(row, b"")
        assert await peer.settled() == [
            (
                reference.REJECT,
                refused + b"data",
                reference.reject_extend(status, channel, len(refused)),
            )
        ]
        scene.unharmed()


async def test_requests_of_a_guest_that_cannot_be_carried_out(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, guest(scene.node) as peer:
        for channel, to, status in [
            (99, reference.NO_MACHINE, reference.NO_SUBSCRIBER),
            (50, 900, reference.PEER_LOST),
            (65503, reference.NO_MACHINE, reference.REFUSED),
        ]:
            extend = R(reference.REQUEST, channel, to=to, correlation=6, milliseconds=1000)
            await peer.say(reference.encode(reference.RELAY, b"data", extend))
            [(answered, _, found)] = await peer.settled()
            assert (answered, found) == (reference.ANSWER, reference.answer_extend(6, status))
        extend = R(reference.REQUEST, 50, correlation=7)
        await peer.say(reference.encode(reference.RELAY, b"data", extend))
        assert await peer.hear() == (reference.ANSWER, b"data", reference.answer_extend(7))
        scene.unharmed()


@pytest.mark.parametrize("channel", [65500, 65503, 65510, 65513, 0, 49])
async def test_a_guest_asks_for_its_reply_on_a_channel_of_the_library(
    channel: int, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, guest(scene.node) as peer:
        failures: list[Exception] = []

        def answer(ctx: Context) -> None:
            try:
                ctx.reply(b"reply")
            except DomiError as error:
                failures.append(error)

        scene.other.subscribe(55, answer)
        await scene.node.wait_subscribed(55, 1, SECONDS)
        extend = R(reference.CALL, 55, reply=channel)
        await peer.say(reference.encode(reference.RELAY, b"data", extend))
        said = await peer.settled()
        assert failures or [frame.channel for frame in said] == [reference.REJECT]
        scene.unharmed()


async def test_a_guest_sends_on_a_user_channel(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, guest(scene.node) as peer:
        await peer.settled()
        for extend in (b"", reference.call_extend(7, 51), reference.guest_reply_extend(1)):
            await peer.say(reference.encode(50, b"data", extend))
        assert await peer.settled() == []
        assert scene.counted("dropped_not_negotiated") == 3
        scene.unharmed()


async def test_a_reply_for_a_guest_that_is_not_there(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, extended(scene.node, registry_url) as peer:
        for number in (0, 1, 2**32 - 1):
            await peer.say(reference.encode(51, b"data", reference.guest_reply_extend(number)))
        assert await peer.settled() == []
        assert scene.counted("replies_for_lost_guests") == 3
        scene.unharmed()


@pytest.mark.parametrize("machine", [4, 5, 261])
async def test_no_sender_is_taken_for_a_tag(
    machine: int, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Five bytes reach the guest: the sender, which may begin with a tag's number, then the extend.
    async with (
        arena(registry_url, caplog) as scene,
        extended(scene.node, registry_url, machine) as peer,
        await connect(f"tcp://127.0.0.1:{scene.node.port}") as client,
    ):
        got: asyncio.Queue[Context] = asyncio.Queue()
        client.subscribe(55, got.put_nowait)
        await scene.node.wait_subscribed(55, 1, SECONDS)
        await peer.say(reference.encode(55, b"stage", reference.pipeline_extend([56])))
        ctx = await asyncio.wait_for(got.get(), 2.0)
        assert (ctx.data, ctx.sender) == (b"stage", machine)
        assert ctx.extend == reference.pipeline_extend([56])
        scene.unharmed()


# ----------------------------------------------------------------------------- ids and their leases


async def test_a_lease_evicts_an_unleased_holder(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, plain(scene.node, 7) as squatter:
        assert 7 in scene.node.peers
        async with extended(scene.node, registry_url, 7) as peer:
            frames = await squatter.closed()
            assert [frame.channel for frame in frames] in ([reference.EXIT], [])
            assert not scene.node.peers[7].plain
            assert scene.node.peers[7].name == "by-hand"
            # And the squatter cannot come back.
            async with stranger(scene.node) as again:
                await again.say(reference.plain_hello(7))
                assert await again.closed() == []
            await peer.settled()
        scene.refused("machine id 7 is held by a live node")


async def test_a_lease_alone_evicts_an_unleased_holder(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, plain(scene.node, 7) as squatter:
        async with registered(registry_url, 7):
            assert await squatter.closed() == [(reference.EXIT, b"", b"")]
        assert 7 not in scene.node.peers
        scene.unharmed()


async def test_a_second_session_of_the_same_instance_replaces_the_first(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        arena(registry_url, caplog) as scene,
        registered(registry_url, 7) as offer,
        stranger(scene.node) as first,
        stranger(scene.node) as second,
    ):
        confirmation = reference.subscriptions(reference.ALL, [60])
        await first.say(reference.hello(7, offer), confirmation)
        await first.settled()
        await second.say(reference.hello(7, offer))
        assert (await second.hear()).channel == reference.WELCOME
        # Unconfirmed, it has replaced nothing.
        await first.settled()
        await second.say(confirmation)
        await first.closed()
        await second.settled()
        assert scene.node.subscribers(60) == [7]
        scene.unharmed()


# ---------------------------------------------------------------------------------- memory and time


def data_size() -> int:
    """Bytes of memory that this process has asked for, used or not."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[5]) * resource.getpagesize()


async def test_no_memory_for_bytes_that_have_not_arrived(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    count = 64
    sockets: list[socket.socket] = []
    async with arena(registry_url, caplog) as scene:
        try:
            peers = []
            for machine in range(100, 100 + count):
                sock = socket.socket()
                sockets.append(sock)
                sock.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(sock, ("127.0.0.1", scene.node.port))
                peers.append(Stranger(sock))
                await peers[-1].say(reference.plain_hello(machine))
                await peers[-1].settled()
            before = data_size()
            received = scene.node.counters()["bytes_in"]
            for peer in peers:
                await peer.say(HEADER.pack(16 * MIB, 0, 50), bytes(64))
            while scene.node.counters()["bytes_in"] - received < count * 72:
                await scene.other.request(50, b"", SECONDS)
            # A gigabyte was claimed.
            assert data_size() - before < 16 * MIB
        finally:
            for sock in sockets:
                sock.close()
        await scene.node.wait_peers(1, SECONDS)
        scene.unharmed()


async def test_memory_follows_what_has_arrived(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, plain(scene.node) as peer:
        before = data_size()
        received = scene.node.counters()["bytes_in"]
        await peer.say(HEADER.pack(16 * MIB, 65_535, 50), bytes(MIB))
        while scene.node.counters()["bytes_in"] - received < MIB + 8:
            await scene.other.request(50, b"", SECONDS)
        assert data_size() - before < 6 * MIB


def test_who_has_sent_much_gets_as_much_room_at_once_and_no_more() -> None:
    announced = HEADER.pack(16 * MIB, 0, 50) + bytes(64)

    def grown(reader: FrameReader) -> int:
        """Bytes that it takes for a frame of which next to nothing has come."""
        before, _ = tracemalloc.get_traced_memory()
        reader.feed(announced)
        return tracemalloc.get_traced_memory()[0] - before

    reader, other = FrameReader(), FrameReader()
    whole = encode_frame(50, bytes(8 * MIB))
    tracemalloc.start()
    try:
        assert len(reader.feed(whole[:MIB]) + reader.feed(whole[MIB:])) == 1
        assert 7 * MIB < grown(reader) < 9 * MIB
        # Another connection has shown nothing.
        assert grown(other) < MIB
    finally:
        tracemalloc.stop()


async def test_pings_without_end_from_a_peer_that_never_reads(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    limit = 256 * 1024
    async with (
        arena(registry_url, caplog, queue_limit=limit) as scene,
        plain(scene.node) as peer,
    ):
        flood = reference.encode(reference.PING, b"ping") * 8192
        highest = 0
        sent = 0
        while sent < 12 * MIB and 7 in scene.node.peers:
            try:
                await asyncio.wait_for(peer.say(flood), SECONDS)
            except OSError:
                break
            sent += len(flood)
            assert await scene.other.request(50, b"between", SECONDS) == b"between"
            highest = max(highest, scene.node.peers[7].queued if 7 in scene.node.peers else 0)
        assert highest <= 2 * limit


async def test_states_without_end_from_a_peer_that_never_reads(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each is to be acknowledged: who takes nothing is closed."""
    limit = 256 * 1024
    async with (
        arena(registry_url, caplog, queue_limit=limit) as scene,
        extended(scene.node, registry_url, 7, channels=(60,)) as peer,
    ):
        flood = reference.state(0) * 20_000
        with contextlib.suppress(OSError):
            while 7 in scene.node.peers:
                await asyncio.wait_for(peer.say(flood), SECONDS)
                assert await scene.other.request(50, b"between", SECONDS) == b"between"
                assert 7 not in scene.node.peers or scene.node.peers[7].queued <= 2 * limit
        await until(lambda: 7 not in scene.node.peers)


async def test_a_drip_of_64_bytes_delays_nobody(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with arena(registry_url, caplog) as scene, plain(scene.node) as peer:
        data = random.Random(1).randbytes(100_000)
        raw = reference.encode(50, data, reference.call_extend(7, 51))
        for number, i in enumerate(range(0, len(raw), 64)):
            await peer.say(raw[i : i + 64])
            if number % 50 == 0:
                assert await scene.other.request(50, b"between", SECONDS) == b"between"
        assert await peer.hear() == (51, data, b"")
        scene.unharmed()


@pytest.mark.parametrize("seed", range(3))
async def test_frames_of_all_sizes_in_pieces_of_all_sizes(
    seed: int, registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    noise = random.Random(seed)
    async with arena(registry_url, caplog) as scene, plain(scene.node) as peer:
        sizes = [0, 1, 16_371, 16_372, 16_373, 65_524, 65_536, 131_072, 300_000]
        sizes += [noise.randrange(200_000) for _ in range(6)]
        noise.shuffle(sizes)
        messages = [noise.randbytes(size) for size in sizes]
        stream = b"".join(
            reference.encode(50, data, reference.call_extend(7, 51)) for data in messages
        )

        async def drip() -> None:
            place = 0
            while place < len(stream):
                size = noise.choice([1, 7, 8, 64, 1500, 4096, 65_536, 131_072])
                await peer.say(stream[place : place + size])
                place += size
                if noise.random() < 0.3:
                    await asyncio.sleep(0)

        dripping = asyncio.ensure_future(drip())
        for data in messages:
            assert await peer.hear() == (51, data, b"")
        await dripping
        scene.unharmed()


# ----------------------------------------------------------------------------------------- garbage


def garbage(noise: random.Random) -> bytes:
    """Something that begins better or worse, and goes on at random."""
    valid = b"".join(
        reference.encode(
            noise.choice([50, 51, 99, *range(65500, 65520)]),
            noise.randbytes(noise.randrange(40)),
            noise.randbytes(noise.choice([0, 0, 1, 4, 5, 9, 13, 19, 21])),
        )
        for _ in range(noise.randrange(8))
    )
    rest = noise.choice([valid, valid, noise.randbytes(noise.randrange(200))])
    begin = noise.choice(
        [
            b"",
            MAGIC,
            reference.plain_hello(7),
            reference.plain_hello(noise.randrange(65536)),
            reference.guest_hello(Offer("guest", cluster="")),
            reference.hello(7, Offer("x", epoch=noise.randrange(5))),
            reference.hello(7, Offer("x")) + reference.subscriptions(reference.ALL, [50, 51]),
        ]
    )
    raw = bytearray(begin + rest)
    for _ in range(noise.choice([0, 0, 1, 3])):
        if raw:
            raw[noise.randrange(len(raw))] ^= 1 << noise.randrange(8)
    return bytes(raw[: noise.randrange(len(raw) + 1)] if noise.random() < 0.2 else raw)


@pytest.mark.parametrize("seed", range(12))
async def test_garbage(seed: int, registry_url: str, caplog: pytest.LogCaptureFixture) -> None:
    noise = random.Random(seed)
    async with arena(registry_url, caplog) as scene:
        scene.node.subscribe(51, lambda ctx: None)
        for _ in range(25):
            async with stranger(scene.node) as peer:
                raw = garbage(noise)
                try:
                    if noise.random() < 0.5:
                        await peer.say(raw)
                    else:
                        for i in range(0, len(raw), 5):
                            await peer.say(raw[i : i + 5])
                    peer.sock.shutdown(socket.SHUT_WR)
                except OSError:
                    # Closed by the node, as it may be at any byte.
                    continue
                if noise.random() < 0.8:
                    await peer.closed()
            assert await scene.other.request(50, b"between", SECONDS) == b"between"
        await scene.node.wait_peers(1, SECONDS)
        assert "handler_errors" not in scene.node.counters()


async def test_resets_at_every_byte_of_a_handshake(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    hello = reference.hello(7, Offer("x")) + reference.subscriptions(reference.ALL)
    async with arena(registry_url, caplog) as scene:
        for size in range(len(hello) + 1):
            async with stranger(scene.node) as peer:
                await peer.say(hello[:size])
                if size % 3 == 0:
                    await scene.other.request(50, b"", SECONDS)
                peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await scene.node.wait_peers(1, SECONDS)
