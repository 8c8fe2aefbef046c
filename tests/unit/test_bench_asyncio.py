"""The benchmarks on asyncio's own loop: what is measured on which loop goes where."""

from __future__ import annotations

import pytest

from bench.asyncio_suite import add, check_loop
from bench.child import BenchError
from bench.figures import Figure


def test_a_round_on_uvloop_is_the_anchor_of_one_on_asyncio() -> None:
    trips, rates = Figure("trips", "Trips", "s"), Figure("rates", "Rates", "/s")
    for loop, microseconds in (("uvloop", 10), ("asyncio", 12)):
        taken = {
            of: times * microseconds * 1000
            for of, times in (("p50_ns", 1), ("p99_ns", 2), ("p999_ns", 3))
        }
        add(trips, loop, {"count": 1000, **taken})
        add(rates, loop, {"rate": 1e6 / microseconds})
    assert trips.ratios == pytest.approx([1.2])
    assert (trips.p99, trips.p999) == (pytest.approx([24e-6]), pytest.approx([36e-6]))
    assert (trips.anchor_p99, trips.anchor_p999) == (pytest.approx([20e-6]), pytest.approx([30e-6]))
    assert rates.ratios == pytest.approx([10 / 12])


def test_a_client_on_another_loop_breaks_the_benchmark() -> None:
    check_loop({"loop": "asyncio"}, "asyncio")
    with pytest.raises(BenchError, match="ran on uvloop, not on asyncio"):
        check_loop({"loop": "uvloop"}, "asyncio")
