"""Several connections to one peer: each channel keeps its order, and they live and die as one."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from domi_fast import (
    CircuitOpen,
    Context,
    DeadlineExceeded,
    Node,
    NoSubscriber,
    Overloaded,
    PeerLost,
    RemoteError,
    Serial,
    connect,
)
from domi_fast.breaker import Breaker
from tests import reference
from tests.certificates import Authority
from tests.strangers import SECONDS, Stranger, extended, plain, registered, stranger
from tests.support import busy, echo, endings, link, nodes, session, until

SECRET = "a secret for the tests of lanes"
MIB = 1 << 20
# One channel for each of three lanes, by number.
CHANNELS = (51, 52, 53)
LANES = 3
EXIT = reference.encode(reference.EXIT, b"enough")


def connections(node: Node, other: Node) -> list[Any]:
    return list(session(node, other.id).connections)


def of_lane(index: int) -> int:
    return next(channel for channel in CHANNELS if channel % LANES == index)


def features(lanes: int) -> int:
    return lanes - 1 << 4


class Crowd:
    """What came, in the order in which it came, by channel."""

    def __init__(self, node: Node, channels: tuple[int, ...] = CHANNELS) -> None:
        self.came: dict[int, list[bytes]] = {channel: [] for channel in channels}
        for channel in channels:
            node.subscribe(channel, self.take)

    def take(self, ctx: Context) -> None:
        self.came[ctx.channel].append(ctx.data)

    @property
    def count(self) -> int:
        return sum(map(len, self.came.values()))


# ------------------------------------------------------------------------------------ how many


async def test_there_is_one_connection_unless_more_are_asked_for(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        assert len(connections(a, b)) == len(connections(b, a)) == 1


@pytest.mark.parametrize(("one", "other"), [(1, 4), (4, 2), (3, 3), (16, 16)])
async def test_there_are_as_many_as_both_ends_allow(
    registry_url: str, one: int, other: int
) -> None:
    async with (
        Node("a", registry=registry_url, sessions_per_peer=one) as a,
        Node("b", registry=registry_url, sessions_per_peer=other) as b,
    ):
        await asyncio.gather(a.wait_peers(1, SECONDS), b.wait_peers(1, SECONDS))
        for node, peer in ((a, b), (b, a)):
            found = connections(node, peer)
            assert len(found) == min(one, other)
            assert len({each.descriptor for each in found}) == len(found)
            assert [each.is_lane for each in found] == [False] + [True] * (len(found) - 1)
            assert len(node._router.sessions()) == len(node.peers) == 1
            assert node._router.connections() == found


@pytest.mark.parametrize("wrong", [0, 17, -1])
def test_a_number_that_is_not_allowed_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"sessions_per_peer {wrong}: a number from 1 to 16"):
        Node("a", sessions_per_peer=wrong)


@pytest.mark.parametrize("wrong", [2.0, "2", True, None])
def test_what_is_no_number_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match="sessions_per_peer of type"):
        Node("a", sessions_per_peer=wrong)


@pytest.mark.parametrize(
    ("limits", "least"),
    [
        ({"handshakes_per_address": 3}, 4),
        ({"sessions_per_address": 3}, 4),
        ({"session_limit": 7}, 8),
    ],
)
def test_limits_that_no_peer_would_get_in_by(limits: dict[str, Any], least: int) -> None:
    ((field, most),) = limits.items()
    says = rf"{field} {most}: no peer of 4 connections .*: at least {least} is wanted"
    with pytest.raises(ValueError, match=says):
        Node("a", sessions_per_peer=4, **limits)
    Node("a", sessions_per_peer=4, **{field: least})
    Node("a", **limits)


@pytest.mark.parametrize("way", ["tcp", "secret", "tls", "unix"])
async def test_every_way_of_connecting_has_them(
    registry_url: str, tmp_path: Path, way: str
) -> None:
    settings: list[dict[str, Any]] = [{}, {}]
    if way == "secret":
        settings = [{"secret": SECRET}] * 2
    elif way == "tls":
        authority = Authority(tmp_path / "authority")
        settings = [{"tls": authority.issue(name)} for name in "ab"]
    elif way == "unix":
        settings = [{"unix_path": str(tmp_path / name)} for name in "ab"]
    async with (
        Node("a", registry=registry_url, sessions_per_peer=LANES, **settings[0]) as a,
        Node("b", registry=registry_url, sessions_per_peer=LANES, **settings[1]) as b,
    ):
        await asyncio.gather(a.wait_peers(1, SECONDS), b.wait_peers(1, SECONDS))
        assert len(connections(a, b)) == LANES
        if way == "unix":
            addresses = {each.address.partition(":")[0] for each in connections(a, b)}
            assert addresses == {"unix"}
        for channel in CHANNELS:
            b.subscribe(channel, echo)
            await a.wait_subscribed(channel, timeout=SECONDS)
            assert await a.request(channel, b"x" * 100_000) == b"x" * 100_000


async def test_a_peer_that_does_not_know_of_them_has_one(registry_url: str) -> None:
    async with (
        Node("a", registry=registry_url, sessions_per_peer=LANES) as a,
        extended(a, registry_url, 7, (50,)) as peer,
    ):
        assert len(session(a, 7).connections) == 1
        a.notify(50, b"all the same")
        assert (await peer.hear()).data == b"all the same"


async def test_the_plain_protocol_has_one(registry_url: str) -> None:
    async with (
        Node("a", registry=registry_url, sessions_per_peer=LANES) as a,
        plain(a) as peer,
    ):
        assert len(session(a, 7).connections) == 1
        for channel in CHANNELS:
            a.notify(channel, b"all the same", to=7)
            assert await peer.hear() == (channel, b"all the same", b"")


@pytest.mark.parametrize("index", range(LANES))
async def test_what_a_guest_was_asked_ends_with_who_asked(registry_url: str, index: int) -> None:
    """On whichever lane it came: the node between keeps nothing of it."""
    channel = of_lane(index)
    async with (
        nodes(registry_url, "a", "b", sessions_per_peer=LANES) as (a, b),
        await connect(f"tcp://127.0.0.1:{a.port}") as guest,
    ):
        kept: list[Context] = []
        guest.subscribe(channel, kept.append)
        await b.wait_subscribed(channel, timeout=5)
        asked = b.request(channel, b"", timeout=None)
        await until(lambda: kept)
        assert a.counters()["in_flight"] == 1
        session(a, b.id).close("for the test")
        await until(lambda: a.counters()["in_flight"] == 0)
        with pytest.raises(PeerLost):
            await asked


async def test_guests_have_one(registry_url: str) -> None:
    async with Node("a", registry=registry_url, sessions_per_peer=LANES) as a:
        a.subscribe(50, echo)
        async with await connect(f"tcp://127.0.0.1:{a.port}") as guest:
            assert await guest.request(50, b"x") == b"x"
            assert len(a._router.connections()) == 1


# --------------------------------------------------------------------------------- what goes where


@asynccontextmanager
async def pair(url: str, **settings: Any) -> AsyncIterator[tuple[Node, Node]]:
    async with nodes(url, "a", "b", sessions_per_peer=LANES, **settings) as (a, b):
        yield a, b


async def test_a_channel_has_its_lane(registry_url: str) -> None:
    async with pair(registry_url) as (a, b):
        crowd = Crowd(b, tuple(range(50, 62)))
        await a.wait_subscribed(61, timeout=SECONDS)
        before = [each.frames_out for each in connections(a, b)]
        for channel in range(50, 62):
            for _ in range(channel):
                a.notify(channel, b"x")
        await until(lambda: crowd.count == sum(range(50, 62)))
        sent = [each.frames_out for each in connections(a, b)]
        found = [now - then for now, then in zip(sent, before, strict=True)]
        wanted = [sum(c for c in range(50, 62) if c % LANES == lane) for lane in range(LANES)]
        assert found == wanted


async def test_every_verb_goes_by_them(registry_url: str) -> None:
    async with pair(registry_url) as (a, b):
        crowd = Crowd(b)
        replies = Crowd(a, (61, 62, 63))
        for channel in (54, 55, 56):
            b.subscribe(channel, lambda ctx: ctx.reply(b"re " + ctx.data))
        b.subscribe(57, lambda ctx: ctx.next(ctx.data + b" 57"))
        b.subscribe(58, lambda ctx: ctx.next(ctx.data + b" 58"))
        await a.wait_subscribed(58, timeout=SECONDS)
        for number, channel in enumerate(CHANNELS):
            a.notify(channel, b"notify")
            assert a.publish(channel, b"publish") == 1
            a.notify_many(channel, [b"many"] * 3)
            a.call(54 + number, b"call", 61 + number)
            assert await a.request(54 + number, b"ask") == b"re ask"
        a.ventilator([57, 58, 53], b"stages")
        await until(lambda: crowd.count == 16 and replies.count == 3)
        assert crowd.came[51] == crowd.came[52] == [b"notify", b"publish", *[b"many"] * 3]
        assert crowd.came[53] == [b"notify", b"publish", *[b"many"] * 3, b"stages 57 58"]
        assert replies.came == {61: [b"re call"], 62: [b"re call"], 63: [b"re call"]}


async def test_what_fails_is_told_to_who_sent_it(registry_url: str) -> None:
    told: list[tuple[str, int]] = []
    async with (
        Node("b", registry=registry_url, sessions_per_peer=LANES) as b,
        Node(
            "a",
            registry=registry_url,
            sessions_per_peer=LANES,
            on_error=lambda error, frame: told.append((type(error).__name__, frame.channel)),
        ) as a,
    ):
        for channel in CHANNELS:
            b.subscribe(channel, lambda ctx: ctx.error("no"))
            await a.wait_subscribed(channel, timeout=SECONDS)
            with pytest.raises(RemoteError, match="no"):
                await a.request(channel, b"x")
        for channel in CHANNELS:
            b.unsubscribe(channel)
            a.notify(channel, b"nobody has it by now")
        await until(lambda: len(told) == LANES)
        assert sorted(told) == [("NoSubscriber", channel) for channel in CHANNELS]


async def test_each_channel_keeps_its_order_both_ways(registry_url: str) -> None:
    async with pair(registry_url) as (a, b):
        channels = tuple(range(50, 57))
        crowds = Crowd(a, channels), Crowd(b, channels)
        await asyncio.gather(*(each.wait_subscribed(56, 2, SECONDS) for each in (a, b)))
        noise = random.Random(1)
        count = 400

        async def send(node: Node, to: int) -> None:
            for number in range(count):
                for channel in channels:
                    size = noise.choice((0, 10, 1000, 70_000 if channel < 53 else 3000))
                    data = struct.pack("<I", number) + bytes(size)
                    while True:
                        try:
                            node.notify(channel, data, to=to)
                            break
                        except Overloaded:
                            await node.drained(to)
                await asyncio.sleep(0)

        await asyncio.gather(send(a, b.id), send(b, a.id))
        await until(lambda: all(each.count == count * len(channels) for each in crowds), 30)
        for crowd in crowds:
            for came in crowd.came.values():
                assert [struct.unpack_from("<I", data)[0] for data in came] == list(range(count))


async def test_replies_to_one_channel_keep_their_order(registry_url: str) -> None:
    async with pair(registry_url) as (a, b):
        # The calls come by different lanes; the replies are given in the order of the numbers.
        kept: list[Context] = []
        for channel in CHANNELS:
            b.subscribe(channel, kept.append)
        await a.wait_subscribed(CHANNELS[-1], timeout=SECONDS)
        replies = Crowd(a, (60,))
        for number in range(99):
            a.call(CHANNELS[number % LANES], struct.pack(">I", number), 60)
        await until(lambda: len(kept) == 99)
        for context in sorted(kept, key=lambda context: context.data):
            context.reply(context.data + bytes(20_000))
        await until(lambda: replies.count == 99)
        assert [struct.unpack_from(">I", data)[0] for data in replies.came[60]] == [*range(99)]


@pytest.mark.parametrize("thread", [False, True])
async def test_serial_mode_goes_by_them(registry_url: str, thread: bool) -> None:
    async with pair(registry_url) as (a, b):
        serial = Serial(b, thread=thread)
        came: list[tuple[bytes, ...]] = []
        serial.subscribe_all(
            list(CHANNELS), lambda ctx: came.append(tuple(each.data for each in ctx.requests))
        )
        async with serial:
            await a.wait_subscribed(53, timeout=SECONDS)
            for number in range(1000):
                for channel in CHANNELS:
                    a.notify(channel, struct.pack("<I", number))
            await until(lambda: len(came) == 1000)
        assert came == [(struct.pack("<I", number),) * 3 for number in range(1000)]


# ---------------------------------------------------------------------------------------- by hand


@asynccontextmanager
async def by_hand(
    node: Node,
    url: str,
    machine: int = 7,
    lanes: int = LANES,
    channels: tuple[int, ...] = (),
    introduce: bool = True,
) -> AsyncIterator[list[Stranger]]:
    """A session of so many connections, built from the page."""
    async with registered(url, machine) as offer, contextlib.AsyncExitStack() as stack:
        peer = await stack.enter_async_context(stranger(node))
        await peer.say(reference.hello(machine, offer._replace(features=features(lanes))))
        welcome = await peer.hear()
        assert welcome.channel == reference.WELCOME
        ticket = reference.ticket_of(welcome.data)
        assert len(ticket) == 16
        found = [peer]
        for index in range(1, lanes):
            lane = await stack.enter_async_context(stranger(node))
            await lane.say(reference.lane(machine, index, ticket))
            assert await lane.hear() == (reference.LANE, b"", b"")
            found.append(lane)
        if introduce:
            await peer.say(reference.subscriptions(reference.ALL, channels))
            await node._mesh.conditions.wait_for(lambda: machine in node.peers, SECONDS)
            assert (await peer.hear()).channel == reference.SUBSCRIPTIONS
        yield found


@asynccontextmanager
async def met(
    url: str,
    *,
    lanes: int = LANES,
    channels: tuple[int, ...] = (),
    introduce: bool = True,
    **settings: Any,
) -> AsyncIterator[tuple[Node, list[Stranger]]]:
    """A node, and a session with it by hand."""
    async with (
        Node("a", registry=url, sessions_per_peer=lanes, **settings) as node,
        by_hand(node, url, lanes=lanes, channels=channels, introduce=introduce) as peers,
    ):
        yield node, peers


async def test_a_session_by_hand(registry_url: str) -> None:
    async with Node("a", registry=registry_url, sessions_per_peer=LANES) as a:
        a.subscribe(52, echo)
        async with by_hand(a, registry_url, channels=CHANNELS) as peers:
            for channel in CHANNELS:
                a.notify(channel, b"to you", to=7)
                frame = await peers[channel % LANES].hear()
                assert frame == (channel, b"to you", b"")
            # A request is answered where it came, whatever its channel.
            for lane in peers:
                ask = struct.pack("<BQI", 1, 99, 5000)
                await lane.say(reference.encode(52, b"ping", ask))
                assert await lane.hear() == (reference.ANSWER, b"ping", struct.pack("<QB", 99, 0))


async def test_the_dialler_by_hand(registry_url: str) -> None:
    """A node dials what offers lanes: it dials them all before it introduces itself."""
    async with Node("a", registry=registry_url, sessions_per_peer=LANES) as a:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            async with registered(registry_url, 7, listener.getsockname()[1]) as offer:
                ticket = bytes(range(16))
                welcome = reference.encode_welcome(7, offer._replace(features=features(2)), ticket)
                sock, _ = await asyncio.wait_for(loop.sock_accept(listener), SECONDS)
                first = Stranger(sock, magic=True)
                named = await first.hear()
                assert named.channel == reference.NODE_NAME
                assert reference.lanes(reference.decode_offer(named.extend)) == LANES
                await first.say(reference.encode(reference.WELCOME, welcome))
                sock, _ = await asyncio.wait_for(loop.sock_accept(listener), SECONDS)
                second = Stranger(sock, magic=True)
                said = await second.hear()
                assert said == (reference.LANE, struct.pack("<HB", a.id, 1), ticket)
                # Until it is taken the session is not there, and nothing is said of it.
                await all_is_read(a)
                assert a._router.session(7) is None
                await second.say(reference.encode(reference.LANE))
                assert (await first.hear()).channel == reference.SUBSCRIPTIONS
                # What comes on a lane waits until the peer has said who it is.
                came: list[bool] = []
                a.subscribe(51, lambda ctx: came.append(ctx.sender in a.peers))
                await second.say(reference.encode(51, b"early"))
                await first.say(reference.subscriptions(reference.ALL, (50, 51)))
                await until(lambda: came)
                assert came == [True]
                a.notify(50, b"even")
                a.notify(51, b"odd", to=7)
                assert (await second.hear()).data == b"odd"
                for each in (first, second):
                    each.sock.close()
                await until(lambda: 7 not in a.peers)


async def test_what_a_lane_brings_waits_for_the_introduction(registry_url: str) -> None:
    async with Node("a", registry=registry_url, sessions_per_peer=LANES) as a:
        came: list[tuple[bytes, bool]] = []
        a.subscribe(52, lambda ctx: came.append((ctx.data, ctx.sender in a.peers)))
        async with by_hand(a, registry_url, introduce=False) as peers:
            await peers[1].say(reference.encode(52, b"early"))
            await all_is_read(a)
            assert came == []
            await peers[0].say(reference.subscriptions(reference.ALL))
            await until(lambda: came)
            assert came == [(b"early", True)]


async def all_is_read(node: Node) -> None:
    """A stranger comes and is sent away: the loop has read whatever was there to be read before."""
    async with stranger(node) as other:
        await other.say(b"no magic at all")
        await other.closed()


async def refused(node: Node, said: bytes, counter: str) -> list[reference.Frame]:
    before = node.counters()[counter]
    async with stranger(node) as lane:
        await lane.say(said)
        told = await lane.closed()
    await until(lambda: node.counters()[counter] == before + 1)
    return told


async def test_who_has_no_ticket_gets_no_lane(registry_url: str) -> None:
    async with (
        Node("a", registry=registry_url, sessions_per_peer=LANES) as a,
        registered(registry_url, 7) as offer,
        stranger(a) as peer,
    ):
        await peer.say(reference.hello(7, offer._replace(features=features(LANES))))
        ticket = reference.ticket_of((await peer.hear()).data)
        wrong = bytes([ticket[0] ^ 1]) + ticket[1:]
        for said, counter in (
            (reference.lane(7, 1, wrong), "refused_auth"),
            (reference.lane(7, 1, ticket[:-1]), "refused_auth"),
            (reference.lane(7, 1, b""), "refused_auth"),
            (reference.lane(8, 1, ticket), "refused_auth"),
            (reference.lane(7, 0, ticket), "protocol_errors"),
            (reference.lane(7, LANES, ticket), "protocol_errors"),
            (reference.lane(7, 255, ticket), "protocol_errors"),
            (MAGIC + reference.encode(reference.LANE, b"\7\0", ticket), "protocol_errors"),
            (MAGIC + reference.encode(reference.LANE, b"\7\0\1\0", ticket), "protocol_errors"),
        ):
            await refused(a, said, counter)
        async with stranger(a) as one, stranger(a) as two:
            await one.say(reference.lane(7, 1, ticket))
            assert (await one.hear()).channel == reference.LANE
            await refused(a, reference.lane(7, 1, ticket), "protocol_errors")
            await two.say(reference.lane(7, 2, ticket))
            assert (await two.hear()).channel == reference.LANE
            await peer.say(reference.subscriptions(reference.ALL))
            await a.wait_peers(1, SECONDS)
            # The session is complete: its ticket is of no use any more.
            await refused(a, reference.lane(7, 1, ticket), "refused_auth")
            await peer.settled()
            assert len(session(a, 7).connections) == LANES


MAGIC = reference.magic()


async def test_a_ticket_is_of_one_session(registry_url: str) -> None:
    async with (
        Node("a", registry=registry_url, sessions_per_peer=2) as a,
        registered(registry_url, 7) as one,
        registered(registry_url, 8) as other,
        stranger(a) as first,
        stranger(a) as second,
    ):
        await first.say(reference.hello(7, one._replace(features=features(2))))
        await second.say(reference.hello(8, other._replace(features=features(2))))
        tickets = [reference.ticket_of((await each.hear()).data) for each in (first, second)]
        assert tickets[0] != tickets[1]
        await refused(a, reference.lane(7, 1, tickets[1]), "refused_auth")
        await refused(a, reference.lane(8, 1, tickets[0]), "refused_auth")


async def test_a_ticket_goes_with_its_session(registry_url: str) -> None:
    async with (
        Node("a", registry=registry_url, sessions_per_peer=2) as a,
        registered(registry_url, 7) as offer,
    ):
        async with stranger(a) as peer:
            await peer.say(reference.hello(7, offer._replace(features=features(2))))
            ticket = reference.ticket_of((await peer.hear()).data)
            await peer.say(EXIT)
            await peer.closed()
        await refused(a, reference.lane(7, 1, ticket), "refused_auth")


async def test_who_is_to_have_lanes_has_them_before_it_is_a_peer(registry_url: str) -> None:
    async with (
        Node("a", registry=registry_url, sessions_per_peer=2) as a,
        registered(registry_url, 7) as offer,
        stranger(a) as peer,
    ):
        await peer.say(reference.hello(7, offer._replace(features=features(2))))
        await peer.hear()
        await peer.say(reference.subscriptions(reference.ALL))
        told = await peer.closed()
        assert b"before its lanes" in told[-1].data
        assert a.counters()["protocol_errors"] == 1
        assert not a.peers


async def test_a_lane_that_says_more_than_it_may_ends_its_session(registry_url: str) -> None:
    async with Node("a", registry=registry_url, sessions_per_peer=LANES) as a:
        for said in (
            reference.subscriptions(reference.ALL, (50,)),
            reference.encode(reference.NODE_NAME, b"\7\0"),
            b"\0\0\0\0\0\0\0\0",
        ):
            async with by_hand(a, registry_url) as peers:
                before = a.counters()["protocol_errors"]
                await peers[2].say(said)
                await asyncio.gather(*(each.closed() for each in peers))
                assert a.counters()["protocol_errors"] == before + 1
                await until(lambda: not a.peers)


async def test_who_does_not_introduce_itself_is_given_up(registry_url: str) -> None:
    async with (
        Node("a", registry=registry_url, sessions_per_peer=LANES, handshake_timeout=0.2) as a,
        by_hand(a, registry_url, introduce=False) as peers,
    ):
        await asyncio.gather(*(each.closed() for each in peers))
        assert a.counters()["protocol_errors"] == 1
        assert a._mesh._sessions == set()


async def test_a_lane_that_does_not_come_gives_the_handshake_up(registry_url: str) -> None:
    async with (
        Node("a", registry=registry_url, sessions_per_peer=2, handshake_timeout=0.2) as a,
        registered(registry_url, 7) as offer,
        stranger(a) as peer,
    ):
        await peer.say(reference.hello(7, offer._replace(features=features(2))))
        await peer.hear()
        await peer.closed()
        assert a.counters()["protocol_errors"] == 1
        assert a._mesh._sessions == set()


@asynccontextmanager
async def dialled(
    url: str, lanes: int
) -> AsyncIterator[Callable[[], Awaitable[tuple[Stranger, bytes]]]]:
    """A node by hand that others dial: each call is the next that does, up to its WELCOME."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        listener.setblocking(False)
        async with registered(url, 7, listener.getsockname()[1]) as offer:

            async def accept() -> tuple[Stranger, bytes]:
                sock, _ = await asyncio.wait_for(loop.sock_accept(listener), SECONDS)
                peer = Stranger(stack.enter_context(sock), magic=True)
                said = await peer.hear()
                if said.channel == reference.NODE_NAME:
                    ticket = bytes(16)
                    offered = offer._replace(features=features(lanes))
                    data = reference.encode_welcome(7, offered, ticket)
                    await peer.say(reference.encode(reference.WELCOME, data))
                return peer, said.data

            yield accept


async def test_a_peer_that_goes_before_it_has_introduced_itself_is_dialled_again(
    registry_url: str,
) -> None:
    async with (
        Node("a", registry=registry_url, sessions_per_peer=2),
        dialled(registry_url, 2) as accept,
    ):
        for _ in range(3):
            first, _ = await accept()
            second, _ = await accept()
            await second.say(reference.encode(reference.LANE))
            # It is up for the one that dialled.
            assert (await first.hear()).channel == reference.SUBSCRIPTIONS
            await first.say(EXIT)
            await second.closed()


@pytest.mark.parametrize(
    "said",
    [
        reference.encode(reference.LANE, b"more"),
        reference.encode(reference.LANE, b"", b"more"),
        reference.encode(reference.WELCOME, bytes(50)),
        reference.encode(50, b"too early"),
    ],
    ids=["data", "extend", "welcome", "message"],
)
async def test_what_does_not_take_a_lane_ends_the_session(registry_url: str, said: bytes) -> None:
    async with (
        Node("a", registry=registry_url, sessions_per_peer=2) as a,
        dialled(registry_url, 2) as accept,
    ):
        first, _ = await accept()
        second, _ = await accept()
        await second.say(said)
        await asyncio.gather(first.closed(), second.closed())
        assert a.counters()["protocol_errors"] == 1
        assert not a.peers


async def test_a_session_that_was_dialled_is_no_lane(registry_url: str) -> None:
    """LANE is not awaited by then, and passed over."""
    async with (
        Node("a", registry=registry_url, sessions_per_peer=2) as a,
        dialled(registry_url, 1) as accept,
    ):
        first, _ = await accept()
        await first.say(reference.subscriptions(reference.ALL), reference.encode(reference.LANE))
        await first.settled()
        assert [each.is_lane for each in session(a, 7).connections] == [False]
        assert a.counters()["dropped_not_negotiated"] == 1


async def test_closing_while_lanes_are_dialled_leaves_nothing(registry_url: str) -> None:
    async with Node("a", registry=registry_url, sessions_per_peer=LANES) as a:
        async with dialled(registry_url, LANES) as accept:
            first, _ = await accept()
            second, _ = await accept()
            await a.close()
            await asyncio.gather(first.closed(), second.closed())
        assert a._mesh._sessions == set()
        assert a._mesh._dialling._lanes == {}


async def test_who_takes_no_lane_is_dialled_again(registry_url: str) -> None:
    """Its connections for lanes are closed: the session is given up, and all is tried again."""
    async with Node("a", registry=registry_url, sessions_per_peer=2, handshake_timeout=1.0) as a:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            async with registered(registry_url, 7, listener.getsockname()[1]) as offer:
                welcome = reference.encode_welcome(
                    7, offer._replace(features=features(2)), bytes(16)
                )
                for _ in range(2):
                    sock, _ = await asyncio.wait_for(loop.sock_accept(listener), SECONDS)
                    first = Stranger(sock, magic=True)
                    assert (await first.hear()).channel == reference.NODE_NAME
                    await first.say(reference.encode(reference.WELCOME, welcome))
                    sock, _ = await asyncio.wait_for(loop.sock_accept(listener), SECONDS)
                    second = Stranger(sock, magic=True)
                    assert (await second.hear()).channel == reference.LANE
                    second.sock.close()
                    told = await first.closed()
                    assert b"a lane was lost" in told[-1].data
                    first.sock.close()
                assert not a.peers


async def test_a_welcome_that_offers_lanes_and_no_ticket_is_refused(registry_url: str) -> None:
    async with Node("a", registry=registry_url, sessions_per_peer=2) as a:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            async with registered(registry_url, 7, listener.getsockname()[1]) as offer:
                welcome = reference.encode_welcome(7, offer._replace(features=features(2)), b"")
                sock, _ = await asyncio.wait_for(loop.sock_accept(listener), SECONDS)
                first = Stranger(sock, magic=True)
                await first.hear()
                await first.say(reference.encode(reference.WELCOME, welcome))
                told = await first.closed()
                assert b"no ticket" in told[-1].data
                first.sock.close()
                await until(lambda: a.counters()["protocol_errors"] >= 1)


async def test_lanes_count_as_connections_of_their_address(registry_url: str) -> None:
    limits = {"session_limit": 64, "sessions_per_address": 4}
    async with Node("a", registry=registry_url, sessions_per_peer=4, **limits) as a:
        async with by_hand(a, registry_url, lanes=4):
            async with stranger(a) as fifth:
                await fifth.closed()
            assert a.counters()["refused_sessions"] == 1
        await until(lambda: not a.peers)
        async with by_hand(a, registry_url, lanes=4):
            assert len(a.peers) == 1


# -------------------------------------------------------------------------------------- the end


async def test_closing_loses_nothing_of_what_was_sent(registry_url: str) -> None:
    for _ in range(3):
        async with Node("b", registry=registry_url, sessions_per_peer=LANES) as b:
            crowd = Crowd(b)
            async with Node("a", registry=registry_url, sessions_per_peer=LANES) as a:
                await a.wait_subscribed(53, timeout=SECONDS)
                for number in range(300):
                    a.notify(CHANNELS[number % 2], bytes(30_000))
                a.notify(53, b"small")
            await until(lambda: not b.peers)
            assert [len(came) for came in crowd.came.values()] == [150, 150, 1]


@pytest.mark.parametrize("how", ["exit", "eof"])
@pytest.mark.parametrize("first", range(LANES))
async def test_what_came_before_the_end_is_had_of_each_lane(
    registry_url: str, how: str, first: int
) -> None:
    async with Node("a", registry=registry_url, sessions_per_peer=LANES) as a:
        crowd = Crowd(a)
        async with by_hand(a, registry_url, channels=CHANNELS) as peers:

            async def end(peer: Stranger) -> None:
                if how == "exit":
                    await peer.say(EXIT)
                else:
                    peer.sock.shutdown(socket.SHUT_WR)

            await end(peers[first])
            # On the others nothing follows, not even a goodbye.
            rest = [peer for peer in peers if peer is not peers[first]]
            for peer in rest:
                assert await peer.closed() == []
            for channel in CHANNELS:
                with pytest.raises(PeerLost):
                    a.notify(channel, b"x", to=7)
            assert 7 not in a.subscribers(51)
            for peer in rest:
                channel = of_lane(peers.index(peer))
                await peer.say(reference.encode(channel, b"before the end"))
                await until(lambda came=crowd.came[channel]: came)
                assert 7 in a.peers
                await end(peer)
            await until(lambda: 7 not in a.peers)
            assert crowd.count == LANES - 1
        assert a.counters()["protocol_errors"] == 0


async def test_an_answer_that_is_on_its_way_when_the_peer_ends_is_had(registry_url: str) -> None:
    async with met(registry_url, lanes=2, channels=(50, 51)) as (a, peers):
        asking = [a.request(50, b"even"), a.request(51, b"odd")]
        asked = [await peer.hear() for peer in peers]
        await peers[0].say(EXIT)
        assert await peers[1].closed() == []
        answer = struct.pack("<QB", struct.unpack_from("<xQ", asked[1].extend)[0], 0)
        await peers[1].say(reference.encode(reference.ANSWER, b"done", answer), EXIT)
        assert await asking[1] == b"done"
        with pytest.raises(PeerLost):
            await asking[0]


@pytest.mark.parametrize(
    "extend",
    [
        reference.request_extend(1),
        reference.call_extend(7, 52),
        reference.guest_call_extend(7, 52, 1),
    ],
    ids=["request", "call", "call of a guest"],
)
async def test_what_answers_a_peer_that_ends_is_counted(registry_url: str, extend: bytes) -> None:
    async with met(registry_url, lanes=2) as (a, peers):
        kept: list[Context] = []
        a.subscribe(50, kept.append)
        await peers[0].say(reference.encode(50, b"asked", extend))
        await until(lambda: kept)
        await peers[1].say(EXIT)
        await peers[0].closed()
        kept[0].reply(b"too late")
        assert kept[0].answered
        assert a.counters()["answers_lost"] == 1


async def test_a_peer_that_ends_one_lane_alone_is_not_waited_for_long(registry_url: str) -> None:
    async with met(registry_url, channels=CHANNELS) as (a, peers):
        a._router.linger_time = 0.2
        asking = a.request(52, b"x", timeout=30.0)
        await peers[0].say(EXIT)
        with pytest.raises(PeerLost, match="the peer said goodbye: enough"):
            await asking
        await until(lambda: 7 not in a.peers)
        assert a.counters()["protocol_errors"] == 0


async def test_who_ends_is_not_chosen_any_more(registry_url: str) -> None:
    async with met(registry_url, channels=(50, 51)) as (a, peers):
        assert a.subscribers(50) == [7]
        await peers[0].say(EXIT)
        await peers[1].closed()
        assert a.subscribers(50) == []
        for channel in (50, 51):
            with pytest.raises(NoSubscriber):
                a.notify(channel, b"x")
            with pytest.raises(PeerLost):
                await a.request(channel, b"x", to=7)


async def test_a_lane_that_breaks_takes_the_session_with_it(registry_url: str) -> None:
    async with pair(registry_url) as (a, b):
        crowd = Crowd(b)
        b.subscribe(60, lambda ctx: None)
        await a.wait_subscribed(60, timeout=SECONDS)
        requests = [a.request(60, b"x", timeout=30.0) for _ in range(3)]
        outcomes = [endings(request) for request in requests]
        old = connections(a, b), connections(b, a)
        with socket.socket(fileno=socket.dup(old[0][1].descriptor)) as copy:
            copy.shutdown(socket.SHUT_RDWR)
        for request in requests:
            with pytest.raises(PeerLost):
                await request
        await until(lambda: all(each.closed for side in old for each in side))
        await until(lambda: outcomes == [["PeerLost"]] * 3)
        await asyncio.gather(a.wait_peers(1, SECONDS), b.wait_peers(1, SECONDS))
        await a.wait_subscribed(53, timeout=SECONDS)
        assert len(connections(a, b)) == len(connections(b, a)) == LANES
        assert not set(connections(a, b)) & set(old[0])
        for channel in CHANNELS:
            a.notify(channel, b"again")
        await until(lambda: crowd.count == LANES)


async def test_a_loss_is_told_once(registry_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "domi_fast.mesh")
    async with met(registry_url) as (a, peers):
        for peer in peers:
            await peer.say(EXIT)
        await until(lambda: 7 not in a.peers)
        told = [each for each in caplog.records if "lost node 7" in each.getMessage()]
        assert len(told) == 1


async def test_what_comes_again_waits_until_the_rest_has_been_read(registry_url: str) -> None:
    """A newer session of the same node would take the place of what is still being read."""
    async with (
        Node("a", registry=registry_url, sessions_per_peer=2) as a,
        registered(registry_url, 7) as offer,
    ):
        crowd = Crowd(a)
        offer = offer._replace(features=features(2))
        async with stranger(a) as first, stranger(a) as second:
            await first.say(reference.hello(7, offer))
            ticket = reference.ticket_of((await first.hear()).data)
            await second.say(reference.lane(7, 1, ticket))
            await second.hear()
            await first.say(reference.subscriptions(reference.ALL))
            await a.wait_peers(1, SECONDS)
            await first.say(EXIT)
            await second.closed()
            async with stranger(a) as early:
                await early.say(reference.hello(7, offer))
                assert b"still read" in (await early.closed())[-1].data
            await second.say(reference.encode(51, b"the rest"), EXIT)
            await until(lambda: 7 not in a.peers)
            assert crowd.came[51] == [b"the rest"]
        async with stranger(a) as again:
            await again.say(reference.hello(7, offer))
            assert (await again.hear()).channel == reference.WELCOME


async def test_on_error_may_send_the_rest_to_another(registry_url: str) -> None:
    """What a lost peer did not get is told when it stands in no route any more."""
    sent: list[bytes] = []
    async with Node("other", registry=registry_url) as other:
        other.subscribe(51, lambda ctx: sent.append(ctx.data))

        def again(error: Exception, frame: Any) -> None:
            a.notify(frame.channel, frame.data)

        async with Node("a", registry=registry_url, sessions_per_peer=2, on_error=again) as a:
            await a.wait_subscribed(51, timeout=SECONDS)
            async with by_hand(a, registry_url, lanes=2, channels=(51,)) as peers:
                a.notify(51, bytes(8 * MIB), to=7)
                a.notify(51, b"was not sent", to=7)
                peers[0].sock.shutdown(socket.SHUT_RDWR)
                peers[1].sock.close()
                await until(lambda: b"was not sent" in sent)


async def test_who_waits_for_room_hears_that_the_peer_goes(registry_url: str) -> None:
    """It has ended one of its connections, and still reads of none."""
    ignore = {"on_error": lambda error, frame: None}
    async with met(registry_url, lanes=2, channels=(50, 51), **ignore) as (a, peers):
        for channel in (50, 51):
            with contextlib.suppress(Overloaded):
                while True:
                    a.notify(channel, bytes(60_000), to=7)
        waiting = [asyncio.ensure_future(a.drained(7)) for _ in range(2)]
        await asyncio.sleep(0)
        assert not any(each.done() for each in waiting)
        peers[1].sock.shutdown(socket.SHUT_WR)
        for each in waiting:
            with pytest.raises(PeerLost):
                await asyncio.wait_for(each, SECONDS)
        with pytest.raises(PeerLost):
            await a.drained(7)


async def test_a_silent_lane_is_a_silent_peer(registry_url: str) -> None:
    settings = {"heartbeat_interval": 0.1, "heartbeat_timeout": 0.5}
    async with met(registry_url, lanes=2, **settings) as (a, peers):
        over = asyncio.Event()

        async def beat(peer: Stranger) -> None:
            while not over.is_set():
                await peer.say(reference.encode(reference.HEARTBEAT))
                await asyncio.sleep(0.05)

        beating = asyncio.ensure_future(beat(peers[0]))
        try:
            await until(lambda: 7 not in a.peers, 3.0)
        finally:
            over.set()
            await asyncio.gather(beating, return_exceptions=True)
        assert a.counters()["peers_silent"] == 1


async def test_a_killed_peer_is_lost_once(registry_url: str) -> None:
    async with Node("a", registry=registry_url, sessions_per_peer=LANES) as a:
        events = a.events()
        async with by_hand(a, registry_url) as peers:
            for peer in peers:
                linger = struct.pack("ii", 1, 0)
                peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                peer.sock.close()
            await until(lambda: 7 not in a.peers)
        kinds: list[str] = []
        while len(kinds) < 2:
            kinds.append((await asyncio.wait_for(events.__anext__(), SECONDS)).kind)
        assert kinds == ["joined", "left"]


async def test_both_dial_at_once(registry_url: str) -> None:
    """Each has begun a session with the other when it hears of it; one of the two remains."""
    for _ in range(5):
        async with nodes(registry_url, "a", "b", sessions_per_peer=LANES) as (a, b):
            for node, other in ((a, b), (b, a)):
                assert len(connections(node, other)) == LANES
            # Cut on both sides at the same time: both dial.
            for node, other in ((a, b), (b, a)):
                connections(node, other)[0].close("cut by the test")
            await until(
                lambda one=a, other=b: all(
                    other_.id in node.peers and len(connections(node, other_)) == LANES
                    for node, other_ in ((one, other), (other, one))
                )
            )
            for node, other, channel in ((a, b, 60), (b, a, 61)):
                assert node._router.connections() == connections(node, other)
                other.subscribe(channel, echo)
                await node.wait_subscribed(channel, timeout=SECONDS)
                assert await node.request(channel, b"x") == b"x"


# ---------------------------------------------------------------------- what is said on all of them


async def test_each_has_heartbeats_of_its_own(registry_url: str) -> None:
    async with met(registry_url, heartbeat_interval=0.1) as (_, peers):
        for peer in peers:
            while not peer.heartbeats:
                await peer.settled()


async def test_what_is_said_once_is_said_on_the_first(registry_url: str) -> None:
    """Subscriptions and memory; a refusal goes back where what it refuses came."""
    async with met(registry_url, memory_interval=0.05) as (a, peers):
        a.subscribe(60, echo)
        a.unsubscribe(60)
        for index, peer in enumerate(peers):
            await peer.say(reference.encode(59, b"nobody has it"))
            said = await peer.settled()
            refusals = [frame for frame in said if frame.channel == reference.REJECT]
            news = [frame for frame in said if frame.channel == reference.SUBSCRIPTIONS]
            assert [frame.data for frame in refusals] == [b"nobody has it"]
            assert len(news) == (2 if index == 0 else 0)
        while not peers[0].memories:
            await peers[0].settled()
        assert [peer.memories > 0 for peer in peers] == [True, False, False]


async def test_pausing_waits_for_what_is_on_its_way_on_each_lane(registry_url: str) -> None:
    async with Node("a", registry=registry_url, sessions_per_peer=LANES) as a:
        crowd = Crowd(a)
        async with by_hand(a, registry_url, channels=(50,)) as peers:
            pausing = asyncio.ensure_future(a.pause())
            for peer in peers:
                said = await peer.hear()
                assert said == (reference.STATE, bytes([reference.PAUSED]), b"\0")
            heard = reference.encode(reference.STATE, bytes([reference.PAUSED]), b"\1")
            for index in (2, 0):
                channel = of_lane(index)
                await peers[index].say(reference.encode(channel, b"sent before"), heard)
            await until(lambda: crowd.count == 2)
            assert not pausing.done()
            await peers[1].say(reference.encode(52, b"sent before"), heard)
            await asyncio.wait_for(pausing, SECONDS)
            assert crowd.count == 3


async def test_the_newest_state_counts_whichever_lane_is_quicker(registry_url: str) -> None:
    async with met(registry_url, lanes=2, channels=(50,)) as (a, peers):

        def state(number: int) -> bytes:
            return reference.encode(reference.STATE, bytes([number]), b"\0")

        first, second = peers
        await second.say(state(reference.PAUSED), state(reference.SERVING))
        await second.say(state(reference.DRAINING))
        for _ in range(3):
            assert (await second.hear()).extend == b"\1"
        assert a.peers[7].state == "draining"
        await first.say(state(reference.PAUSED), state(reference.SERVING))
        for _ in range(2):
            assert (await first.hear()).extend == b"\1"
            assert a.peers[7].state == "draining"
        with pytest.raises(NoSubscriber):
            a.notify(50, b"x")
        await first.say(state(reference.DRAINING), state(reference.SERVING))
        for _ in range(2):
            assert (await first.hear()).extend == b"\1"
        assert a.peers[7].state == "serving"
        a.notify(50, b"x")
        assert (await first.hear()).data == b"x"


async def test_who_joins_a_node_that_is_paused_hears_it_on_each_lane(registry_url: str) -> None:
    async with Node("a", registry=registry_url, sessions_per_peer=2) as a:
        await a.pause()
        async with by_hand(a, registry_url, lanes=2) as peers:
            assert (await peers[1].hear()).channel == reference.STATE
            assert (await peers[0].hear()).channel == reference.STATE


async def test_drained_waits_for_each_lane(registry_url: str) -> None:
    limit = 256 * 1024
    async with met(registry_url, channels=CHANNELS, queue_limit=limit) as (a, peers):
        await fill(a, 52)
        assert a.peers[7].queued >= limit
        # The others have room.
        a.notify(51, b"goes")
        a.notify(53, b"goes")
        assert (await peers[0].hear()).data == (await peers[2].hear()).data == b"goes"
        drained = asyncio.ensure_future(a.drained(7))
        await all_is_read(a)
        assert not drained.done()
        await read_all(peers[1], drained)
        assert a.peers[7].queued < limit


async def fill(node: Node, channel: int) -> None:
    """Send until the queue of the channel's lane is full, and stays so."""
    for _ in range(100_000):
        try:
            node.notify(channel, bytes(10_000))
        except Overloaded:
            return
        await asyncio.sleep(0)
    raise AssertionError("it is never full")


async def read_all(peer: Stranger, until_done: asyncio.Future[Any]) -> None:
    while not until_done.done():
        reading = asyncio.ensure_future(peer.hear())
        await asyncio.wait([reading, until_done], return_when="FIRST_COMPLETED")
        if not reading.done():
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
    await until_done


async def test_a_request_waits_for_room_in_its_lane(registry_url: str) -> None:
    async with (
        Node(
            "a", registry=registry_url, sessions_per_peer=2, queue_limit=256 * 1024, breaker=None
        ) as a,
        by_hand(a, registry_url, lanes=2, channels=(50, 51)) as peers,
    ):
        await fill(a, 51)
        waiting = a.request(51, b"behind all that", timeout=30.0)
        quick = a.request(50, b"has room")
        asked = await peers[0].hear()
        answer = struct.pack("<QB", struct.unpack_from("<xQ", asked.extend)[0], 0)
        await peers[0].say(reference.encode(reference.ANSWER, b"yes", answer))
        assert await quick == b"yes"
        assert not waiting.done()
        while len((asked := await peers[1].hear()).data) == 10_000:
            pass
        assert asked.data == b"behind all that"
        answer = struct.pack("<QB", struct.unpack_from("<xQ", asked.extend)[0], 0)
        await peers[1].say(reference.encode(reference.ANSWER, b"too", answer))
        assert await waiting == b"too"


async def test_a_policy_of_the_peer_is_of_all_its_lanes(registry_url: str) -> None:
    async with met(registry_url, lanes=2, channels=(50, 51), queue_limit=64 * 1024) as (a, _):
        a.when_full("drop_newest", peer=7)
        for channel in (50, 51):
            for _ in range(2000):
                a.notify(channel, bytes(10_000))
        assert set(a.drops()) == {(7, 50), (7, 51)}


async def test_a_slow_peer_that_is_disconnected_may_read_the_rest_of_each_lane(
    registry_url: str,
) -> None:
    async with met(registry_url, lanes=2, channels=(50, 51), queue_limit=64 * 1024) as (a, peers):
        a.when_full("disconnect", peer=7)
        a.notify(50, b"on the other lane")
        with pytest.raises(PeerLost):
            a.notify_many(51, [bytes(10_000)] * 100_000)
        assert len(a._router.lingers(7)) == 2
        told = await peers[0].closed()
        assert told[0].data == b"on the other lane"
        assert len(await peers[1].closed()) > 1


async def test_a_circuit_is_of_the_peer(registry_url: str) -> None:
    breaker = Breaker(failures=2, window=10.0, pause=0.05)
    async with met(registry_url, lanes=2, channels=(50, 51), breaker=breaker) as (a, peers):
        for channel in (50, 51):
            with pytest.raises(DeadlineExceeded):
                await a.request(channel, b"x", timeout=0.05)
        assert a.peers[7].circuit != "closed"
        for channel in (50, 51):
            with pytest.raises(CircuitOpen):
                a.notify(channel, b"x")
        while (await peers[0].hear()).channel != reference.PING:
            pass
        await peers[0].say(reference.encode(reference.PONG, b"pong"))
        await until(lambda: a.peers[7].circuit == "closed")
        a.notify(51, b"again")
        while (frame := await peers[1].hear()).data != b"again":
            assert frame.channel == 51


async def test_counters_are_of_all_lanes(registry_url: str) -> None:
    async with pair(registry_url) as (a, b):
        for channel in CHANNELS:
            b.subscribe(channel, echo)
            await a.wait_subscribed(channel, timeout=SECONDS)
        before = a.counters()
        for channel in CHANNELS:
            for _ in range(10):
                assert await a.request(channel, b"x") == b"x"
        after = a.counters()
        assert after["frames_out"] - before["frames_out"] >= 30
        assert after["frames_in"] - before["frames_in"] >= 30
        owed: list[Context] = []
        for channel in (61, 62, 63):
            b.subscribe(channel, owed.append)
            await a.wait_subscribed(channel, timeout=SECONDS)
        asking = [a.request(channel, b"x") for channel in (61, 62, 63)]
        await until(lambda: len(owed) == 3)
        assert b._router.unfinished() == 3
        for context in owed:
            context.reply(b"")
        await asyncio.gather(*asking)
        assert b._router.unfinished() == 0


async def test_a_large_transfer_holds_no_other_lane_up(registry_url: str) -> None:
    """The receiver reads nothing of one lane; what goes by another arrives."""
    async with met(registry_url, lanes=2, channels=(50, 51)) as (a, peers):
        a.notify(51, bytes(8 * MIB))
        assert a.peers[7].queued > MIB
        for number in range(100):
            a.notify(50, b"%d" % number)
            assert (await peers[0].hear()).data == b"%d" % number
        assert a.peers[7].queued > MIB


async def test_nodes_that_come_and_go_under_load(registry_url: str) -> None:
    """Each request ends well."""
    async with (
        Node("server", registry=registry_url, sessions_per_peer=LANES) as server,
        Node("client", registry=registry_url, sessions_per_peer=2) as client,
        busy(client, server) as answered,
    ):
        for channel in CHANNELS:
            async with Node("more", registry=registry_url, sessions_per_peer=4) as more:
                await more.wait_peers(2, SECONDS)
                more.subscribe(channel, echo)
                await client.wait_subscribed(channel, timeout=SECONDS)
                assert await client.request(channel, b"x") == b"x"
        before = answered()
        await until(lambda: answered() > before)
        assert len(link(client, server)[0].connections) == 2
