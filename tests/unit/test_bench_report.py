"""The page that a run of the benchmarks is written into: its tables, its findings, its pictures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import report, scaling, summary
from bench.figures import Figure, Target
from bench.findings import noise, undecided, where_others_win
from bench.page import END, START, write_docs
from bench.plots import FARTHEST, MET, MISSED, OURS, UNJUDGED, Panels, Plot, Rows, plots_of
from bench.report import Report
from bench.suite import BENCHMARKS, ONE, SEVERAL, SINGLE

ROOT = Path(__file__).resolve().parents[2]
FASTER = Figure(
    "round-trip",
    "Awaited request, faster than the echo",
    "s",
    values=[8e-6, 9e-6, 10e-6],
    p99=[30e-6, 30e-6, 31e-6],
    p999=[60e-6, 70e-6, 80e-6],
    anchor="C epoll echo",
    anchor_values=[10e-6, 10e-6, 10e-6],
    anchor_p99=[20e-6, 20e-6, 25e-6],
    anchor_p999=[90e-6, 90e-6, 90e-6],
    target=Target("ratio", 1.5, at_most=True),
    level=SEVERAL,
)
SLOWER = Figure(
    "calls-vs-pyzmq",
    "call + reply, slower than the other library",
    "/s",
    values=[1e6, 2e6, 4e6],
    anchor="pyzmq",
    anchor_values=[3e6, 3e6, 3e6],
    target=Target("value", 3e6, at_most=False),
    level=SEVERAL,
)
LOST = replace(
    SLOWER, name="calls-vs-nats", anchor="nats-py", anchor_values=[5e6, 5e6, 5e6], target=None
)
FLOODED = Figure(
    "flood",
    "p99 beside a flood",
    "s",
    by="p99",
    values=[50e-6, 60e-6, 50e-6],
    p99=[300e-6, 320e-6, 300e-6],
    p999=[600e-6, 600e-6, 900e-6],
    anchor="without the flood",
    anchor_values=[50e-6, 50e-6, 50e-6],
    anchor_p99=[100e-6, 100e-6, 100e-6],
    anchor_p999=[150e-6, 150e-6, 150e-6],
    anchor_is_ours=True,
    target=Target("ratio", 3.0, at_most=True),
    void="the server had nothing to do",
    level=ONE,
    remark="1.00 M/s (idle), the server's core 10% busy",
)
COSTS_NOTHING = Figure(
    "breaker-cost",
    "what a circuit breaker adds",
    "s",
    values=[-1e-9, 0.0, 1e-9],
    target=Target("value", 20e-9, at_most=True),
    level=ONE,
)
LARGE = Figure(
    "notify-1MiB",
    "notify of 1 MiB",
    "B/s",
    values=[2e9, 2.1e9, 2.2e9],
    anchor="blocking sockets",
    anchor_values=[2e9, 2e9, 2e9],
    level=SEVERAL,
)
MEMORY = Figure(
    "idle-vs-grpc",
    "Resident memory of an idle session",
    "B",
    values=[2300.0, 2310.0, 2320.0],
    anchor="grpc.aio",
    anchor_values=[70e3, 71e3, 72e3],
    level=SEVERAL,
)
PUBLISHED = [
    Figure(f"publish-{count}", f"publish to {count}", "/s", values=[rate, rate], level=SEVERAL)
    for count, rate in ((1, 1e6), (10, 4e6), (100, 2e6))
]
GROWN = Figure(
    "growth-nodes",
    "request between two of many nodes",
    "s",
    values=[1e-6, 1e-6],
    level=SINGLE,
    detail={
        "curve": {
            "x": [2, 20, 200],
            "y": [1.0e-6, 1.1e-6, 1.05e-6],
            "x_title": "nodes",
            "y_title": "Time of a message, s",
        }
    },
)
FIGURES = [FASTER, SLOWER, FLOODED, COSTS_NOTHING, LARGE, MEMORY, *PUBLISHED, GROWN]
PICTURES = {
    "anchors-bytes.svg",
    "anchors-latency.svg",
    "growth.svg",
    "peers-memory.svg",
    "peers-rates.svg",
    "publish.svg",
    "targets.svg",
}


def run(figures: list[Figure], **circumstances: Any) -> Report:
    names = (
        *("cpu", "cpus_usable", "memory_mib", "system", "kernel", "architecture", "compiler"),
        *("implementation", "python", "domi_fast", "uvloop", "cython", "dirty"),
    )
    about = {
        "when": "2026-01-02 03:04 UTC",
        "benchmarks": [each.name for each in BENCHMARKS],
        "rounds": 3,
        "smoke": False,
        "cpus": [0, 1],
        "load_before": 0.25,
        "seconds": 754.3,
        "stolen": 0.0123,
        **circumstances,
    }
    machine = {**dict.fromkeys(names, "it"), "commit": "0123456789abcdef"}
    return Report(machine, about, figures)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "benchmarks.md"
    path.write_text(f"# Before\n\n{START}\n\nan older run\n\n{END}\n\nafter\n")
    return path


def text_of(picture: Path) -> str:
    """What is written in it; a label of several lines is read as one."""
    return " ".join(" ".join(ET.parse(picture).getroot().itertext()).split())


# --------------------------------------------------------------------------------------- the page


@pytest.mark.picture
def test_the_page_is_written_between_its_markers(page: Path) -> None:
    found = run(FIGURES)
    found.left_out["nats-py"] = "it is not there"
    written = write_docs(found, page)
    text = page.read_text()
    assert text.startswith(f"# Before\n\n{START}\n")
    assert text.endswith(f"\n{END}\n\nafter\n")
    assert "an older run" not in text
    for said in ("commit 0123456789ab, with changes", "2026-01-02", "12.6 minutes in all"):
        assert said in text
    shown = dict(re.findall(r"^!\[(.+)\]\(benchmarks/(.+)\)$", text, re.MULTILINE))
    assert set(shown.values()) == PICTURES
    assert [path.name for path in written[1:]] == list(shown.values())
    headings = re.findall(r"^#{3,} (.+)$", text, re.MULTILINE)
    assert headings == [
        *("Where others win", "What the run does not decide", "How noisy it was", "All figures"),
        *(SEVERAL, ONE, SINGLE),
    ]
    for figure in FIGURES:
        assert f"\n| {figure.title} | {figure.measured()} |" in text
    assert "`flood` is void: the server had nothing to do." in text
    assert "`flood`: 1.00 M/s (idle), the server's core 10% busy." in text
    assert "\nnats-py was left out: it is not there.\n" in text


@pytest.mark.picture
def test_a_second_run_leaves_nothing_of_the_first(page: Path) -> None:
    write_docs(run(FIGURES), page)
    assert "### Peer by peer" not in page.read_text()
    write_docs(run([replace(MEMORY, name="idle-connection-vs-grpc")]), page)
    assert "\n### Peer by peer\n" in page.read_text()
    write_docs(run([FASTER, FLOODED]), page)
    folder = page.parent / "benchmarks"
    assert {path.name for path in folder.iterdir()} == {"targets.svg", "anchors-latency.svg"}
    assert SLOWER.title not in page.read_text()


@pytest.mark.picture
def test_a_page_without_markers_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"{START} and no end")
    with pytest.raises(ValueError, match=f"has no {START} and {END}"):
        write_docs(run(FIGURES), path)
    assert [each.name for each in tmp_path.iterdir()] == ["page.md"]
    assert path.read_text() == f"{START} and no end"


def test_the_readme_has_the_figures_that_the_run_has() -> None:
    ours = replace(LARGE, name="notify-1MiB", anchor="C send and recv")
    beside = replace(LARGE, name="notify-1MiB-vs-pyzmq", anchor="pyzmq", anchor_values=[1e9] * 3)
    calls = replace(SLOWER, name="call-reply", anchor="", anchor_values=[])
    assert summary.rows(run([ours, beside, calls, FLOODED])) == [
        ("A call and its reply, by handlers in Python", "2.00 M/s", ""),
        (
            "1 MiB one way",
            "2.10 GB/s",
            "1.05× the rate of C send and recv, 2.10× the rate of pyzmq",
        ),
    ]


# -------------------------------------------------------------------------------------- a figure


def round_of(count: int, **nanoseconds: int) -> dict[str, Any]:
    return {"count": count, **{f"{of}_ns": taken for of, taken in nanoseconds.items()}}


def test_a_figure_by_its_p99_is_compared_and_judged_by_that() -> None:
    figure = Figure("f", "f", "s", by="p99", anchor="other", target=Target("ratio", 2.0, True))
    for p99 in (3000, 9000, 4000):
        figure.add_percentiles(round_of(1000, p50=1000, p99=p99, p999=9500))
        figure.add_anchor_percentiles(round_of(1000, p50=1000, p99=2000, p999=2500))
    assert figure.ratios == pytest.approx([1.5, 4.5, 2.0])
    assert figure.is_met
    assert figure.measured() == "1.00 µs / 4.00 µs / 9.50 µs"
    assert figure.anchored() == "other: 1.00 µs / 2.00 µs / 2.50 µs"
    assert (figure.spread(), figure.ratio()) == ("3.00–4.00–9.00 µs", "2.00× (1.50–4.50)")


def test_a_tail_is_what_the_p99_is_to_the_p50_of_its_round() -> None:
    figure = Figure("f", "f", "s", by="p99", target=Target("tail", 3.0, at_most=True))
    for p50, p99 in ((1000, 2000), (2000, 9000), (1000, 2500)):
        figure.add_percentiles(round_of(1000, p50=p50, p99=p99, p999=9500))
    assert figure.is_met
    assert (figure.ratio(), figure.wanted()) == ("2.50× (2.00–4.50)", "≤ 3× the p50")
    assert (figure.ratios, figure.anchored()) == ([], "")


def test_of_few_measurements_there_is_no_p999() -> None:
    figure = Figure("f", "f", "s")
    figure.add_percentiles(round_of(999, p50=1000, p99=2000, p999=3000))
    assert figure.measured() == "1.00 µs / 2.00 µs"
    figure.add_percentiles(round_of(1000, p50=1000, p99=2000, p999=3000))
    assert figure.measured() == "1.00 µs / 2.00 µs / 3.00 µs"


# ------------------------------------------------------------------------------------ the pictures


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


# ------------------------------------------------------------------------------------ the findings


def test_who_wins_is_named() -> None:
    lines = where_others_win([*FIGURES, LOST])
    assert lines[0].startswith("5 figures stand beside the work of others. ")
    assert lines[0].endswith(" in every round: 1:")
    listed = [line for line in lines if line.startswith("- ")]
    assert listed == [
        f"- {LOST.title}: 0.40× (0.20–0.80) the rate of nats-py.",
        f"- {FASTER.title}: p99 30.0 µs, C epoll echo 20.0 µs.",
    ]
    won = where_others_win([LARGE, MEMORY])
    assert won[0].endswith(" in every round: 0.")
    assert not any(line.startswith("- ") for line in won)
    assert where_others_win([FLOODED]) == [
        "Nothing that others have made was measured in this run."
    ]


def test_what_differs_from_round_to_round_is_won_by_nobody() -> None:
    better = replace(SLOWER, values=[2e6, 4e6, 8e6])
    ours = replace(SLOWER, anchor_is_ours=True)
    first, *listed = undecided([*FIGURES, LOST, better, ours])
    assert first.endswith(" and not in others: 2, of which 1 are worse by the median:")
    assert listed == [
        "",
        f"- {SLOWER.title}: 0.67× (0.33–1.33) the rate of pyzmq.",
        f"- {SLOWER.title}: 1.33× (0.67–2.67) the rate of pyzmq.",
    ]
    for figure in (SLOWER, better):
        assert not any(figure.title in line for line in where_others_win([figure]))
    # As good as the other in a round is not worse.
    assert min(LARGE.ratios) == 1.0
    (line,) = undecided([LOST, LARGE, MEMORY, FLOODED])
    assert line.endswith(": 0.")


def test_the_widest_spreads_are_named() -> None:
    lines = noise(FIGURES, load=0.25, stolen=0.0123)
    assert "before the run was 0.25, and the host kept 1.2% of the processors' time." in lines[0]
    listed = [line for line in lines if line.startswith("- ")]
    assert len(listed) == 5
    assert listed[0] == f"- {COSTS_NOTHING.title}: -1.00–0.00–1.00 ns, about a median of nothing."
    assert listed[1] == f"- {SLOWER.title}: 1.00–2.00–4.00 M/s, 150%."
    twice = [replace(SLOWER, title=f"{SLOWER.title}, beside {name}", anchor=name) for name in "ab"]
    assert [line for line in noise(twice, load=0.0, stolen=None) if line.startswith("- ")] == [
        listed[1]
    ]
    single = Figure("once", "once", "s", values=[1.0])
    (line,) = noise([single], load=0.0, stolen=None)
    assert line.startswith("The load average before the run was 0.00. There was one round of each")


# ------------------------------------------------------------------------------------- the command


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whether anything was measured: the names of what was."""
    names: list[str] = []

    def measure(benchmarks: Any, settings: Any) -> Report:
        names.extend(each.name for each in benchmarks)
        return run([])

    monkeypatch.setattr(command, "measure", measure)
    return names


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    return command.main()


def test_without_matplotlib_nothing_is_measured_for_the_docs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], measured: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "--write-docs")
    assert ended.value.code == 2
    assert "matplotlib, which is not installed: pip install matplotlib" in capsys.readouterr().err
    assert measured == []


@pytest.mark.parametrize(
    ("figures", "skipped", "circumstances", "said"),
    [
        ([], {}, {}, [f"target not measured: {FASTER.name}"]),
        ([], {}, {"benchmarks": ["flood"]}, []),
        ([FLOODED], {}, {"benchmarks": ["flood"]}, [f"target missed: {FLOODED.title}"]),
        ([], {}, {"smoke": True}, []),
        ([FASTER], {}, {}, []),
        ([FASTER], {}, {"seconds": 901.0, "rounds": 15}, []),
        ([FASTER], {}, {"seconds": 901.0}, ["too slow: 901 s, 900 s at most"]),
        ([FASTER], {"stopped": "no root"}, {}, ["not measured: stopped, no root"]),
        ([FASTER, SLOWER], {}, {}, [f"target missed: {SLOWER.title}"]),
        ([FASTER, FLOODED], {}, {}, [f"target missed: {FLOODED.title}"]),
        (
            [replace(FASTER, values=[], anchor_values=[])],
            {},
            {},
            [f"target missed: {FASTER.title}"],
        ),
        ([SLOWER], {"stopped": "no root"}, {"smoke": True}, []),
    ],
)
def test_a_run_that_is_checked_says_why_it_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    figures: list[Figure],
    skipped: dict[str, str],
    circumstances: dict[str, Any],
    said: list[str],
) -> None:
    found = run(figures, **circumstances)
    found.skipped.update(skipped)
    source = tmp_path / "run.json"
    report.save(found, source)
    monkeypatch.setattr(command, "TARGETS", {FASTER.name: FASTER.target})
    assert call(monkeypatch, "--from", source) == 0
    assert call(monkeypatch, "--check", "--from", source) == int(bool(said))
    assert capsys.readouterr().err.splitlines() == said


def test_a_peer_with_a_target_that_was_left_out_fails_a_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run([FASTER])
    found.left_out = {"pyzmq": "it is not there", "aiohttp": "it is not there, either"}
    source = tmp_path / "run.json"
    report.save(found, source)
    targets = {FASTER.name: FASTER.target, "calls-vs-pyzmq": SLOWER.target}
    monkeypatch.setattr(command, "TARGETS", targets)
    assert call(monkeypatch, "--check", "--from", source) == 1
    assert capsys.readouterr().err.splitlines() == [
        "left out: pyzmq, it is not there",
        "target not measured: calls-vs-pyzmq",
    ]


@pytest.mark.picture
def test_a_stored_run_is_drawn_without_measuring(
    tmp_path: Path,
    page: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    measured: list[str],
) -> None:
    source = tmp_path / "run.json"
    report.save(run(FIGURES), source)
    monkeypatch.setattr(command, "PAGE", page)
    other = tmp_path / "scaling.md"
    other.write_text(f"{scaling.START}\n{scaling.END}\n")
    monkeypatch.setattr(command, "SCALING", other)
    readme = tmp_path / "README.md"
    readme.write_text(f"{summary.START}\n{summary.END}\n")
    monkeypatch.setattr(command, "README", readme)
    assert call(monkeypatch, "--write-docs", "--from", source) == 0
    assert "2026-01-02" in other.read_text()
    assert "2026-01-02" in readme.read_text()
    assert {path.name for path in (tmp_path / "benchmarks").iterdir()} == PICTURES
    assert f"- {SLOWER.title}: 0.67× (" in page.read_text()
    printed = capsys.readouterr().out
    assert SEVERAL in printed
    assert "12.6 minutes in all" in printed
    assert measured == []


@pytest.mark.picture
@pytest.mark.parametrize(("load", "is_quiet"), [(0.3, True), (0.31, False)])
def test_a_machine_that_was_not_quiet_is_told_and_is_on_the_page(
    load: float,
    is_quiet: bool,
    tmp_path: Path,
    page: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = "the machine was not quiet: load 0.31 before the run; the figures want 0.3 at most"
    source = tmp_path / "run.json"
    report.save(run([FASTER], load_before=load), source)
    monkeypatch.setattr(command, "PAGE", page)
    for name, of in (("SCALING", scaling), ("README", summary)):
        other = tmp_path / f"{name}.md"
        other.write_text(f"{of.START}\n{of.END}\n")
        monkeypatch.setattr(command, name, other)
    assert call(monkeypatch, "--write-docs", "--from", source) == 0
    assert capsys.readouterr().err.splitlines() == ([] if is_quiet else [said])
    beware = f"{START}\n\n**Beware: {said}.**\n\n- it, "
    assert (beware in page.read_text()) is not is_quiet


@pytest.mark.picture
@pytest.mark.parametrize(
    ("circumstances", "told"),
    [
        ({"benchmarks": ["flood"]}, "wants a whole run; .* does not have round-trip-one-core, "),
        ({"smoke": True}, "is of a smoke test, whose figures mean nothing"),
    ],
)
def test_a_part_of_a_run_is_not_for_the_docs(
    circumstances: dict[str, Any],
    told: str,
    tmp_path: Path,
    page: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "run.json"
    report.save(run(FIGURES, **circumstances), source)
    monkeypatch.setattr(command, "PAGE", page)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "--write-docs", "--from", source)
    assert ended.value.code == 2
    assert re.search(told, capsys.readouterr().err)
    assert "an older run" in page.read_text()


@pytest.mark.picture
@pytest.mark.parametrize("part", [("--smoke",), ("--only", "flood")], ids=lambda part: part[0])
def test_no_part_is_measured_for_the_docs(
    part: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    measured: list[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "--write-docs", *part)
    assert ended.value.code == 2
    assert "neither --smoke nor --only" in capsys.readouterr().err
    assert measured == []


def test_what_was_saved_is_read_again(tmp_path: Path) -> None:
    source = tmp_path / "run.json"
    report.save(run(FIGURES), source)
    assert report.read(source) == run(FIGURES)
