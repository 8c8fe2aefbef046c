"""A cluster with TLS: what is said in it nobody else can read, and who shows no good certificate is
refused before anything is dispatched, without a word of why.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import logging
import os
import re
import shutil
import ssl
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from domi_fast import Context, DomiError, Node, PeerLost, Tls, connect
from domi_fast.registry import open_registry
from tests import reference
from tests.certificates import Authority
from tests.proxy import Proxy
from tests.reference import Offer
from tests.support import RawPeer, echo, forget_records, nodes, session, until

SECRET = b"the secret of this test"
INSTANCE = bytes(range(16))
NOTIFY = reference.encode(50, b"dispatched")


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.DEBUG)
    yield
    forget_records(caplog)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder / "known")


@pytest.fixture(scope="module")
def foreign(folder: Path) -> Authority:
    return Authority(folder / "foreign")


@pytest.fixture(scope="module")
def tls(authority: Authority) -> Tls:
    """One certificate for all nodes of a test."""
    return authority.issue("a", "b", "c")


# --------------------------------------------------------------------------------- who belongs


@pytest.mark.parametrize("secret", [None, SECRET])
async def test_nodes_and_guests_with_certificates_belong(
    registry_url: str, authority: Authority, tls: Tls, secret: bytes | None, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"tls": tls, "secret": secret}
    async with nodes(registry_url, "a", "b", "c", **settings) as (a, b, c):
        b.subscribe(60, echo)
        await asyncio.gather(*[each.wait_subscribed(60, timeout=5) for each in (a, c)])
        for size in (0, 1, 16_375, 16_376, 16_377, 65_536, 3_000_000):
            data = os.urandom(size)
            assert await a.request(60, data) == data
        guest_tls = authority.issue("tool")
        async with await connect(
            f"tcp://127.0.0.1:{a.port}", tls=guest_tls, secret=secret
        ) as guest:
            assert await guest.request(60, b"x") == b"x"
        for each in (a, b, c):
            assert each.counters().get("refused_auth", 0) == 0


async def test_over_unix_sockets_too(registry_url: str, tls: Tls, tmp_path: Path) -> None:
    one = Node("a", registry=registry_url, tls=tls, unix_path=str(tmp_path / "a"))
    other = Node("b", registry=registry_url, tls=tls, unix_path=str(tmp_path / "b"))
    async with one, other:
        await one.wait_peers(1, 5)
        one.subscribe(60, echo)
        await other.wait_subscribed(60, timeout=5)
        assert session(other, one.id).address.startswith("unix:")
        assert await other.request(60, b"x") == b"x"
        async with await connect(f"unix://{tmp_path}/a", tls=tls) as guest:
            assert await guest.request(60, b"x") == b"x"


async def test_many_messages_each_way_keep_their_order(registry_url: str, tls: Tls) -> None:
    """Records end within frames, and frames within records; both ends are full at times."""
    async with nodes(registry_url, "a", "b", tls=tls) as (a, b):
        got: dict[Node, list[bytes]] = {a: [], b: []}
        for node in (a, b):
            node.subscribe(50, lambda ctx, kept=got[node]: kept.append(ctx.data))
        await asyncio.gather(a.wait_subscribed(50, 2, 5), b.wait_subscribed(50, 2, 5))
        sent = [struct.pack("<I", number) + bytes(number * 37 % 40_000) for number in range(1_000)]

        async def send(source: Node, target: Node) -> None:
            for data in sent:
                source.notify(50, data, to=target.id)
                if source.peers[target.id].queued > 1 << 20:
                    await source.drained(target.id)

        await asyncio.gather(send(a, b), send(b, a))
        await until(lambda: len(got[a]) == len(got[b]) == len(sent), 30)
        assert got == {a: sent, b: sent}


async def test_busy_polling_finds_what_is_enciphered(registry_url: str, tls: Tls) -> None:
    async with nodes(registry_url, "a", "b", tls=tls, busy_poll=0.01) as (a, b):
        b.subscribe(60, echo)
        await a.wait_subscribed(60, timeout=5)
        for _ in range(200):
            assert await a.request(60, b"x") == b"x"


async def test_nobody_on_the_way_can_read_it(registry_url: str, tls: Tls) -> None:
    """Nor change it: a bit that was turned ends the session, and no message comes of it."""
    async with nodes(registry_url, "a", tls=tls) as (a,), Proxy(a.port) as proxy:
        got: list[bytes] = []
        a.subscribe(50, lambda ctx: got.append(ctx.data))
        a.subscribe(60, echo)
        seen: list[bytes] = []
        turned = False

        def pass_on(data: bytes) -> bytes:
            seen.append(data)
            return data[:-1] + bytes([data[-1] ^ 1]) if turned else data

        proxy.through = pass_on
        guest = await connect(f"tcp://127.0.0.1:{proxy.port}", tls=tls, name="the guest's name")
        try:
            payload = b"what nobody else may read " * 4
            assert await guest.request(60, payload) == payload
            assert payload[:26] not in b"".join(seen)
            assert b"the guest's name" not in b"".join(seen)
            turned = True
            guest.notify(50, payload)
            await until(lambda: not guest.connected)
        finally:
            await guest.close()
        assert not got
        assert a.counters()["protocol_errors"] == 1


# ------------------------------------------------------------------------------- who is refused


class Stranger(RawPeer):
    """A dialler that says what it likes, by TLS or without."""

    def wrap(self, context: ssl.SSLContext) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing)

    def has_shaken(self) -> bool:
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
            return True
        return False

    async def shake(self, context: ssl.SSLContext) -> None:
        """The whole handshake, as far as this side is concerned."""
        self.wrap(context)
        while not self.has_shaken():
            await self.send(self.outgoing.read())
            self.incoming.write(await self.receive())

    async def say(self, *frames: bytes) -> None:
        self.tls.write(reference.magic() + b"".join(frames))
        await self.send(self.outgoing.read())

    async def receive(self) -> bytes:
        """What comes; nothing once the other end has closed."""
        try:
            return await asyncio.wait_for(
                asyncio.get_running_loop().sock_recv(self.sock, 1 << 16), 5
            )
        except ConnectionResetError:
            return b""

    async def rest(self) -> bytes:
        """What comes, deciphered if it can be, until the other end closes."""
        while data := await self.receive():
            self.incoming.write(data)
        return self.tls.read() if self.incoming.pending else b""


def client(tls: Tls | None) -> ssl.SSLContext:
    """A context that takes whatever the other end shows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if tls is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    return context


def named(node: Node, name: str, machine: int = 700) -> bytes:
    offer = reference.encode_offer(Offer(name, cluster=node.config.cluster))
    return reference.encode(reference.NODE_NAME, struct.pack("<H", machine), offer)


Attack = Callable[[Stranger, Node, Authority, Authority], Awaitable[object]]
ATTACKS: dict[str, tuple[str, Attack]] = {}


def attack(reason: str) -> Callable[[Attack], Attack]:
    def keep(function: Attack) -> Attack:
        ATTACKS[function.__name__] = (reason, function)  # type: ignore[attr-defined]
        return function

    return keep


@attack("wrong version number")
async def the_plain_protocol(stranger: Stranger, node: Node, *_: Authority) -> None:
    plain = reference.encode(reference.NODE_NAME, struct.pack("<H", 700))
    await stranger.send(reference.magic() + plain + NOTIFY)
    assert await stranger.receive() == b""


@attack("peer did not return a certificate")
async def no_certificate(stranger: Stranger, node: Node, *_: Authority) -> None:
    await stranger.shake(client(None))
    await stranger.say(named(node, "a"), NOTIFY)
    assert await stranger.rest() == b""


@attack("unable to get local issuer certificate")
async def a_foreign_certificate(
    stranger: Stranger, node: Node, authority: Authority, foreign: Authority
) -> None:
    await stranger.shake(client(foreign.issue("a")))
    await stranger.say(named(node, "a"), NOTIFY)
    assert await stranger.rest() == b""


@attack("certificate has expired")
async def an_expired_certificate(
    stranger: Stranger, node: Node, authority: Authority, foreign: Authority
) -> None:
    await stranger.shake(client(authority.issue("a", days=-1)))
    await stranger.say(named(node, "a"), NOTIFY)
    assert await stranger.rest() == b""


@attack("unsupported protocol")
async def an_older_tls(
    stranger: Stranger, node: Node, authority: Authority, foreign: Authority
) -> None:
    context = client(authority.issue("a"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    stranger.wrap(context)
    assert not stranger.has_shaken()
    await stranger.send(stranger.outgoing.read())
    assert await stranger.receive() == b""


@attack("it says that it is 'a', and its certificate is for 'other'")
async def the_name_of_another(
    stranger: Stranger, node: Node, authority: Authority, foreign: Authority
) -> None:
    await stranger.shake(client(authority.issue("other")))
    await stranger.say(named(node, "a"), NOTIFY)
    assert await stranger.rest() == reference.encode(reference.EXIT)


@attack("is not complete after")
async def a_handshake_without_end(stranger: Stranger, node: Node, *_: Authority) -> None:
    """A ClientHello that is announced to be of 120,000 bytes, which OpenSSL would wait for."""
    hello = b"\x01" + (120_000).to_bytes(3, "big") + bytes(15_996)
    head = b"\x16\x03\x01" + struct.pack(">H", 16_000)
    for part in (hello, *[bytes(16_000)] * 4):
        await stranger.send(head + part)
    assert await stranger.receive() == b""


@pytest.mark.parametrize("name", list(ATTACKS))
async def test_a_stranger_is_refused(
    registry_url: str,
    name: str,
    tls: Tls,
    authority: Authority,
    foreign: Authority,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reason, function = ATTACKS[name]
    async with nodes(registry_url, "a", tls=tls) as (node,):
        got: list[Context] = []
        node.subscribe(50, got.append)
        stranger = await Stranger.connect(node.port)
        caplog.clear()
        await function(stranger, node, authority, foreign)
        await until(lambda: node.counters().get("refused_auth", 0) == 1)
        assert node.counters()["protocol_errors"] == 1
        (warned,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert "closed the session with 127.0.0.1" in warned
        assert reason in warned.lower()
        assert not got
        assert not node.peers
        stranger.close()


async def test_silence_within_the_handshake_ends_in_time(registry_url: str, tls: Tls) -> None:
    """Wherever the stranger stops: before its first byte, or after half of them."""
    async with nodes(registry_url, "a", tls=tls) as (node,):
        silent, begun = [await Stranger.connect(node.port) for _ in range(2)]
        begun.wrap(client(None))
        assert not begun.has_shaken()
        await begun.send(begun.outgoing.read()[:50])
        began = asyncio.get_running_loop().time()
        assert await silent.receive() == await begun.receive() == b""
        assert asyncio.get_running_loop().time() - began < 2.5
        silent.close()
        begun.close()


async def test_a_member_may_not_take_the_id_of_another(
    registry_url: str, authority: Authority, tls: Tls, caplog: pytest.LogCaptureFixture
) -> None:
    """Though it has heard, as a node, what that one says of itself."""
    async with nodes(registry_url, "a", "b", tls=tls) as (a, b):
        known = b._mesh._members.offer
        for name, reason in (("insider", "leased to another node"), ("b", "certificate is for")):
            offer = Offer(name, cluster=known.cluster, epoch=known.epoch, instance=known.instance)
            stranger = await Stranger.connect(a.port)
            await stranger.shake(client(authority.issue("insider")))
            await stranger.say(
                reference.encode(
                    reference.NODE_NAME, struct.pack("<H", b.id), reference.encode_offer(offer)
                )
            )
            assert await stranger.rest() == reference.encode(reference.EXIT)
            assert any(reason in record.getMessage() for record in caplog.records)
            stranger.close()
        assert a.counters()["refused_auth"] == 2
        assert a.peers[b.id].name == "b"


class Crafty:
    """A member that makes its own records, as the ssl module would not."""

    def __init__(self, stranger: Stranger, keys: Path) -> None:
        self.stranger = stranger
        found = re.search(r"CLIENT_TRAFFIC_SECRET_0 \w+ (\w+)", keys.read_text())
        assert found is not None
        self.secret = bytes.fromhex(found[1])
        self.count = 0

    @classmethod
    async def connect(cls, node: Node, tls: Tls, keys: Path) -> Crafty:
        context = client(tls)
        context.keylog_filename = str(keys)
        stranger = await Stranger.connect(node.port)
        await stranger.shake(context)
        assert stranger.tls.cipher() == ("TLS_AES_256_GCM_SHA384", "TLSv1.3", 256)
        await stranger.send(stranger.outgoing.read())
        crafty = cls(stranger, keys)
        offer = reference.encode_offer(Offer("raw", cluster=node.config.cluster))
        greeting = reference.magic() + reference.encode(reference.GUEST_NAME, offer)
        await stranger.send(crafty.record(23, greeting + reference.subscriptions(1, [50])))
        await node.wait_subscribed(50, timeout=5)
        return crafty

    def expand(self, label: bytes, size: int) -> bytes:
        """HKDF-Expand-Label of RFC 8446, 7.1, without a context; of one block."""
        label = b"tls13 " + label
        info = struct.pack(">HB", size, len(label)) + label + b"\0\x01"
        return hmac.digest(self.secret, info, "sha384")[:size]

    def record(self, kind: int, data: bytes) -> bytes:
        inner = data + bytes([kind])
        head = b"\x17\x03\x03" + struct.pack(">H", len(inner) + 16)
        nonce = int.from_bytes(self.expand(b"iv", 12), "big") ^ self.count
        self.count += 1
        key = AESGCM(self.expand(b"key", 32))
        return head + key.encrypt(nonce.to_bytes(12, "big"), inner, head)

    def new_keys(self) -> bytes:
        """A KeyUpdate that asks for none in return."""
        record = self.record(22, b"\x18\0\0\x01\0")
        self.secret, self.count = self.expand(b"traffic upd", 48), 0
        return record


async def test_new_keys_are_taken(registry_url: str, tls: Tls, tmp_path: Path) -> None:
    async with nodes(registry_url, "a", tls=tls) as (a,):
        crafty = await Crafty.connect(a, tls, tmp_path / "keys")
        ping = reference.encode(reference.PING, b"ping")
        await crafty.stranger.send(crafty.new_keys() + crafty.record(23, ping))
        await crafty.stranger.send(b"".join(crafty.new_keys() for _ in range(100)))
        await crafty.stranger.send(crafty.record(23, ping))
        session = a._router.sessions()[0]
        await until(lambda: session.frames_in == 4)
        crafty.stranger.close()


async def test_a_member_cannot_hold_up_the_loop(
    registry_url: str, tls: Tls, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With records in which there is nothing for the session: it ends, long before they do."""
    async with nodes(registry_url, "a", tls=tls) as (a,):
        crafty = await Crafty.connect(a, tls, tmp_path / "keys")
        flood = b"".join(crafty.new_keys() for _ in range(10_000))
        with contextlib.suppress(ConnectionError):
            await crafty.stranger.send(flood)
        await until(lambda: not a._router.sessions())
        assert any("nothing is in them" in record.getMessage() for record in caplog.records)
        crafty.stranger.close()


async def test_half_a_message_of_tls_ends_its_session_alone(
    registry_url: str, tls: Tls, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Until the rest of it comes nothing can be enciphered for that peer; others go on."""
    async with nodes(registry_url, "a", "b", tls=tls) as (a, b):
        b.subscribe(60, echo)
        await a.wait_subscribed(60, timeout=5)
        crafty = await Crafty.connect(a, tls, tmp_path / "keys")
        session = a._router.sessions()[0]
        await crafty.stranger.send(crafty.record(22, b"\x18\0\0\x01"))
        await until(lambda: a.peers[b.id].queued == 0 and session.bytes_in > 0)
        for _ in range(100):
            a.publish(50, b"x")
            await asyncio.sleep(0.001)
        await until(lambda: len(a._router.sessions()) == 1)
        assert await a.request(60, b"x") == b"x"
        assert any("nothing can be enciphered" in r.getMessage() for r in caplog.records)
        crafty.stranger.close()


async def test_a_slow_link_is_not_a_silent_one(registry_url: str, tls: Tls) -> None:
    """A record that takes longer than a peer may be silent, a few bytes at a time."""
    settings: dict[str, Any] = {"heartbeat_interval": 0.2, "heartbeat_timeout": 0.5}
    async with nodes(registry_url, "a", tls=tls, **settings) as (a,):
        peer = await Stranger.connect(a.port)
        await peer.shake(client(tls))
        offer = reference.encode_offer(Offer("raw", cluster=a.config.cluster))
        await peer.say(reference.encode(reference.GUEST_NAME, offer))
        await until(a._router.sessions)
        peer.tls.write(reference.encode(reference.PING, bytes(16_000)))
        record = peer.outgoing.read()
        for start in range(0, len(record), len(record) // 12):
            await peer.send(record[start : start + len(record) // 12])
            await asyncio.sleep(0.1)
        assert a._router.sessions()
        peer.close()


async def test_who_hangs_up_is_no_stranger(registry_url: str, tls: Tls) -> None:
    """A probe that says hello and goes, as health checks do, is no alarm."""
    async with nodes(registry_url, "a", tls=tls) as (a,):
        for _ in range(20):
            probe = await Stranger.connect(a.port)
            probe.wrap(client(None))
            assert not probe.has_shaken()
            await probe.send(probe.outgoing.read())
            probe.reset()
        await until(lambda: not a._mesh._callers._connected)
        assert a.counters().get("refused_auth", 0) == a.counters().get("protocol_errors", 0) == 0


async def test_the_secret_is_shown_for_this_connection(
    registry_url: str, tls: Tls, authority: Authority
) -> None:
    """Who has a certificate and no secret gains nothing by passing it on to who has one."""
    insider = authority.issue("a")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(insider.certificate, insider.key)
    async with nodes(registry_url, "a", tls=tls, secret=SECRET) as (a,):

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection("127.0.0.1", a.port, ssl=client(insider))

            async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
                with contextlib.suppress(ConnectionError):
                    while data := await source.read(1 << 16):
                        target.write(data)
                        await target.drain()
                target.close()

            await asyncio.gather(pump(reader, back), pump(there, writer))

        server = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
        async with server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(PeerLost, match="has it this secret"):
                await connect(f"tcp://127.0.0.1:{port}", tls=tls, secret=SECRET)
            assert a.counters()["refused_auth"] == 1
        async with await connect(f"tcp://127.0.0.1:{a.port}", tls=tls, secret=SECRET) as guest:
            assert guest.connected


# ------------------------------------------------------------------------- whom a dialler refuses


async def test_a_node_tells_nothing_to_who_answers_for_another(
    registry_url: str, tls: Tls, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """A member where a node was, which says what that one's registration says, and its own name."""
    insider = authority.issue("insider")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(insider.certificate, insider.key)
    heard: list[bytes] = []
    known: Any = None

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(4)
        offer = Offer("insider", cluster="default", epoch=known.epoch, instance=INSTANCE)
        writer.write(reference.encode(reference.WELCOME, reference.encode_welcome(known.id, offer)))
        heard.append(await reader.read())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    registry = open_registry(registry_url)
    await registry.open()
    try:
        async with server, nodes(registry_url, "a", tls=tls) as (a,):
            own = a._mesh._members.view[a.id]
            lease = await registry.grant(10.0)
            known = dataclasses.replace(
                own,
                id=900,
                name="b",
                mark=reference.mark(INSTANCE),
                port=server.sockets[0].getsockname()[1],
            )
            claim = await registry.claim(["domi/default/nodes/0900"], known.encode(), lease)
            known = dataclasses.replace(known, epoch=claim.epoch)
            await until(lambda: heard)
            assert 900 not in a.peers
            assert any(
                "is not the one that is registered" in r.getMessage() for r in caplog.records
            )
            assert reference.SUBSCRIPTIONS.to_bytes(2, "little") not in heard[0][10:]
    finally:
        await registry.close()


async def test_a_certificate_for_clients_is_a_guests(
    registry_url: str, tls: Tls, authority: Authority
) -> None:
    """It gets a guest in; no node starts with it, and no dialler takes it for a node's."""
    tool = authority.issue_for_clients("tool")
    with pytest.raises(DomiError, match="unsuitable certificate purpose"):
        Node("tool", registry=registry_url, tls=tool)
    async with (
        nodes(registry_url, "a", tls=tls) as (a,),
        await connect(f"tcp://127.0.0.1:{a.port}", tls=tool) as guest,
    ):
        assert guest.connected
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tool.certificate, tool.key)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        dialled = context.wrap_bio(incoming, outgoing, server_side=True)
        incoming.write(await reader.read(1 << 16))
        with contextlib.suppress(ssl.SSLWantReadError):
            dialled.do_handshake()
        writer.write(outgoing.read())
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(PeerLost, match="unsuitable certificate purpose"):
            await connect(f"tcp://127.0.0.1:{port}", tls=tls)


async def test_a_guest_may_say_which_node_it_wants(registry_url: str, tls: Tls) -> None:
    async with nodes(registry_url, "a", tls=tls) as (a,):
        url = f"tcp://127.0.0.1:{a.port}"
        async with await connect(url, tls=tls, node="a") as guest:
            assert guest.connected
        with pytest.raises(PeerLost, match="this is node 'a', and 'b' was wanted"):
            await connect(url, tls=tls, node="b")


@pytest.mark.parametrize("enciphered", [True, False])
async def test_a_guest_trusts_no_node_of_others(
    registry_url: str, tls: Tls, foreign: Authority, enciphered: bool
) -> None:
    own = foreign.issue("a") if enciphered else None
    reason = "self-signed certificate" if enciphered else "does it take this certificate"
    async with nodes(registry_url, "a", tls=own) as (node,):
        with pytest.raises(PeerLost, match=reason):
            await connect(f"tcp://127.0.0.1:{node.port}", tls=tls)


async def test_a_guest_is_told_nothing_by_who_has_the_name_of_another(
    authority: Authority, tls: Tls
) -> None:
    """A member that listens where a node did, and says that it is that one."""
    welcome = reference.encode(
        reference.WELCOME, reference.encode_welcome(3, Offer("b", cluster="default"))
    )

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4)
        writer.write(welcome)
        await reader.read()
        writer.close()

    insider = authority.issue("insider")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(insider.certificate, insider.key)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(PeerLost, match="'b', and its certificate is for 'insider'"):
            await connect(f"tcp://127.0.0.1:{port}", tls=tls)


async def test_nodes_of_different_authorities_never_meet(
    registry_url: str, tls: Tls, foreign: Authority
) -> None:
    one = Node("a", registry=registry_url, tls=tls, start_timeout=0.3)
    other = Node("b", registry=registry_url, tls=foreign.issue("b"), start_timeout=0.3)
    async with one, other:
        await until(
            lambda: sum(node.counters().get("refused_auth", 0) for node in (one, other)) > 3
        )
        assert not one.peers
        assert not other.peers


# -------------------------------------------------------------------------------- new certificates


async def test_new_files_are_read_without_a_restart(
    registry_url: str, tmp_path: Path, foreign: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """For who comes from then on; who is there stays."""
    before = Authority(tmp_path / "before")
    tls = before.issue("a", "b")
    after = foreign.issue("a", "b")
    kept = shutil.copy(tls.authority, tmp_path / "kept.pem")
    old = dataclasses.replace(before.issue("old"), authority=kept)
    async with nodes(registry_url, "a", "b", tls=tls) as (a, b):
        b.subscribe(60, echo)
        await a.wait_subscribed(60, timeout=5)
        url = f"tcp://127.0.0.1:{a.port}"
        with pytest.raises(PeerLost):
            await connect(url, tls=after)
        # In the order of the worst luck: for a moment the files do not fit together.
        shutil.copy(after.certificate, tls.certificate)
        async with await connect(url, tls=old) as guest:
            assert await guest.request(60, b"x") == b"x"
        assert any("that was read before stays" in r.getMessage() for r in caplog.records)
        shutil.copy(after.key, tls.key)
        shutil.copy(after.authority, tls.authority)
        async with await connect(url, tls=after) as guest:
            assert await guest.request(60, b"x") == b"x"
        with pytest.raises(PeerLost):
            await connect(url, tls=old)
        assert await a.request(60, b"x") == b"x"
        # And nodes among themselves, as when a connection is made anew.
        session(a, b.id).close("the test ends it")
        await until(lambda: not a.peers)
        await a.wait_peers(1, 5)
        await a.wait_subscribed(60, timeout=5)
        assert await a.request(60, b"x") == b"x"


# ------------------------------------------------------------------------------------------- losses


async def test_what_is_said_to_be_lost_has_not_arrived(registry_url: str, tls: Tls) -> None:
    """A record of which the kernel has a part is lost as a whole: nothing of it can be read."""
    async with nodes(registry_url, "a", tls=tls) as (node,):
        lost: list[int] = []
        node.on_error = lambda error, frame: lost.append(struct.unpack("<I", frame.data[:4])[0])
        peer = await Stranger.connect(node.port, receive_buffer=4096)
        await peer.shake(client(tls))
        greeting = reference.encode_offer(Offer("raw", cluster=node.config.cluster))
        subscribed = reference.subscriptions(1, [50])
        await peer.say(reference.encode(reference.GUEST_NAME, greeting), subscribed)
        await node.wait_subscribed(50, timeout=5)
        for number in range(3_000):
            node.publish(50, struct.pack("<I", number) + bytes(3_000))
        assert node._router.sessions()
        decoder = reference.Decoder()
        read = 0
        while read < 1_000_000:
            data = await peer.receive()
            read += len(data)
            peer.incoming.write(data)
        with contextlib.suppress(ssl.SSLWantReadError):
            while peer.incoming.pending:
                decoder.feed(peer.tls.read(1 << 20))
        got = [struct.unpack("<I", f.data[:4])[0] for f in decoder.frames if f.channel == 50]
        peer.reset()
        await until(lambda: lost and lost[-1] == 2_999)
        assert got == [*range(len(got))]
        assert lost == [*range(lost[0], 3_000)]
        assert got[-1] < lost[0]


async def test_what_is_dropped_is_dropped_between_records(registry_url: str, tls: Tls) -> None:
    """The record that is on its way stays as it is, whatever is dropped behind it."""
    settings: dict[str, Any] = {"queue_limit": 256 << 10, "when_full": "drop_oldest"}
    async with nodes(registry_url, "a", tls=tls, **settings) as (node,):
        peer = await Stranger.connect(node.port, receive_buffer=4096)
        await peer.shake(client(tls))
        greeting = reference.encode_offer(Offer("raw", cluster=node.config.cluster))
        await peer.say(
            reference.encode(reference.GUEST_NAME, greeting), reference.subscriptions(1, [50])
        )
        await node.wait_subscribed(50, timeout=5)
        for number in range(3_000):
            node.publish(50, struct.pack("<I", number) + bytes(number % 3_000))
            if number % 10 == 0:
                await asyncio.sleep(0)
        decoder = reference.Decoder()
        got: list[int] = []
        while not got or got[-1] != 2_999:
            peer.incoming.write(await peer.receive())
            with contextlib.suppress(ssl.SSLWantReadError):
                while peer.incoming.pending:
                    decoder.feed(peer.tls.read(1 << 20))
            got = [struct.unpack("<I", f.data[:4])[0] for f in decoder.frames if f.channel == 50]
        assert got == sorted(set(got))
        # For the guest (-1), and on the way to it within the node.
        assert node.drops()[-1, 50] > 100
        assert len(got) + sum(node.drops().values()) == 3_000
        peer.close()


@pytest.mark.parametrize("call", ["read", "write", "do_handshake"])
@pytest.mark.parametrize("turn", [1, 2, 3])
async def test_a_session_may_end_within_the_ssl_module(
    registry_url: str, tls: Tls, monkeypatch: pytest.MonkeyPatch, call: str, turn: int
) -> None:
    """By a finalizer or a signal's handler that runs there: in the middle of a large message too.

    A stand-in for those ends it, because nobody can tell when they run.
    """
    async with nodes(registry_url, "a", "b", tls=tls) as (a, b):
        a.on_error = b.on_error = lambda error, frame: None
        b.subscribe(50, lambda ctx: None)
        await a.wait_subscribed(50, timeout=5)
        original = getattr(ssl.SSLObject, call)
        calls = 0

        def ends_all(self: ssl.SSLObject, *arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == turn:
                for node in (a, b):
                    for each in list(node._mesh._sessions):
                        each.close("the test ends it")
            return original(self, *arguments)

        monkeypatch.setattr(ssl.SSLObject, call, ends_all)
        for _ in range(5):
            with contextlib.suppress(DomiError):
                a.notify(50, bytes(500_000))
            await asyncio.sleep(0.001)
        if call == "do_handshake":
            for each in a._router.sessions():
                each.close("to be made anew")
        await until(lambda: calls >= turn)
        monkeypatch.undo()
        await a.wait_peers(1, 5)
        await a.wait_subscribed(50, timeout=5)
        b.subscribe(60, echo)
        await a.wait_subscribed(60, timeout=5)
        assert await a.request(60, b"x") == b"x"
