"""The limits of what a node sends: bytes a second, and at once."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from domi_fast import Context, Node, Overloaded, connect
from domi_fast.limiter import RateLimit
from tests.support import echo, nodes

SINK, ECHO = 50, 51
DATA = bytes(992)  # 1,000 with its header


def send_some(node: Node, count: int, to: int | None) -> None:
    for _ in range(count):
        node.notify(SINK, DATA, to=to)


async def send_all(node: Node, count: int, to: int) -> float:
    """Seconds that it takes to send so many, waiting where there is no room."""
    began = time.monotonic()
    while count:
        try:
            node.notify(SINK, DATA, to=to)
            count -= 1
        except Overloaded:  # noqa: PERF203 - that is what is tested
            await node.drained(to)
    return time.monotonic() - began


async def test_a_peer_gets_no_more_than_its_limit(registry_url: str) -> None:
    settings = {"peer_rate_limit": RateLimit(rate=100_000, size=10_000)}
    async with nodes(registry_url, "a", "b", "c", **settings) as (a, b, c):
        for node in (a, b, c):
            node.subscribe(SINK, lambda ctx: None)
        await a.wait_subscribed(SINK, 3, timeout=5)
        # As many at once as the bucket holds.
        for _ in range(10):
            a.notify(SINK, DATA, to=b.id)
        with pytest.raises(Overloaded, match="100000 bytes a second are allowed to node") as caught:
            send_some(a, 10, b.id)
        assert (caught.value.peer, caught.value.limit) == (b.id, 100_000)
        assert a.counters()["refused_rate"] == 1
        # Another peer has a bucket of its own, and the node itself has none.
        a.notify(SINK, DATA, to=c.id)
        for _ in range(100):
            a.notify(SINK, DATA, to=a.id)
        # 40 kB more than the bucket holds, at 100 kB a second.
        assert await send_all(a, 40, b.id) >= 0.38
        # It has been full for a while: what was not used is not saved up beyond that.
        await asyncio.sleep(0.3)
        send_some(a, 10, b.id)
        with pytest.raises(Overloaded):
            send_some(a, 10, b.id)


async def test_a_node_sends_no_more_than_its_limit(registry_url: str) -> None:
    async with nodes(
        registry_url, "a", "b", "c", rate_limit=RateLimit(rate=100_000, size=10_000)
    ) as (a, b, c):
        for node in (b, c):
            node.subscribe(SINK, lambda ctx: None)
        await a.wait_subscribed(SINK, 2, timeout=5)
        for _ in range(10):
            a.notify(SINK, DATA)
        with pytest.raises(Overloaded, match="are allowed for this node"):
            send_some(a, 10, None)
        assert await send_all(a, 20, b.id) + await send_all(a, 20, c.id) >= 0.38


async def test_a_frame_larger_than_the_bucket_is_paid_for_afterwards(registry_url: str) -> None:
    settings = {"peer_rate_limit": RateLimit(rate=100_000, size=1_000)}
    async with nodes(registry_url, "a", "b", **settings) as (a, b):
        b.subscribe(SINK, lambda ctx: None)
        await a.wait_subscribed(SINK, timeout=5)
        began = time.monotonic()
        a.notify(SINK, bytes(30_000))
        with pytest.raises(Overloaded):
            a.notify(SINK, b"")
        await a.drained(b.id)
        assert 0.27 <= time.monotonic() - began < 5.0
        a.notify(SINK, b"")


async def test_answers_are_not_limited(registry_url: str) -> None:
    async with (
        nodes(registry_url, "a", "b") as (a, _),
        Node("c", registry=registry_url, rate_limit=RateLimit(rate=1, size=1)) as limited,
    ):
        limited.subscribe(ECHO, echo)
        await a.wait_subscribed(ECHO, timeout=5)
        for _ in range(20):
            assert await a.request(ECHO, DATA) == DATA


async def test_advice_is_for_who_reads_it(registry_url: str) -> None:
    """`drained` takes an id at a node and none at a guest, and waits for one's own room."""
    limit = RateLimit(rate=1000, size=1)
    async with (
        nodes(registry_url, "b", "c") as (b, c),
        Node("a", registry=registry_url, peer_rate_limit=limit) as a,
    ):
        b.subscribe(SINK, lambda ctx: None)

        def forward(ctx: Context) -> None:
            a.notify(SINK, ctx.data)

        a.subscribe(ECHO, forward)
        await a.wait_subscribed(SINK, timeout=5)
        await c.wait_subscribed(ECHO, timeout=5)
        a.notify(SINK, DATA)
        text = f"1000 bytes a second are allowed to node {b.id}, and as many were sent"
        with pytest.raises(Overloaded) as caught:
            a.notify(SINK, DATA)
        assert str(caught.value) == f"{text}: await node.drained({b.id}) or send less"
        async with await connect(f"tcp://127.0.0.1:{a.port}", queue_limit=64 * 1024) as guest:
            with pytest.raises(Overloaded) as caught:
                await guest.request(SINK, DATA)
            assert str(caught.value) == text
            with pytest.raises(Overloaded, match=r": await drained\(\) or send less$"):
                guest.publish_many(SINK + 9, [DATA] * 50_000)
            await guest.drained()
        # And of what a handler raises, who has asked is told the facts alone.
        with pytest.raises(Overloaded) as caught:
            await c.request(ECHO, DATA)
        assert str(caught.value) == text


@pytest.mark.parametrize(
    "settings",
    [
        (0, 1),
        (1, 0),
        (float("nan"), 1),
        (1, float("inf")),
        (True, 1),
        (1, True),
        ("a", 1),
        (1, None),
    ],
)
def test_what_a_limit_may_be(settings: tuple[Any, Any], registry_url: str) -> None:
    with pytest.raises(ValueError, match=r"^(rate|size) .*: a number from 1 to 1e\+18 is wanted$"):
        RateLimit(*settings)
    for name in ("rate_limit", "peer_rate_limit"):
        with pytest.raises(TypeError, match=name):
            Node("a", registry=registry_url, **{name: settings})
