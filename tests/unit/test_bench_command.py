"""The command that runs the benchmarks: what it refuses, what it writes, its exit codes."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import machine, report, scaling, summary
from bench.figures import Figure
from bench.page import START
from bench.peers import install
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


# ------------------------------------------------------------------------------- what is not usable

ALLOWED = "a file that a run has written is allowed, for example bench/out/latest.json"


@pytest.mark.parametrize("content", [None, "no JSON", "[]", "{}", '{"machine": {}}', b"\xff\xfe"])
def test_what_is_no_run_is_refused_with_what_is_allowed(
    content: str | bytes | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "run.json"
    if content is not None:
        source.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "--from", source)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"error: --from {source}: " in said
    assert said.endswith(f"; {ALLOWED}\n")


@pytest.mark.parametrize("lacking", ["machine", "circumstances", "figures", "broken", "skipped"])
def test_so_is_a_run_that_lacks_something(lacking: str, tmp_path: Path) -> None:
    source = tmp_path / "run.json"
    report.save(run(FIGURES), source)
    document = json.loads(source.read_text())
    del document[lacking]
    source.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="JSON, but not of a run of the benchmarks"):
        report.read(source)


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    measured: list[str],
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "run.json"):
        with pytest.raises(SystemExit) as ended:
            call(monkeypatch, "--json", place)
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert f"error: the results cannot be written to {place} (" in said
        assert "--json FILE names another place, for example" in said
    assert measured == []


def test_a_place_that_can_be_written_is_as_it_was_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, new = tmp_path / "there.json", tmp_path / "folder" / "new.json"
    there.write_text("an older run")
    parser = command.arguments()
    for place in (there, new):
        command.refuse_place(parser, place)
    assert there.read_text() == "an older run"
    assert not new.exists()


# --------------------------------------------------------------------------- the commands beside it


@pytest.mark.parametrize("program", [machine, install], ids=lambda program: program.__name__)
def test_a_command_explains_itself_with_an_example(
    program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for argument, code in (("--help", 0), ("nonsense", 2)):
        monkeypatch.setattr(sys, "argv", ["", argument])
        with pytest.raises(SystemExit) as ended:
            program.main()
        assert ended.value.code == code
    printed = capsys.readouterr()
    assert f"example:\n  python -m {program.__name__} " in printed.out
    assert "unrecognized arguments: nonsense" in printed.err


@pytest.mark.parametrize(
    ("absent", "code"), [("", 0), ("a", 0), ("nats-server", 0), ("a b", 0), ("a b nats-server", 1)]
)
def test_installing_names_what_could_not_be_had(
    absent: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = absent.split()
    monkeypatch.setattr(sys, "argv", ["install"])
    monkeypatch.setattr(install, "wanted", lambda extra: iter("ab"))
    monkeypatch.setattr(install, "succeeds", lambda *command: command[-1] not in names)
    monkeypatch.setattr(install, "nats_server", lambda: None)
    monkeypatch.setattr(install, "install_nats_server", lambda: "nats-server" not in names)
    assert install.main() == code
    assert capsys.readouterr().err.splitlines() == [
        f"domi_fast: not installed, and left out of the benchmarks: {name}" for name in names
    ]
