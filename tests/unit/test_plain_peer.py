"""A peer of the plain protocol, as docs/protocol.md has it: a socket and ``struct`` alone."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from domi_fast import Context, DomiError, FrameError, Node, NoSubscriber, PeerLost

HEARTBEAT_REPLY, HEARTBEAT, EXIT, PING, PONG, NODE_NAME = 65501, 65502, 65503, 65504, 65505, 65510
SECONDS = 10.0


def frame(channel: int, data: bytes = b"", extend: bytes = b"") -> bytes:
    header = struct.pack("<IHH", 8 + len(data) + len(extend), len(extend), channel)
    return header + data + extend


class PlainPeer:
    """What another language would have to write."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.answers_heartbeats = True
        self.heartbeats = 0
        self.seen: list[tuple[int, bytes, bytes]] = []

    async def say(self, raw: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, raw)

    async def hello(self, machine: int) -> None:
        await self.say(struct.pack("<I", 2299) + frame(NODE_NAME, struct.pack("<H", machine)))

    async def exactly(self, size: int) -> bytes:
        raw = b""
        while len(raw) < size:
            piece = await asyncio.get_running_loop().sock_recv(self.sock, size - len(raw))
            if not piece:
                raise EOFError
            raw += piece
        return raw

    async def frame(self) -> tuple[int, bytes, bytes]:
        """The next frame, whatever it is."""
        length, extend_size, channel = struct.unpack("<IHH", await self.exactly(8))
        data = await self.exactly(length - 8 - extend_size)
        found = (channel, data, await self.exactly(extend_size))
        self.seen.append(found)
        return found

    async def hear(self) -> tuple[int, bytes, bytes]:
        """The next frame that is not a heartbeat; heartbeats are answered."""

        async def next_frame() -> tuple[int, bytes, bytes]:
            while True:
                found = await self.frame()
                if found[0] != HEARTBEAT:
                    return found
                self.heartbeats += 1
                if self.answers_heartbeats:
                    await self.say(frame(HEARTBEAT_REPLY))

        return await asyncio.wait_for(next_frame(), SECONDS)

    async def settled(self) -> None:
        """Until the node has dealt with everything that was said before."""
        await self.say(frame(PING, b"ping"))
        assert await self.hear() == (PONG, b"pong", b"")

    async def end(self) -> None:
        """Until the node has closed the connection."""
        try:
            while True:
                await self.hear()
        except (EOFError, ConnectionResetError):
            pass


@asynccontextmanager
async def dialled(node: Node) -> AsyncIterator[PlainPeer]:
    with socket.socket() as sock:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", node.port))
        yield PlainPeer(sock)


@asynccontextmanager
async def introduced(node: Node, machine: int = 7) -> AsyncIterator[PlainPeer]:
    async with dialled(node) as peer:
        await peer.hello(machine)
        await node.wait_peers(1, SECONDS)
        yield peer


async def test_it_takes_an_id_and_is_listed(registry_url: str) -> None:
    async with Node("a", registry=registry_url) as node, introduced(node, 7) as peer:
        assert list(node.peers) == [7]
        assert node.peers[7].plain
        assert node.peers[7].name == ""
        assert node.peers[7].channels == frozenset()
        await peer.say(frame(EXIT))
        await peer.end()
        assert not node.peers


async def test_the_highest_id_and_a_hello_in_single_bytes(registry_url: str) -> None:
    async with Node("a", registry=registry_url) as node, dialled(node) as peer:
        hello = struct.pack("<I", 2299) + frame(NODE_NAME, struct.pack("<H", 1023))
        peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(len(hello)):
            await peer.say(hello[i : i + 1])
            await asyncio.sleep(0)
        await node.wait_peers(1, SECONDS)
        assert list(node.peers) == [1023]


async def test_hello_and_messages_may_come_in_one_piece(registry_url: str) -> None:
    async with Node("a", registry=registry_url) as node, dialled(node) as peer:
        node.subscribe(50, lambda ctx: ctx.reply(ctx.data.upper()))
        call = frame(50, b"hi", struct.pack("<HH", 7, 51))
        hello = struct.pack("<I", 2299) + frame(NODE_NAME, struct.pack("<H", 7))
        await peer.say(hello + call * 3)
        for _ in range(3):
            assert await peer.hear() == (51, b"HI", b"")


async def test_it_calls_and_gets_the_reply(registry_url: str) -> None:
    senders: list[int] = []
    extends: list[bytes] = []
    async with Node("a", registry=registry_url) as node, introduced(node, 7) as peer:

        @node.subscribe(50)
        def greet(ctx: Context) -> None:
            senders.append(ctx.sender)
            extends.append(ctx.extend)
            ctx.reply(b"hello " + ctx.data)

        await peer.say(frame(50, b"you", struct.pack("<HH", 7, 51)))
        assert await peer.hear() == (51, b"hello you", b"")
        assert senders == [7]
        assert extends == [b"\x07\x00\x33\x00"]


async def test_a_large_call_in_small_pieces(registry_url: str) -> None:
    async with Node("a", registry=registry_url) as node, introduced(node, 7) as peer:
        node.subscribe(50, lambda ctx: ctx.reply(ctx.data[::-1]))
        data = bytes(range(256)) * 400
        raw = frame(50, data, struct.pack("<HH", 7, 51))
        for i in range(0, len(raw), 997):
            await peer.say(raw[i : i + 997])
        assert await peer.hear() == (51, data[::-1], b"")


async def test_it_pings(registry_url: str) -> None:
    async with Node("a", registry=registry_url) as node, introduced(node) as peer:
        await peer.say(frame(PING, b"ping"))
        assert await peer.hear() == (PONG, b"pong", b"")


async def test_its_heartbeat_is_answered(registry_url: str) -> None:
    async with Node("a", registry=registry_url) as node, introduced(node) as peer:
        await peer.say(frame(HEARTBEAT))
        assert await peer.hear() == (HEARTBEAT_REPLY, b"", b"")


async def test_one_that_answers_heartbeats_is_kept(registry_url: str) -> None:
    settings = {"heartbeat_interval": 0.1, "heartbeat_timeout": 0.25}
    async with Node("a", registry=registry_url, **settings) as node, introduced(node) as peer:
        begun = asyncio.get_running_loop().time()
        # Four times as long as silence is borne, and nothing is said but the answers.
        for _ in range(11):
            assert await asyncio.wait_for(peer.frame(), SECONDS) == (HEARTBEAT, b"", b"")
            await peer.say(frame(HEARTBEAT_REPLY))
        assert asyncio.get_running_loop().time() - begun > 1.0
        await peer.settled()
        assert 7 in node.peers
        assert "peers_silent" not in node.counters()


async def test_one_that_does_not_answer_is_dropped(registry_url: str) -> None:
    settings = {"heartbeat_interval": 0.1, "heartbeat_timeout": 0.35}
    async with Node("a", registry=registry_url, **settings) as node, introduced(node) as peer:
        begun = asyncio.get_running_loop().time()
        peer.answers_heartbeats = False
        await peer.end()
        assert 0.3 < asyncio.get_running_loop().time() - begun < 3.0
        assert peer.heartbeats in (2, 3, 4)
        assert not node.peers
        assert node.counters()["peers_silent"] == 1


async def test_it_is_called_by_its_id_and_replies(registry_url: str) -> None:
    replies: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()
    async with Node("a", registry=registry_url) as node, introduced(node, 7) as peer:
        node.subscribe(61, lambda ctx: replies.put_nowait((ctx.sender, ctx.data)))
        node.call(60, b"question", 61, to=7)
        channel, data, extend = await peer.hear()
        assert (channel, data) == (60, b"question")
        machine, reply_channel = struct.unpack("<HH", extend)
        assert (machine, reply_channel) == (node.id, 61)
        await peer.say(frame(reply_channel, b"answer"))
        assert await asyncio.wait_for(replies.get(), SECONDS) == (7, b"answer")


async def test_what_the_verbs_send_it(registry_url: str) -> None:
    async with Node("a", registry=registry_url) as node, introduced(node, 7) as peer:
        node.notify(60, b"one", to=7)
        assert await peer.hear() == (60, b"one", b"")
        assert node.publish(60, b"two", to=7) == 1
        assert await peer.hear() == (60, b"two", b"")
        # It has announced nothing, so nothing finds it by a channel alone.
        assert node.publish(60, b"three") == 0
        refused: list[Callable[[], object]] = [
            lambda: node.notify(60, b""),
            lambda: node.call(60, b"", 61),
            lambda: node.ventilator([60], b""),
        ]
        for send in refused:
            with pytest.raises(NoSubscriber):
                send()
        with pytest.raises(DomiError, match="plain protocol") as caught:
            node.request(60, b"", to=7)
        assert (caught.value.channel, caught.value.peer) == (60, 7)


async def test_it_begins_a_pipeline_whose_stages_go_on(registry_url: str) -> None:
    done: asyncio.Queue[tuple[bytes, bytes]] = asyncio.Queue()
    async with Node("a", registry=registry_url) as node, introduced(node, 7) as peer:
        node.subscribe(50, lambda ctx: ctx.next(ctx.data + b" first"))
        node.subscribe(51, lambda ctx: ctx.next(ctx.data + b" second"))
        node.subscribe(52, lambda ctx: done.put_nowait((ctx.data, ctx.extend)))
        await peer.say(frame(50, b"data", struct.pack("<HH", 51, 52)))
        data, _ = await asyncio.wait_for(done.get(), SECONDS)
        assert data == b"data first second"


async def test_it_publishes_and_notifies(registry_url: str) -> None:
    got: asyncio.Queue[Context] = asyncio.Queue()
    async with Node("a", registry=registry_url) as node, introduced(node, 7) as peer:
        node.subscribe(50, got.put_nowait)
        await peer.say(frame(50, b"news"))
        ctx = await asyncio.wait_for(got.get(), SECONDS)
        assert (ctx.data, ctx.sender, ctx.extend) == (b"news", 7, b"")
        assert not ctx.is_request
        assert ctx.deadline is None
        with pytest.raises(DomiError):
            ctx.reply(b"to nobody")


async def test_exit_closes(registry_url: str) -> None:
    async with Node("a", registry=registry_url) as node, introduced(node, 7) as peer:
        await peer.say(frame(EXIT) + frame(PING, b"ping"))
        with pytest.raises((EOFError, ConnectionResetError)):
            await peer.hear()
        assert not node.peers
        assert "protocol_errors" not in node.counters()
        with pytest.raises(PeerLost):
            node.notify(60, b"", to=7)
    assert peer.seen == []


async def test_an_end_without_exit_closes_too_and_the_id_is_free_again(registry_url: str) -> None:
    async with Node("a", registry=registry_url) as node:
        for _ in range(3):
            async with introduced(node, 7):
                assert list(node.peers) == [7]
            await node.wait_peers(0, SECONDS)


async def test_a_node_that_closes_says_exit(registry_url: str) -> None:
    node = Node("a", registry=registry_url)
    await node.start()
    async with introduced(node, 7) as peer:
        node.notify(60, b"last words", to=7)
        await node.close()
        assert await peer.hear() == (60, b"last words", b"")
        assert await peer.hear() == (EXIT, b"", b"")
        with pytest.raises(EOFError):
            await peer.hear()


async def test_a_registered_node_takes_the_id(registry_url: str) -> None:
    other = Node("b", registry=registry_url)
    async with Node("a", registry=registry_url) as node, introduced(node, 1) as peer, other:
        assert other.id == 1
        await peer.end()
        assert peer.seen[-1][0] == EXIT
        # The two nodes are connected, and the id belongs to the one that leased it.
        assert not node.peers[1].plain
        assert node.peers[1].name == "b"
        async with dialled(node) as second:
            await second.hello(1)
            with pytest.raises((EOFError, ConnectionResetError)):
                await second.hear()
        assert node.peers[1].name == "b"


async def test_a_reply_goes_to_the_machine_in_the_address(registry_url: str) -> None:
    async with Node("a", registry=registry_url) as node, introduced(node, 7) as peer:
        node.subscribe(50, lambda ctx: ctx.reply(b"for " + ctx.data))
        async with dialled(node) as other:
            await other.hello(8)
            await node.wait_peers(2, SECONDS)
            await other.say(frame(50, b"7", struct.pack("<HH", 7, 51)))
            assert await peer.hear() == (51, b"for 7", b"")
            await other.settled()
            assert [channel for channel, _, _ in other.seen] == [PONG]


async def test_no_library_frame_that_it_did_not_offer(registry_url: str) -> None:
    contexts: list[Context] = []
    settings = {"heartbeat_interval": 0.1, "heartbeat_timeout": 5.0}
    node = Node("a", registry=registry_url, **settings)
    await node.start()
    async with introduced(node, 7) as peer:
        # What would be announced, published, refused or answered on an extended session.
        node.subscribe(50, lambda ctx: ctx.reply(b"reply"))
        node.subscribe(51, contexts.append)
        node.unsubscribe(50)
        node.subscribe(50, lambda ctx: ctx.reply(b"reply"))
        node.publish(60, b"published", to=7)
        node.notify(60, b"notified", to=7)
        node.call(60, b"called", 61, to=7)
        await peer.say(frame(50, b"", struct.pack("<HH", 7, 62)))
        await peer.say(frame(51, b"", b"\x01"))
        await peer.say(frame(51, b"", struct.pack("<BQI", 1, 77, 1000)))
        for channel in (0, 49, 59, 65499, 65500, 65506, 65511, 65512, 65513, 65515, 65516, 65535):
            await peer.say(frame(channel, b"nobody"))
            await peer.say(frame(channel, b"nobody", struct.pack("<HH", 7, 62)))
            await peer.say(frame(channel, b"nobody", struct.pack("<BQI", 1, 78, 1000)))
            await peer.say(frame(channel, b"nobody", struct.pack("<QB", 79, 0)))
        await peer.say(frame(PING, b"ping"))
        while await peer.hear() != (PONG, b"pong", b""):
            pass
        assert len(contexts) == 2
        for ctx in contexts:
            for answer in (ctx.reply, ctx.next):
                with pytest.raises(FrameError):
                    answer(b"")
        while peer.heartbeats < 3:
            await peer.say(frame(HEARTBEAT))
            assert await peer.hear() == (HEARTBEAT_REPLY, b"", b"")
        await node.close()
        await peer.end()
    user = [found for found in peer.seen if 50 <= found[0] <= 65499]
    assert user == [
        (60, b"published", b""),
        (60, b"notified", b""),
        (60, b"called", struct.pack("<HH", node.id, 61)),
        (62, b"reply", b""),
    ]
    library = [found for found in peer.seen if not 50 <= found[0] <= 65499]
    assert {found[0] for found in library} == {HEARTBEAT, HEARTBEAT_REPLY, PONG, EXIT}
    assert {extend for _, _, extend in library} == {b""}
    assert {data for channel, data, _ in library if channel != PONG} == {b""}


async def test_two_plain_peers_may_not_have_one_id(registry_url: str) -> None:
    async with Node("a", registry=registry_url) as node, introduced(node, 7) as peer:
        async with dialled(node) as second:
            await second.hello(7)
            with pytest.raises((EOFError, ConnectionResetError)):
                await second.hear()
        await peer.settled()
        assert list(node.peers) == [7]
