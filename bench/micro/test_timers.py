"""Timers that are set and taken back, as every request's deadline is: many in a turn of the loop.

Both sides have the turn: uvloop frees a cancelled timer in it, and ours are told the time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from domi_fast import Node, Serial, TimeWheel

# The deadlines of 256 requests in flight. Of thousands, those that uvloop has yet to free would
# leave the processor's cache.
A_TURN = 256


def nothing() -> None:
    pass


def compare(
    measure: Any, items: int, loop: Any, call_later: Any, turned: Callable[[], object]
) -> None:
    """``call_later(...).cancel()`` beside that of uvloop; ``turned()`` begins a turn of ours."""
    theirs = loop.call_later
    turns = max(1, items // A_TURN)

    async def ours() -> None:
        for _ in range(turns):
            turned()
            for _ in range(A_TURN):
                call_later(5.0, nothing).cancel()
            await asyncio.sleep(0)

    async def anchor() -> None:
        for _ in range(turns):
            for _ in range(A_TURN):
                theirs(5.0, nothing).cancel()
            await asyncio.sleep(0)

    measure(
        lambda: loop.run_until_complete(ours()),
        lambda: loop.run_until_complete(anchor()),
        turns * A_TURN,
    )


def test_wheel_schedule_cancel(measure: Any, items: int, loop: Any) -> None:
    wheel = TimeWheel(start=time.monotonic())
    compare(measure, items, loop, wheel.call_later, lambda: wheel.advance(time.monotonic()))
    assert len(wheel) == 0


@pytest.fixture
def serial(loop: Any) -> Iterator[Serial]:
    node = Node("timers", registry="memory://timers")
    serial = Serial(node)
    for component in (node, serial):
        loop.run_until_complete(component.start())
    yield serial
    for component in (serial, node):
        loop.run_until_complete(component.close())


def test_serial_schedule_cancel(measure: Any, items: int, loop: Any, serial: Serial) -> None:
    """Its own wheel: a timer counts from now, so that each of them looks at the clock."""
    compare(measure, items, loop, serial.call_later, nothing)
    assert len(serial._scheduler.wheel) == 0
