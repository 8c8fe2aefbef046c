"""A cluster with a secret, and those who come without: refused before anything is dispatched.

Each is told nothing: the reason stands in the log of who was dialled.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from domi_fast import Context, Node, PeerLost, connect
from domi_fast.registry import open_registry
from tests import reference
from tests.reference import Decoder, Offer
from tests.strangers import registered
from tests.support import RawPeer, echo, forget_records, nodes, until

SECRET = b"the secret of this test"
WRONG = b"the secret of another test"


@pytest.fixture(autouse=True)
def the_secret_is_in_no_record(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.DEBUG)
    yield
    for record in caplog.get_records("call"):
        assert SECRET.decode() not in f"{record.getMessage()} {record.exc_info}"
    forget_records(caplog)


@asynccontextmanager
async def guarded(url: str) -> AsyncIterator[tuple[Node, list[bytes]]]:
    """A node with the secret, and whatever its handler ever gets."""
    got: list[bytes] = []

    def handler(ctx: Context) -> None:
        got.append(ctx.data)

    async with nodes(url, "guarded", secret=SECRET) as (node,):
        node.subscribe(50, handler)
        yield node, got


class Stranger(RawPeer):
    """A dialler that says what it likes."""

    async def say(self, *frames: bytes) -> None:
        await self.send(reference.magic() + b"".join(frames))

    async def hello(
        self, node: Node, *, role: int = 0, machine: int = 700, nonce: bytes | None = None
    ) -> tuple[bytes, bytes]:
        """Begin the authentication; the hello, and the challenge that came back."""
        dialled = node.id if role == 0 else reference.NO_MACHINE
        hello = reference.auth_hello(
            role, machine, dialled, nonce or os.urandom(32), node.config.cluster
        )
        await self.say(reference.encode(reference.AUTH, hello))
        challenge = await self.frame()
        assert (challenge.channel, challenge.data[:1]) == (reference.AUTH, b"\x02")
        return hello, challenge.data

    async def prove(self, secret: bytes, hello: bytes, challenge: bytes, *more: bytes) -> None:
        proof = reference.auth_proof(3, secret, hello, challenge)
        await self.send(reference.encode(reference.AUTH, proof) + b"".join(more))

    async def pass_as(self, node: Node, **who: Any) -> None:
        """Show that the secret is known here."""
        hello, challenge = await self.hello(node, **who)
        await self.prove(SECRET, hello, challenge)
        answer = await self.frame()
        assert answer.data == reference.auth_proof(4, SECRET, hello, challenge)

    async def ends(self) -> list[Any]:
        """What comes until the other end closes."""
        found = []
        try:
            while True:
                found.append(await self.frame())
        except (EOFError, ConnectionResetError):
            return found


NOTIFY = reference.encode(50, b"dispatched")
PLAIN = reference.encode(reference.NODE_NAME, struct.pack("<H", 700))


def offer(node: Node, cluster: str | None = None) -> bytes:
    return reference.encode_offer(Offer("stranger", cluster=cluster or node.config.cluster))


def named(node: Node, machine: int = 700) -> bytes:
    return reference.encode(reference.NODE_NAME, struct.pack("<H", machine), offer(node))


def guest_named(node: Node) -> bytes:
    return reference.encode(reference.GUEST_NAME, offer(node))


Attack = Callable[[Stranger, Node], Awaitable[object]]
ATTACKS: dict[str, Attack] = {}


def attack(function: Attack) -> Attack:
    ATTACKS[function.__name__] = function  # type: ignore[attr-defined]
    return function


@attack
async def plain_protocol(stranger: Stranger, node: Node) -> None:
    await stranger.say(PLAIN, NOTIFY)


@attack
async def no_secret(stranger: Stranger, node: Node) -> None:
    await stranger.say(named(node), reference.encode(reference.SUBSCRIPTIONS, b"", b"\0"), NOTIFY)


@attack
async def a_guest_without_one(stranger: Stranger, node: Node) -> None:
    await stranger.say(guest_named(node), NOTIFY)


@attack
async def a_message_first(stranger: Stranger, node: Node) -> None:
    await stranger.say(NOTIFY)


@attack
async def a_large_frame_first(stranger: Stranger, node: Node) -> None:
    await stranger.say(reference.encode(reference.AUTH, bytes(249)))


@attack
async def a_hello_with_an_extend(stranger: Stranger, node: Node) -> None:
    hello = reference.auth_hello(0, 700, node.id, os.urandom(32), node.config.cluster)
    await stranger.say(reference.encode(reference.AUTH, hello, b"x"))


@attack
async def wrong_secret(stranger: Stranger, node: Node) -> None:
    hello, challenge = await stranger.hello(node)
    await stranger.prove(WRONG, hello, challenge, named(node), NOTIFY)


@attack
async def wrong_secret_of_a_guest(stranger: Stranger, node: Node) -> None:
    hello, challenge = await stranger.hello(node, role=1, machine=65535)
    await stranger.prove(WRONG, hello, challenge, guest_named(node), NOTIFY)


@attack
async def no_proof_but_the_next_step(stranger: Stranger, node: Node) -> None:
    await stranger.hello(node)
    await stranger.send(named(node) + NOTIFY)


@attack
async def downgrade_after_the_hello(stranger: Stranger, node: Node) -> None:
    await stranger.hello(node)
    await stranger.send(PLAIN + NOTIFY)


@attack
async def a_replayed_handshake(stranger: Stranger, node: Node) -> None:
    """What a member of the cluster has said, word for word."""
    nonce = os.urandom(32)
    member = await Stranger.connect(node.port)
    hello, challenge = await member.hello(node, machine=701, nonce=nonce)
    await member.prove(SECRET, hello, challenge)
    await member.frame()
    member.close()
    again, _ = await stranger.hello(node, machine=701, nonce=nonce)
    assert again == hello
    await stranger.prove(SECRET, hello, challenge, named(node, 701), NOTIFY)


@attack
async def a_reflected_challenge(stranger: Stranger, node: Node) -> None:
    """The node is asked its own challenge on a second connection, for its proof."""
    _, challenge = await stranger.hello(node)
    mirror = await Stranger.connect(node.port)
    await mirror.say(reference.encode(reference.AUTH, challenge))
    assert await mirror.ends() == []
    mirror.close()
    await stranger.send(reference.encode(reference.AUTH, challenge) + NOTIFY)


@attack
async def a_lane_without_the_secret(stranger: Stranger, node: Node) -> None:
    await stranger.send(reference.lane(700, 1, bytes(16)) + NOTIFY)


@attack
async def the_nodes_own_id(stranger: Stranger, node: Node) -> None:
    hello = reference.auth_hello(0, node.id, node.id, os.urandom(32), node.config.cluster)
    await stranger.say(reference.encode(reference.AUTH, hello))


@pytest.mark.parametrize("name", list(ATTACKS))
async def test_a_stranger_is_refused(
    registry_url: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with guarded(registry_url) as (node, got):
        stranger = await Stranger.connect(node.port)
        before = node.counters().get("refused_auth", 0)
        caplog.clear()
        await ATTACKS[name](stranger, node)
        # Not a word but what the steps themselves are.
        assert {frame.channel for frame in await stranger.ends()} <= {reference.AUTH}
        counters = node.counters()
        if name != "a_large_frame_first":  # which the reader refuses itself
            assert counters["refused_auth"] > before
        assert counters["protocol_errors"] > 0
        warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert any("closed the session with 127.0.0.1" in text for text in warned), warned
        assert not got
        assert not node.peers
        assert [session for session in node._router.sessions() if session.peer != node.id] == []
        stranger.close()


async def test_who_passes_may_not_take_the_id_of_another(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The secret opens the door, and the registry says who is who; the reason is the node's own."""
    async with guarded(registry_url) as (node, got):

        async def is_refused(stranger: Stranger, reason: str) -> None:
            (last,) = await stranger.ends()
            assert (last.channel, last.data) == (reference.EXIT, b"")
            assert any(reason in record.getMessage() for record in caplog.records)
            caplog.clear()
            stranger.close()

        for machine, name in ((700, 701), (700, 700)):
            stranger = await Stranger.connect(node.port)
            await stranger.pass_as(node, machine=machine)
            # Whose claim the registry is asked for may say nothing meanwhile.
            await stranger.send(named(node, name) + (NOTIFY if name == 701 else b""))
            reason = "does not know this node" if name == 700 else "showed the secret as"
            await is_refused(stranger, reason)
        # A guest that says it is a node, and the reverse.
        for role, machine, says in ((1, 65535, named(node)), (0, 700, guest_named(node))):
            stranger = await Stranger.connect(node.port)
            await stranger.pass_as(node, role=role, machine=machine)
            await stranger.send(says + NOTIFY)
            await is_refused(stranger, "showed the secret as")
        assert not got
        assert not node.peers
        assert node.counters()["refused_auth"] == 4


async def test_a_lane_is_for_who_has_shown_that_it_is_its_machine(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever knows the secret and the ticket, but not as the machine whose session it is."""
    async with (
        Node("guarded", registry=registry_url, secret=SECRET, sessions_per_peer=2) as node,
        registered(registry_url, 700) as member,
    ):
        main = await Stranger.connect(node.port)
        await main.pass_as(node)
        name = reference.encode_offer(member._replace(features=1 << 4))
        await main.send(reference.encode(reference.NODE_NAME, struct.pack("<H", 700), name))
        ticket = reference.ticket_of((await main.frame_on(reference.WELCOME)).data)
        lane = reference.lane(700, 1, ticket)[len(reference.magic()) :]
        for who in ({"machine": 701}, {"role": 1, "machine": reference.NO_MACHINE}):
            other = await Stranger.connect(node.port)
            await other.pass_as(node, **who)
            await other.send(lane + NOTIFY)
            (last,) = await other.ends()
            assert (last.channel, last.data) == (reference.EXIT, b"")
            assert any("showed the secret as" in each.getMessage() for each in caplog.records)
            caplog.clear()
            other.close()
        assert node.counters()["refused_auth"] == 2
        own = await Stranger.connect(node.port)
        await own.pass_as(node)
        await own.send(lane)
        assert (await own.frame_on(reference.LANE)).data == b""
        await main.send(reference.subscriptions(reference.ALL))
        await node.wait_peers(1, 5.0)
        for each in (main, own):
            each.close()


async def test_a_guest_may_not_take_the_id_of_a_node(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It knows the secret, what nodes tell their guests, and what the registry says of each."""
    async with nodes(registry_url, "a", "b", secret=SECRET) as (a, b):
        before = a._router.session(b.id), b._router.session(a.id)
        guest = await Stranger.connect(b.port)
        await guest.pass_as(b, role=1, machine=reference.NO_MACHINE)
        await guest.send(guest_named(b))
        welcome = await guest.frame()
        assert welcome.channel == reference.WELCOME
        machine, told = reference.decode_welcome(welcome.data)
        assert (machine, told.name, told.epoch, told.instance) == (b.id, "b", 0, bytes(16))
        listed = a._mesh._members.view[b.id]
        assert listed.mark == reference.mark(b._mesh._members.offer.instance)
        for instance in (told.instance, listed.mark):
            false = told._replace(epoch=listed.epoch, instance=instance)
            stranger = await Stranger.connect(a.port)
            await stranger.pass_as(a, machine=b.id)
            name = struct.pack("<H", b.id)
            await stranger.send(
                reference.encode(reference.NODE_NAME, name, reference.encode_offer(false)) + NOTIFY
            )
            (last,) = await stranger.ends()
            assert (last.channel, last.data) == (reference.EXIT, b"")
            assert any("is leased to another node" in r.getMessage() for r in caplog.records)
            caplog.clear()
            stranger.close()
        assert a.counters()["refused_auth"] == 2
        assert (a._router.session(b.id), b._router.session(a.id)) == before
        guest.close()


async def test_nodes_and_guests_with_the_secret_belong(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c", secret=SECRET.decode()) as (a, b, c):
        b.subscribe(60, echo)
        await asyncio.gather(*[each.wait_subscribed(60, timeout=5) for each in (a, c)])
        assert await a.request(60, b"x") == await c.request(60, b"x") == b"x"
        async with await connect(f"tcp://127.0.0.1:{a.port}", secret=SECRET) as guest:
            assert await guest.request(60, b"x") == b"x"
        for each in (a, b, c):
            assert each.counters().get("refused_auth", 0) == 0


@pytest.mark.parametrize(
    ("ours", "theirs"), [(SECRET, WRONG), (SECRET, None), (None, SECRET), (WRONG, SECRET)]
)
async def test_nodes_with_different_secrets_never_meet(
    registry_url: str, ours: bytes | None, theirs: bytes | None
) -> None:
    """Neither way, whoever dials, though the registry knows both."""
    one = Node("one", registry=registry_url, secret=ours, start_timeout=0.3)
    other = Node("other", registry=registry_url, secret=theirs, start_timeout=0.3)
    got: list[Context] = []
    one.subscribe(50, got.append)
    other.subscribe(50, got.append)
    async with one, other:
        await until(
            lambda: sum(node.counters()["protocol_errors"] for node in (one, other)) > 3,
        )
        assert not one.peers
        assert not other.peers
        assert {*one.subscribers(50)} <= {one.id}
        assert {*other.subscribers(50)} <= {other.id}
    assert not got


@pytest.mark.parametrize(
    ("secret", "reason"),
    [
        (WRONG, "within the handshake: does it ask for TLS; has it this secret"),
        (None, "within the handshake: does it ask for TLS; does it ask for a secret"),
    ],
)
async def test_a_guest_hears_what_it_can_do(
    registry_url: str, secret: bytes | None, reason: str
) -> None:
    async with guarded(registry_url) as (node, _):
        with pytest.raises(PeerLost, match=reason):
            await connect(f"tcp://127.0.0.1:{node.port}", secret=secret)


async def test_a_guest_with_a_secret_trusts_no_node_without(registry_url: str) -> None:
    async with nodes(registry_url, "open") as (node,):
        with pytest.raises(PeerLost, match="has it this secret"):
            await connect(f"tcp://127.0.0.1:{node.port}", secret=SECRET)


async def test_who_dialled_another_node_is_put_off(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """That may have been here before, which is nobody's fault; it is counted, and told quietly."""
    async with guarded(registry_url) as (node, _):
        for cluster in (node.config.cluster, "another"):
            stranger = await Stranger.connect(node.port)
            hello = reference.auth_hello(0, 700, (node.id + 1) % 1024, os.urandom(32), cluster)
            await stranger.say(reference.encode(reference.AUTH, hello))
            with pytest.raises(EOFError):
                await stranger.frame()
            stranger.close()
        counters = node.counters()
        # Of another cluster it is a stranger, whoever it wanted.
        counted = [counters[name] for name in ("handshakes_put_off", "refused_auth")]
        assert [*counted, counters["protocol_errors"]] == [1, 1, 1]
        (told,) = [r for r in caplog.records if "is put off: it dialled machine" in r.getMessage()]
        assert (told.name, told.levelno) == ("domi_fast.core", logging.DEBUG)


class FalseNode:
    """It lets everybody in, and keeps what it was told."""

    def __init__(self, answers: Callable[[bytes, list[Any]], list[bytes]]) -> None:
        self._answers = answers
        self.heard: list[Any] = []
        self.port = 0

    async def __aenter__(self) -> FalseNode:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = Decoder(magic=True)
        while data := await reader.read(4096):
            had = len(decoder.frames)
            decoder.feed(data)
            self.heard = decoder.frames
            for _ in decoder.frames[had:]:
                writer.write(b"".join(self._answers(SECRET, self.heard)))
        writer.close()


def welcome(machine: int) -> bytes:
    return reference.encode(
        reference.WELCOME, reference.encode_welcome(machine, Offer("false", cluster="default"))
    )


CHALLENGE = reference.auth_challenge(3, bytes(32))


def welcome_at_once(_: bytes, heard: list[Any]) -> list[bytes]:
    return [welcome(3)]


def no_proof(_: bytes, heard: list[Any]) -> list[bytes]:
    return [reference.encode(reference.AUTH, CHALLENGE) if len(heard) == 1 else welcome(3)]


def another_id(secret: bytes, heard: list[Any]) -> list[bytes]:
    if len(heard) == 1:
        return [reference.encode(reference.AUTH, CHALLENGE)]
    if len(heard) == 2:
        proof = reference.auth_proof(4, secret, heard[0].data, CHALLENGE)
        return [reference.encode(reference.AUTH, proof)]
    return [welcome(4)]


@pytest.mark.parametrize(
    ("answers", "reason", "told"),
    [
        (welcome_at_once, "has not shown that it knows the secret", [reference.AUTH]),
        (no_proof, "has not shown that it knows the secret", [reference.AUTH] * 2),
        (another_id, "showed the secret as", [*[reference.AUTH] * 2, reference.GUEST_NAME]),
    ],
)
async def test_a_guest_takes_no_welcome_before_the_proof(
    answers: Callable[[bytes, list[Any]], list[bytes]], reason: str, told: list[int]
) -> None:
    """Nor one of another than has shown the secret; and until then it says nothing else."""
    async with FalseNode(answers) as false:
        with pytest.raises(PeerLost, match=reason):
            await connect(f"tcp://127.0.0.1:{false.port}", secret=SECRET)
        channels = [frame.channel for frame in false.heard]
        assert [channel for channel in channels if channel != reference.EXIT] == told
        assert reference.EXIT not in channels[: len(told)]


async def test_half_a_handshake_ends_in_time(registry_url: str) -> None:
    """Within the handshake timeout, wherever the stranger stops."""
    async with guarded(registry_url) as (node, _):
        silent, begun, passed = [await Stranger.connect(node.port) for _ in range(3)]
        await begun.hello(node)
        await passed.pass_as(node)
        began = asyncio.get_running_loop().time()
        for stranger in (silent, begun, passed):
            assert await stranger.ends() == []
            stranger.close()
        assert asyncio.get_running_loop().time() - began < 2.5


async def test_an_address_has_so_many_handshakes(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What comes beyond is closed at once, and a node of another address joins meanwhile."""
    settings: dict[str, Any] = {"secret": SECRET, "registry": registry_url}
    async with Node("crowded", handshakes_per_address=10, host="0.0.0.0", **settings) as node:
        crowd = [await Stranger.connect(node.port, source="127.0.0.2") for _ in range(30)]
        beyond = crowd[10:]
        for stranger in beyond:
            assert await stranger.ends() == []
        assert node.counters()["refused_handshakes"] == 20
        warned = [r.getMessage() for r in caplog.records if "127.0.0.2" in r.getMessage()]
        assert len(warned) == 1
        assert "handshakes_per_address" in warned[0]
        async with Node("another", **settings) as other:
            await other.wait_peers(1, 2)
        # When those are over, the address has as many again.
        for stranger in crowd:
            assert await stranger.ends() == []
            stranger.close()
        again = [await Stranger.connect(node.port, source="127.0.0.2") for _ in range(10)]
        for stranger in again:
            await stranger.hello(node)
            stranger.close()
        assert node.counters()["refused_handshakes"] == 20


async def test_whose_handshake_is_complete_is_not_counted(registry_url: str) -> None:
    async with nodes(registry_url, "a", secret=SECRET, handshakes_per_address=2) as (a,):
        async with AsyncExitStack() as stack:
            for _ in range(5):
                guest = await connect(f"tcp://127.0.0.1:{a.port}", secret=SECRET)
                await stack.enter_async_context(guest)
        assert a.counters().get("refused_handshakes", 0) == 0


async def test_a_node_does_not_dial_itself(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the registry still has the one that was killed at this address before it."""

    def tried(node: Node, outcome: str) -> bool:
        texts = [record.getMessage() for record in caplog.records]
        return any(f"node {node.id}: dialling node 900: " in t and outcome in t for t in texts)

    registry = open_registry(registry_url)
    await registry.open()
    try:
        async with nodes(registry_url, "a", "b", secret=SECRET) as (a, b):
            lease = await registry.grant(10.0)
            known = b._mesh._members.view[a.id]
            gone = dataclasses.replace(known, id=900, mark=os.urandom(16))
            await registry.claim(["domi/default/nodes/0900"], gone.encode(), lease)
            await until(lambda: all(900 in node._mesh._members.view for node in (a, b)))
            await until(lambda: tried(a, "nobody but this node listens where node 900 did"))
            await until(lambda: tried(b, "within the handshake: "))
            for node in (a, b):
                assert node.counters().get("refused_auth", 0) == 0
                assert node.counters().get("protocol_errors", 0) == 0
            assert set(a.peers) == {b.id}
            await lease.revoke()
    finally:
        await registry.close()
