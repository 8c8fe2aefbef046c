"""What is said of a run of the benchmarks: its page, its figures, its findings."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import report, summary
from bench.child import ROOT
from bench.figures import Figure, Target
from bench.findings import noise, undecided, where_others_win
from bench.machine import machine
from bench.page import END, START, write_docs
from bench.suite import ONE, SEVERAL, SINGLE
from tests.measured import (
    COSTS_NOTHING,
    FASTER,
    FIGURES,
    FLOODED,
    GROWN,
    LARGE,
    LOST,
    MEMORY,
    PICTURES,
    SLOWER,
    empty_page,
    run,
)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return empty_page(tmp_path)


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


def test_what_was_saved_is_read_again(tmp_path: Path) -> None:
    source = tmp_path / "run.json"
    report.save(run(FIGURES), source)
    assert report.read(source) == run(FIGURES)


def test_a_run_is_json_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With percentiles, or a rate, and how far the rounds lie apart; machine, versions, commit."""
    here = machine()
    found = replace(run([FASTER, SLOWER, COSTS_NOTHING, GROWN]), machine=here)
    source = tmp_path / "run.json"
    report.save(found, source)
    document = json.loads(source.read_text())
    assert document["machine"] == here
    figures = {figure["name"]: figure for figure in document["figures"]}
    for of in ("values", "p99", "p999", "anchor_values", "anchor_p99", "anchor_p999"):
        assert figures["round-trip"][of] == getattr(FASTER, of)
    assert figures["calls-vs-pyzmq"]["values"] == [1e6, 2e6, 4e6]
    assert figures["calls-vs-pyzmq"]["ratios"] == SLOWER.ratios
    report.show(found, judge=True)
    printed = capsys.readouterr().out
    for level in (SEVERAL, ONE, SINGLE):
        assert re.search(rf"^{level}\s*$", printed, re.MULTILINE)
    printed = " ".join(printed.split())  # long lines are broken
    for words in (
        *("9.00 µs / 30.0 µs / 70.0 µs", "8.00–9.00–10.0 µs", "2.00 M/s", "1.00–2.00–4.00 M/s"),
        *(here["cpu"], here["kernel"], here["python"], here["compiler"]),
        *(f"domi_fast {here['domi_fast']}", f"uvloop {here['uvloop']}"),
        (here["commit"] or "no commit")[:12],
        *(f"{name} {version}" for name, version in here["peers"].items()),
    ):
        assert words in printed


def test_the_commit_is_the_one_that_is_here() -> None:
    """And none, where the tree is not a clone, though it lie in that of somebody else."""
    told = ""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        told = done.stdout.strip()
    assert machine()["commit"] == (told or None)


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
