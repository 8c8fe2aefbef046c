"""The pictures of a run of the benchmarks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.figures import Figure, Target
from bench.page import END, START, write_docs
from bench.plots import FARTHEST, MET, MISSED, OURS, UNJUDGED, Panels, Plot, Rows, plots_of
from tests.measured import (
    COSTS_NOTHING,
    FASTER,
    FIGURES,
    FLOODED,
    LARGE,
    LOST,
    MEMORY,
    PICTURES,
    PUBLISHED,
    SLOWER,
    empty_page,
    run,
    text_of,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return empty_page(tmp_path)


@pytest.mark.picture
def test_the_pictures_say_what_they_show(page: Path) -> None:
    write_docs(run([*FIGURES, LOST]), page)
    texts = {path.name: text_of(path) for path in (page.parent / "benchmarks").iterdir()}
    assert set(texts) == PICTURES
    for plot in plots_of([*FIGURES, LOST]):
        assert plot.title in texts[f"{plot.name}.svg"]
    for figure in (FASTER, SLOWER, FLOODED, COSTS_NOTHING):
        assert figure.title in texts["targets.svg"]
    for figure, picture in (
        (FASTER, "anchors-latency.svg"),
        (SLOWER, "peers-rates.svg"),
        (MEMORY, "peers-memory.svg"),
        (LARGE, "anchors-bytes.svg"),
    ):
        assert figure.title in texts[picture]
        assert figure.anchor in texts[picture]
    assert "0.67×, not decided" in texts["peers-rates.svg"]
    assert "0.40×, the other wins" in texts["peers-rates.svg"]
    assert "the other wins" not in texts["anchors-latency.svg"]
    assert "Time of a message" in texts["growth.svg"]


@pytest.mark.picture
def test_the_same_run_is_drawn_with_the_same_bytes(tmp_path: Path) -> None:
    """By another process, at another time, whose hashes of strings are others."""
    source = tmp_path / "run.json"
    report.save(run(FIGURES), source)
    program = (
        "import pathlib, sys; from bench import page, report\n"
        "page.write_docs(report.read(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]))"
    )
    drawn: list[dict[str, bytes]] = []
    for name in ("once", "again"):
        path = tmp_path / name / "benchmarks.md"
        path.parent.mkdir()
        path.write_text(f"{START}{END}")
        done = subprocess.run(
            [sys.executable, "-c", program, source, path],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": str(len(drawn) + 1)},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        folder = path.with_suffix("")
        drawn.append({each.name: each.read_bytes() for each in folder.iterdir()})
        drawn[-1]["page"] = path.read_bytes()
    assert set(drawn[0]) == PICTURES | {"page"}
    assert drawn[0] == drawn[1]


def test_a_plot_without_figures_is_left_out() -> None:
    assert plots_of([]) == []
    assert [plot.name for plot in plots_of(PUBLISHED)] == ["publish"]
    assert [plot.name for plot in plots_of([LARGE])] == ["anchors-bytes"]


def plot_named(name: str, figures: list[Figure]) -> Plot:
    (found,) = [plot for plot in plots_of(figures) if plot.name == name]
    return found


def test_right_of_one_is_met_whichever_way_the_target_goes() -> None:
    plot = plot_named("targets", FIGURES)
    assert isinstance(plot, Rows)
    rows = {row.label: (row.kind, row.marks[0], row.note) for row in plot.rows}
    kind, mark, note = rows[FASTER.title]
    assert (kind, note) == (MET, "0.90×, wanted ≤ 1.5×")
    assert mark.middle == pytest.approx(1.5 / 0.9)
    kind, mark, note = rows[SLOWER.title]
    assert (kind, note) == (MISSED, "2.00 M/s, wanted ≥ 3.00 M/s")
    assert mark.middle == pytest.approx(2 / 3)
    assert sorted(mark.rounds) == pytest.approx([1 / 3, 2 / 3, 4 / 3])
    kind, mark, note = rows[FLOODED.title]
    assert (kind, note) == (UNJUDGED, "3.00×, wanted ≤ 3×, void")
    # What costs nothing, or less, is as far from its target as the axis goes.
    kind, mark, _ = rows[COSTS_NOTHING.title]
    assert (kind, mark.middle) == (MET, FARTHEST)
    assert plot.alt == f"Of 4 targets: 2 met, 1 missed, 1 not judged; missed: {SLOWER.title}."


def test_publications_are_drawn_over_the_number_of_subscribers() -> None:
    def beside(peer: str, values: list[float]) -> Figure:
        return Figure(
            f"publish-10-vs-{peer}",
            "publish to 10",
            "/s",
            values=[5e6, 6e6],
            anchor=peer,
            anchor_values=values,
        )

    others = [beside("nats-py", [1e6, 1e6]), beside("pyzmq", [2e6, 3e6])]
    plot = plot_named("publish", [*PUBLISHED, *others])
    assert isinstance(plot, Panels)
    (panel,) = plot.panels
    assert {line.label: dict(line.points) for line in panel.lines} == {
        OURS: {1: [1e6, 1e6], 10: [4e6, 4e6, 5e6, 6e6], 100: [2e6, 2e6]},
        "nats-py": {10: [1e6, 1e6]},
        "pyzmq": {10: [2e6, 3e6]},
    }


def test_ours_stands_once_above_those_it_was_measured_with() -> None:
    """And again where that was another time."""

    def beside(peer: str, values: list[float]) -> Figure:
        title = f"calls, beside {peer}"
        return Figure(
            f"calls-vs-{peer}", title, "/s", values=values, anchor=peer, anchor_values=[1e6, 2e6]
        )

    figures = [beside("a", [3e6, 4e6]), beside("b", [3e6, 4e6]), beside("c", [5e6, 6e6])]
    plot = plot_named("peers-rates", figures)
    assert isinstance(plot, Rows)
    assert [row.label for row in plot.rows] == ["calls", OURS, "a", "b", OURS, "c"]


def test_figures_of_several_sizes_may_have_one_curve() -> None:
    def curve(title: str, y: list[float]) -> dict[str, Any]:
        return {"curve": {"x": [2, 200], "y": y, "x_title": "nodes", "y_title": title}}

    flat = Target("ratio", 1.2, at_most=True)
    times = [
        Figure(
            f"growth-{size}",
            f"a message, {size}",
            "s",
            values=[1e-6],
            anchor="2",
            anchor_values=[1e-6],
            anchor_is_ours=True,
            target=flat,
            detail=curve("A message, s", [1e-6, 1.1e-6]),
        )
        for size in (20, 200)
    ]
    other = Figure("others", "others", "s", values=[1.0], detail=curve("errors", [0.0, 3.0]))
    plot = plot_named("growth", [*times, other])
    assert isinstance(plot, Panels)
    message, errors = plot.panels
    assert (message.title, message.unit, message.limit) == ("A message", "s", 1.2e-6)
    assert [line.points for line in message.lines] == [[(2, [1e-6]), (200, [1.1e-6])]]
    assert (errors.title, errors.unit, errors.limit) == ("errors", "", None)
    assert plot.alt == (
        "How cost grows. A message over nodes: 1.00 µs at 2, 1.10 µs at 200. "
        "errors over nodes: 0 at 2, 3 at 200."
    )
