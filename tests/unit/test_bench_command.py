"""The command that runs the benchmarks: what it refuses, what it writes, its exit codes."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import report, scaling, summary
from bench.figures import Figure
from bench.page import START
from bench.report import Report
from bench.suite import SEVERAL
from tests.measured import FASTER, FIGURES, FLOODED, PICTURES, SLOWER, empty_page, run


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return empty_page(tmp_path)


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
