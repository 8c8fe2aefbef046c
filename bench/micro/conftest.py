"""How long the micro benchmarks run, and where."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvloop

SMOKE = os.environ.get("DOMI_BENCH_SMOKE") == "1"
ROUNDS = 3 if SMOKE else 30
SCALE = 50 if SMOKE else 1

Measure = Callable[..., None]


def pytest_configure() -> None:
    cpu = os.environ.get("DOMI_BENCH_CPU")
    if cpu:
        os.sched_setaffinity(0, {int(cpu)})


@pytest.fixture
def measure(benchmark: Any) -> Measure:
    """``measure(work, anchor, items)``: time ``work()``, which does something ``items`` times, and
    ``anchor()``, which does the same without the library, right before it in each round.

    ``prepare()`` goes before both and is not timed.
    """

    def times(
        work: Callable[[], object],
        anchor: Callable[[], object],
        items: int,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        taken = []

        def anchors_turn() -> None:
            prepare()
            began = time.perf_counter()
            anchor()
            taken.append(time.perf_counter() - began)

        warm_up = 1 if SMOKE else 3
        benchmark.pedantic(work, setup=anchors_turn, rounds=ROUNDS, warmup_rounds=warm_up)
        benchmark.extra_info.update(items=items, anchor=taken[-ROUNDS:])

    return times


@pytest.fixture
def items() -> int:
    """How often a round does what is measured, so that a round takes milliseconds."""
    return 20_000 // SCALE


@pytest.fixture
def loop() -> Iterator[Any]:
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    yield loop
    asyncio.set_event_loop(None)
    loop.close()
