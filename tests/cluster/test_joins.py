"""Joins over three channels, fed by three nodes at different speeds."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Iterator

import pytest

from domi_fast import JoinContext, Node, Serial
from tests.support import forget_records, nodes, until

SLOW_BUILD = any(os.environ.get(f"DOMI_{name}") == "1" for name in ("DEBUG", "SANITIZE"))
MESSAGES = 60_000 if SLOW_BUILD else 1_000_000
CHANNELS = (1201, 1202, 1203)
# How many a node sends before the others have their turn: the fast one is far ahead of the slow.
SPEEDS = (997, 211, 53)


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


async def feed(node: Node, to: int, channel: int, count: int, burst: int) -> None:
    notify = node.notify
    for first in range(0, count, burst):
        for number in range(first, min(first + burst, count)):
            notify(channel, struct.pack("<I", number))
        if node._router.session(to).queued > 1 << 20:
            await node.drained(to)
        await asyncio.sleep(0)


def numbers(joined: JoinContext) -> tuple[int, ...]:
    assert joined.channels == CHANNELS
    return tuple(struct.unpack("<I", context.data)[0] for context in joined.requests)


@pytest.mark.parametrize("thread", [False, True])
async def test_every_join_is_right_and_none_is_missing(registry_url: str, thread: bool) -> None:
    """With room for the skew: the n-th join has the n-th message of each."""
    each = MESSAGES // 3
    async with nodes(registry_url, "joiner", "fast", "middling", "slow") as (joiner, *feeders):
        serial = Serial(joiner, max_pending=each, thread=thread)
        joins = skew = wrong = 0

        def join(joined: JoinContext) -> None:
            nonlocal joins, skew, wrong
            wrong += numbers(joined) != (joins, joins, joins)
            joins += 1
            if joins % 1000 == 0:
                skew = max(skew, serial.waiting)

        serial.subscribe_all(CHANNELS, join)
        async with serial:
            for feeder in feeders:
                await feeder.wait_subscribed(CHANNELS[-1], timeout=5)
            await asyncio.gather(
                *[
                    feed(feeder, joiner.id, channel, each, burst)
                    for feeder, channel, burst in zip(feeders, CHANNELS, SPEEDS, strict=True)
                ]
            )

            def refused() -> int:
                return joiner.counters()["joins_overloaded"] + joiner.counters()["ring_full"]

            await until(lambda: joins == each or refused(), 30)
            assert refused() == 0
            assert joins == each
            assert wrong == 0
            assert skew > 1000
            assert serial.waiting == 0


@pytest.mark.parametrize("thread", [False, True])
async def test_what_a_join_refuses_is_counted_and_the_rest_is_right(
    registry_url: str, thread: bool
) -> None:
    """With less room than the skew: each message is joined, waits, or was refused and counted."""
    each = MESSAGES // 3
    async with nodes(registry_url, "joiner", "fast", "middling", "slow") as (joiner, *feeders):
        serial = Serial(joiner, max_pending=100, thread=thread)
        joins = 0
        last = (-1, -1, -1)
        backwards = 0

        def join(joined: JoinContext) -> None:
            nonlocal joins, last, backwards
            found = numbers(joined)
            backwards += any(now <= before for now, before in zip(found, last, strict=True))
            last = found
            joins += 1

        serial.subscribe_all(CHANNELS, join)
        async with serial:
            for feeder in feeders:
                await feeder.wait_subscribed(CHANNELS[-1], timeout=5)
            await asyncio.gather(
                *[
                    feed(feeder, joiner.id, channel, each, burst)
                    for feeder, channel, burst in zip(feeders, CHANNELS, SPEEDS, strict=True)
                ]
            )

            def accounted() -> int:
                refused = joiner.counters().get("joins_overloaded", 0)
                return 3 * joins + serial.waiting + refused

            await until(lambda: accounted() == 3 * each, 30)
            await asyncio.sleep(0)
            assert accounted() == 3 * each
            assert joiner.counters()["joins_overloaded"] > 0
            assert joiner.counters().get("ring_full", 0) == 0
            assert backwards == 0
            assert joins > 100
            assert serial.waiting <= 2 * 100
