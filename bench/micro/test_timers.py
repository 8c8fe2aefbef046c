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

A_TURN = 200  # what uvloop has to free once a turn stays in the processor's cache


def nothing() -> None:
    pass


def compare(
    measure: Any, items: int, loop: Any, call_later: Any, turned: Callable[[], object]
) -> None:
    """``call_later(...).cancel()`` beside that of uvloop; ``turned()`` begins a turn of ours."""
    theirs = loop.call_later

    async def ours() -> None:
        for _ in range(items // A_TURN):
            turned()
            for _ in range(A_TURN):
                call_later(5.0, nothing).cancel()
            await asyncio.sleep(0)

    async def anchor() -> None:
        for _ in range(items // A_TURN):
            for _ in range(A_TURN):
                theirs(5.0, nothing).cancel()
            await asyncio.sleep(0)

    measure(
        lambda: loop.run_until_complete(ours()), lambda: loop.run_until_complete(anchor()), items
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
