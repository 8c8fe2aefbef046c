"""The life of a node, from before its start to after its close, and the exceptions."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import domi_fast
from domi_fast import (
    AlreadyReplied,
    CircuitOpen,
    ClusterFull,
    Context,
    DeadlineExceeded,
    DomiError,
    FrameError,
    Holder,
    LeadershipLost,
    NameTaken,
    Node,
    NoSubscriber,
    Overloaded,
    PeerLost,
    RegistryError,
    RemoteError,
    RingFull,
    VersionTooOld,
)
from tests.support import echo, endings, forget_records, nodes, session, until

ERRORS = [
    *(NoSubscriber, PeerLost, DeadlineExceeded, CircuitOpen, Overloaded, RingFull, FrameError),
    *(
        AlreadyReplied,
        domi_fast.AuthError,
        RegistryError,
        ClusterFull,
        VersionTooOld,
        LeadershipLost,
    ),
    DomiError,
]


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


def verbs(node: Node) -> list[Callable[[], Any]]:
    return [
        lambda: node.notify(50, b""),
        lambda: node.publish(50, b""),
        lambda: node.call(50, b"", 51),
        lambda: node.request(50, b""),
        lambda: node.ventilator([50], b""),
        lambda: node.drained(0),
    ]


# ----------------------------------------------------------------------------------- life of a node


async def test_verbs_before_the_start_and_after_the_close(registry_url: str) -> None:
    node = Node("a", registry=registry_url)
    node.subscribe(50, echo)
    assert (node.id, node.port, dict(node.peers)) == (-1, 0, {})
    for verb in verbs(node):
        with pytest.raises(DomiError, match="start"):
            verb()
    await node.start()
    assert node.id == 0
    assert node.port > 0
    assert await node.request(50, b"x") == b"x"
    with pytest.raises(DomiError):
        await node.start()
    await node.close()
    await node.close()
    for verb in verbs(node):
        with pytest.raises(DomiError):
            verb()
    with pytest.raises(DomiError):
        await node.start()


async def test_verbs_without_any_loop_or_start(registry_url: str) -> None:
    node = Node("a", registry=registry_url)
    await node.close()
    with pytest.raises(DomiError):
        await node.start()


async def test_verbs_from_another_thread(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        a.subscribe(50, echo)
        for verb in [
            *verbs(a),
            lambda: a.subscribe(60, echo),
            lambda: a.unsubscribe(50),
        ]:
            with pytest.raises(DomiError, match="thread"):
                await asyncio.to_thread(verb)
        assert await a.request(50, b"x") == b"x"
        assert a.subscribers(60) == []
        # The way that the message names works.
        loop = asyncio.get_running_loop()
        got: list[bytes] = []
        a.subscribe(61, lambda ctx: got.append(ctx.data))
        await asyncio.to_thread(loop.call_soon_threadsafe, a.notify, 61, b"posted")
        await until(lambda: got)


async def test_a_closed_node_can_be_forgotten(registry_url: str) -> None:
    """Also when its handlers know it, as handlers mostly do."""
    gone: list[weakref.ref[Any]] = []

    async def use() -> None:
        async with nodes(registry_url, "a", "b") as (a, b):

            async def ask_on(ctx: Context) -> None:
                ctx.reply(await a.request(51, ctx.data))

            a.subscribe(50, ask_on)
            b.subscribe(51, lambda ctx: ctx.reply(b"%d" % b.id))
            await a.wait_subscribed(51, timeout=5)
            assert await a.request(50, b"") == b"%d" % b.id
            gone.extend(weakref.ref(one) for one in (a, b, session(a, b.id), session(b, a.id)))

    await use()
    await asyncio.sleep(0)
    gc.collect()
    gc.collect()
    assert [one() for one in gone] == [None] * 4


async def test_requests_in_flight_when_their_node_closes(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        for node in (a, b):
            node.subscribe(50, [].append)
        await a.wait_subscribed(50, 2, 5)
        requests = [a.request(50, b"", None, to=node.id) for node in (a, b)]
        found = [endings(request) for request in requests]
        await a.close()
        outcomes = await asyncio.gather(*requests, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {PeerLost}
        assert found == [["PeerLost"]] * 2


async def test_peers_shows_the_others(registry_url: str) -> None:
    first = Node("first", registry=registry_url, version="1.2")
    second = Node("second", registry=registry_url, version="v3")
    async with first as a, second as b:
        b.subscribe(50, echo)
        await a.wait_peers(1, 5)
        await a.wait_subscribed(50, timeout=5)
        assert set(a.peers) == {b.id}
        assert a.id not in a.peers
        peer = a.peers[b.id]
        assert (peer.id, peer.name, peer.version, peer.plain) == (b.id, "second", "v3", False)
        assert peer.channels == {50}
        assert peer.queued == 0
        with pytest.raises(TypeError):
            a.peers[7] = peer  # type: ignore[index]
    assert not a.peers


async def test_waiting_for_what_does_not_come(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        with pytest.raises(asyncio.TimeoutError):
            await a.wait_subscribed(50, timeout=0.02)
        with pytest.raises(asyncio.TimeoutError):
            await a.wait_peers(1, 0.02)


async def test_counters(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        b.subscribe(50, echo)
        await a.wait_subscribed(50, timeout=5)
        before = a.counters()
        await asyncio.gather(*(a.request(50, bytes(100)) for _ in range(10)))
        after = a.counters()
        assert after["frames_out"] - before["frames_out"] == 10
        assert after["frames_in"] - before["frames_in"] >= 10
        assert after["bytes_out"] - before["bytes_out"] == 10 * (8 + 100 + 13)
        assert after["in_flight"] == 0
        # What has not happened yet has happened 0 times.
        assert after["ring_full"] == after["handler_errors"] == 0


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_carries_its_facts_wherever_it_goes(kind: type[DomiError]) -> None:
    error: Any = kind("the message", channel=50, peer=7, limit=1.5)
    error.note = "more"
    for one in (
        error,
        copy.copy(error),
        copy.deepcopy(error),
        *(pickle.loads(pickle.dumps(error, level)) for level in range(pickle.HIGHEST_PROTOCOL + 1)),
    ):
        assert type(one) is kind
        assert str(one) == "the message"
        assert vars(one) == {"channel": 50, "peer": 7, "limit": 1.5, "note": "more"}
    bare = kind()
    assert (bare.channel, bare.peer, bare.limit) == (None, None, None)
    assert isinstance(error, DomiError)


def test_a_remote_error_carries_type_and_message() -> None:
    error = RemoteError("ValueError", "no luck", channel=50, peer=7)
    for one in (error, copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (one.type, one.message, one.channel, one.peer) == ("ValueError", "no luck", 50, 7)
        assert str(one) == "ValueError: no luck"
    assert isinstance(error, DomiError)


def test_a_taken_name_carries_its_holder() -> None:
    holder = Holder(7, "a", b"v", 3)
    error = NameTaken("it is taken", holder)
    for one in (error, copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (one.holder, one.peer, str(one)) == (holder, 7, "it is taken")
    assert isinstance(error, DomiError)


def test_the_tree_of_errors() -> None:
    public = {getattr(domi_fast, name) for name in domi_fast.__all__}
    found = {kind for kind in public if isinstance(kind, type) and issubclass(kind, Exception)}
    assert found == {*ERRORS, RemoteError, NameTaken}
    assert issubclass(DeadlineExceeded, TimeoutError)
    assert issubclass(RingFull, Overloaded)
    assert issubclass(ClusterFull, RegistryError)
