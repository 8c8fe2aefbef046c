"""The circuit breaker of a peer: what opens it, what it does meanwhile, and what closes it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from domi_fast import (
    CircuitOpen,
    Context,
    DeadlineExceeded,
    DomiError,
    Frame,
    Node,
    RemoteError,
    connect,
)
from domi_fast.breaker import Breaker
from tests.support import echo, forget_records, link, nodes, until

WORK, OTHER = 50, 51


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Any:
    yield
    forget_records(caplog)


async def fail(node: Node, to: int, times: int) -> None:
    """Requests that get no answer in time."""
    asked = [node.request(WORK, b"", timeout=0.01, to=to) for _ in range(times)]
    for outcome in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(outcome, DeadlineExceeded)


async def test_failures_open_a_circuit_and_a_pong_closes_it(registry_url: str) -> None:
    settings = {"breaker": Breaker(failures=3, window=10.0, pause=0.2)}
    async with nodes(registry_url, "a", "b", "c", **settings) as (a, b, c):
        held: list[Context] = []
        kept: list[Context] = []
        b.subscribe(WORK, held.append)
        c.subscribe(WORK, lambda ctx: ctx.reply(b"c"))
        b.subscribe(OTHER, kept.append)
        await a.wait_subscribed(WORK, 2, timeout=5)
        under_way = a.request(OTHER, b"", to=b.id)
        await fail(a, b.id, 2)
        assert a.peers[b.id].circuit == "closed"
        await fail(a, b.id, 1)
        opened = time.monotonic()
        assert a.peers[b.id].circuit == "open"
        assert a.counters()["circuits_opened"] == 1
        # The others are not touched, and what nobody else has is refused.
        assert a.peers[c.id].circuit == "closed"
        assert [await a.request(WORK, b"x") for _ in range(4)] == [b"c"] * 4
        with pytest.raises(CircuitOpen, match=f"node {b.id} has left too many") as caught:
            a.notify(WORK, b"x", to=b.id)
        assert (caught.value.channel, caught.value.peer) == (WORK, b.id)
        with pytest.raises(CircuitOpen):
            a.request(OTHER, b"")
        # What is on its way is answered as ever.
        await until(lambda: kept)
        kept.pop().reply(b"late")
        assert await under_way == b"late"
        await until(lambda: a.peers[b.id].circuit == "closed")
        assert time.monotonic() - opened >= 0.19
        assert a.counters()["circuits_closed"] == 1
        assert b.id in a.subscribers(WORK)
        a.notify(WORK, b"again", to=b.id)
        await until(lambda: held[-1].data == b"again")
        held.clear()


async def test_it_is_half_open_until_a_pong_comes(registry_url: str) -> None:
    """The peer does not read what it is sent."""
    settings = {"breaker": Breaker(failures=1, window=10.0, pause=0.05)}
    async with nodes(registry_url, "a", "b", **settings) as (a, b):
        held: list[Context] = []
        b.subscribe(WORK, held.append)
        await a.wait_subscribed(WORK, timeout=5)
        theirs = link(a, b)[1]
        loop = asyncio.get_running_loop()
        loop.remove_reader(theirs.descriptor)  # b is deaf: nothing it is sent arrives
        asked = a.request(WORK, b"", timeout=0.01)
        with pytest.raises(DeadlineExceeded):
            await asked
        assert a.peers[b.id].circuit == "open"
        await until(lambda: a.peers[b.id].circuit == "half-open")
        await asyncio.sleep(0.12)  # several pings, and no pong
        assert a.peers[b.id].circuit == "half-open"
        loop.add_reader(theirs.descriptor, theirs.readable)
        await until(lambda: a.peers[b.id].circuit == "closed")
        held.clear()


async def test_a_guest_hears_that_a_circuit_is_open(registry_url: str) -> None:
    """As its node does: by the same error, which says of whom."""
    settings = {"breaker": Breaker(failures=1, window=10.0, pause=30.0)}
    heard: list[tuple[DomiError, Frame]] = []
    async with nodes(registry_url, "a", "b", **settings) as (a, b):
        held: list[Context] = []
        b.subscribe(WORK, held.append)
        await a.wait_subscribed(WORK, timeout=5)
        await fail(a, b.id, 1)
        with pytest.raises(CircuitOpen) as at_the_node:
            a.request(WORK, b"")
        async with await connect(
            f"tcp://127.0.0.1:{a.port}", on_error=lambda error, frame: heard.append((error, frame))
        ) as guest:
            for to in (None, b.id):
                with pytest.raises(CircuitOpen) as caught:
                    await guest.request(WORK, b"", to=to)
                assert str(caught.value) == str(at_the_node.value)
                assert (caught.value.channel, caught.value.peer) == (WORK, b.id)
            guest.notify(WORK, b"x")
            await until(lambda: heard)
            [(error, frame)] = heard
            # A refusal of what is no request has no place for whose circuit it is.
            assert isinstance(error, CircuitOpen)
            assert (error.channel, error.peer) == (WORK, None)
            assert frame == Frame(WORK, b"x", b"")
        held.clear()


async def test_failures_that_are_older_than_the_window_do_not_count(registry_url: str) -> None:
    settings = {"breaker": Breaker(failures=2, window=0.1, pause=5.0)}
    async with nodes(registry_url, "a", "b", **settings) as (a, b):
        held: list[Context] = []
        b.subscribe(WORK, held.append)
        await a.wait_subscribed(WORK, timeout=5)
        for _ in range(3):
            await fail(a, b.id, 1)
            assert a.peers[b.id].circuit == "closed"
            await asyncio.sleep(0.11)
        await fail(a, b.id, 2)
        assert a.peers[b.id].circuit == "open"
        held.clear()


async def test_what_is_no_failure(registry_url: str) -> None:
    """An answer that is an error, a request that was given up, and what a node asks of itself."""
    settings = {"breaker": Breaker(failures=1)}
    async with nodes(registry_url, "a", "b", **settings) as (a, b):

        def raises(ctx: Context) -> None:
            raise LookupError("inside")

        held: list[Context] = []
        b.subscribe(WORK, raises)
        b.subscribe(OTHER, held.append)
        a.subscribe(WORK + 9, held.append)
        await a.wait_subscribed(OTHER, timeout=5)
        with pytest.raises(RemoteError):
            await a.request(WORK, b"")
        given_up = a.request(OTHER, b"")
        given_up.cancel()
        with pytest.raises(DeadlineExceeded):
            await a.request(WORK + 9, b"", timeout=0.01)
        assert a.peers[b.id].circuit == "closed"
        held.clear()


async def test_the_defaults_are_the_originals_and_it_may_be_switched_off(registry_url: str) -> None:
    assert Breaker() == Breaker(failures=20, window=10.0, pause=2.0)
    async with (
        Node("a", registry=registry_url) as a,
        Node("b", registry=registry_url, breaker=None) as b,
    ):
        held: list[Context] = []
        a.subscribe(WORK, held.append)
        b.subscribe(WORK, held.append)
        await a.wait_subscribed(WORK, 2, timeout=5)
        await b.wait_subscribed(WORK, 2, timeout=5)
        await fail(a, b.id, 19)
        assert a.peers[b.id].circuit == "closed"
        await fail(a, b.id, 1)
        assert a.peers[b.id].circuit == "open"
        await fail(b, a.id, 30)
        assert b.peers[a.id].circuit == "closed"
        held.clear()


async def test_a_new_session_has_a_new_circuit(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", breaker=Breaker(failures=1, pause=30.0)) as (a, b):
        held: list[Context] = []
        b.subscribe(WORK, held.append)
        b.subscribe(OTHER, echo)
        await a.wait_subscribed(OTHER, timeout=5)
        await fail(a, b.id, 1)
        assert a.peers[b.id].circuit == "open"
        link(a, b)[0].close("for the test")
        await a.wait_peers(0, 5)
        await a.wait_subscribed(OTHER, timeout=5)
        assert a.peers[b.id].circuit == "closed"
        assert await a.request(OTHER, b"x") == b"x"
        held.clear()


@pytest.mark.parametrize(
    "settings",
    [
        {"failures": 0},
        {"failures": 10_001},
        {"failures": 1.5},
        {"failures": True},
        {"failures": "3"},
        {"window": 0},
        {"window": True},
        {"pause": float("nan")},
        {"pause": "x"},
        {"pause": None},
    ],
)
def test_what_a_breaker_may_be_set_to(settings: dict[str, Any], registry_url: str) -> None:
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=f"^{name} {value!r}: an? .* is wanted$"):
        Breaker(**settings)
    with pytest.raises(TypeError, match="breaker"):
        Node("a", registry=registry_url, breaker=settings)
