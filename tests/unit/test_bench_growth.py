"""The benchmarks of growth: how figures are made of what each size costs, and nodes shared out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.growth_suite import SPARE_FILES, Cost, grown, idle_shares, shares
from bench.processor import stay
from bench.settings import Skip


def test_each_judged_size_stands_beside_the_smallest_with_the_whole_curve() -> None:
    asked: list[int] = []

    def cost(size: int) -> dict[str, Cost]:
        asked.append(size)
        return {"trip": size * 1e-6, "call": 1e-7}

    figures = grown(
        "growth",
        {"trip": "A round trip", "call": "A call"},
        (2, 4, 8),
        cost,
        2,
        judged={20: 4, 200: 8},
        of="nodes",
    )
    # The other way round in the second round, so that none always has the warmer machine.
    assert asked == [2, 4, 8, 8, 4, 2]
    # They are named after the sizes of a whole run.
    names = [figure.name for figure in figures]
    assert names == [f"growth-{work}-{size}" for work in ("trip", "call") for size in (20, 200)]
    assert figures[1].title == "A round trip, 8 nodes"
    ratios = [figure.ratios for figure in figures]
    assert ratios == [pytest.approx([2, 2]), pytest.approx([4, 4]), [1, 1], [1, 1]]
    curve = figures[1].detail["curve"]
    assert curve["x"] == [2, 4, 8]
    assert curve["y"] == pytest.approx([2e-6, 4e-6, 8e-6])
    assert curve["x_title"] == "nodes"
    assert curve["y_title"] == "A round trip, s"


def test_a_point_of_the_curve_is_the_median_over_the_rounds() -> None:
    costs = iter([1.0, 10.0, 20.0, 3.0, 2.0, 70.0])
    (figure,) = grown(
        "growth", {"x": "X"}, (1, 2), lambda _: {"x": next(costs)}, 3, judged={2: 2}, of="of"
    )
    # Rounds of (1, 10), then by turns (3, 20), then (2, 70).
    assert figure.anchor_values == [1.0, 3.0, 2.0]
    assert figure.values == [10.0, 20.0, 70.0]
    assert figure.detail["curve"]["y"] == [2.0, 20.0]


def test_round_trips_have_their_percentiles_beside_those_of_the_smallest() -> None:
    def cost(size: int) -> dict[str, Cost]:
        taken = {"p50_ns": 1000 * size, "p99_ns": 2000 * size, "p999_ns": 3000 * size}
        return {"trip": {"count": 1000, **taken}}

    (figure,) = grown("growth", {"trip": "X"}, (1, 3), cost, 1, judged={3: 3}, of="of")
    ours = [rounds[0] for rounds in figure.columns.values()]
    smallest = [rounds[0] for rounds in figure.anchor_columns.values()]
    assert (ours, smallest) == (
        pytest.approx([3e-6, 6e-6, 9e-6]),
        pytest.approx([1e-6, 2e-6, 3e-6]),
    )
    # The p50 is what is compared.
    assert figure.ratios == pytest.approx([3.0])
    assert figure.detail["curve"]["y"] == pytest.approx([1e-6, 3e-6])


class Idling:
    """In the place of a worker: how much processor time it has had, each time that it is asked."""

    def __init__(self, *had: float) -> None:
        self._had = iter(had)

    def ask(self, do: str) -> dict[str, float]:
        assert do == "counters"
        return {"cpu_s": next(self._had)}


def test_each_part_of_an_idle_time_has_its_share() -> None:
    had = [0.0, 0.001, 0.001, 0.003, 0.003, 0.003, 0.003, 0.004, 0.004, 0.005]
    server: Any = Idling(*had)
    (found,) = idle_shares({1: server}, 0.1).values()
    longest = 0.02 * 5
    assert len(found) == 5
    assert found[2] == 0.0
    assert 0.001 / longest < found[0] <= 0.05
    assert 0.002 / longest < found[1] <= 0.1


@pytest.mark.parametrize("files", [1024, 4096, 20_000, 1 << 20])
@pytest.mark.parametrize(("count", "peers"), [(1, 2), (18, 20), (198, 200)])
def test_nodes_are_shared_out_so_that_their_sessions_can_be_open(
    count: int, peers: int, files: int
) -> None:
    found = shares(count, peers, files)
    assert sum(found) == count
    assert all(share * peers < files - SPARE_FILES for share in found)
    assert max(found) - min(found) <= 1


def test_a_process_that_has_too_few_files_for_one_node_is_left_alone() -> None:
    with pytest.raises(Skip, match="808 files"):
        shares(198, 200, 700)


def test_where_files_are_plenty_one_process_has_all_nodes() -> None:
    assert shares(198, 200, 1 << 20) == [198]


def test_a_process_stays_on_a_processor_with_all_its_threads() -> None:
    program = (
        "import threading\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "print(flush=True)\n"
        "input()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    cpu = max(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", program], text=True, **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()
        stay(process.pid, cpu)
        threads = [int(path.name) for path in Path(f"/proc/{process.pid}/task").iterdir()]
        assert len(threads) == 2
        assert [os.sched_getaffinity(thread) for thread in threads] == [{cpu}, {cpu}]
        process.communicate("\n")
