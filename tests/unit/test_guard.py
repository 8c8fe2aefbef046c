"""bench.guard: what it makes of given counts, and that its paths do what they say."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import compiler
from bench.child import BenchError
from bench.guard import __main__ as command
from bench.guard import counted, measure, stored
from bench.guard.measure import Count
from bench.guard.paths import OPERATIONS, PATHS
from bench.guard.stored import GREW, KEPT, MISSING, SHRANK, Comparison, Figure

HERE = "x86_64, CPython 3.11, gcc 12.2.0, -O3"
ELSEWHERE = "x86_64, CPython 3.11, gcc 13.1.0, -O3"
FIGURE = Figure(1000.0, 20.0, "3.1", "as it was first")
SAME = Count(1000.0, 20.0, 5000.0)

Edit = Callable[..., None]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Count]:
    """What each path is found to cost, here; to be changed by the test."""
    found = dict.fromkeys(PATHS, SAME)
    monkeypatch.setattr(measure, "count", lambda name, keep: found[name])
    monkeypatch.setattr(stored, "environment", lambda core: HERE)
    return found


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of stored figures, of this environment."""
    path = tmp_path / "stored.json"
    stored.write({HERE: dict.fromkeys(PATHS, FIGURE)}, path)
    monkeypatch.setattr(stored, "FILE", path)
    return path


# ------------------------------------------------------------------------------------- comparison


@pytest.mark.parametrize(
    ("instructions", "calls", "verdict"),
    [
        (1.0, 1.0, KEPT),
        (1.04, 1.0, KEPT),
        (1.0, 1.04, KEPT),
        (0.96, 0.96, KEPT),
        (1.06, 1.0, GREW),
        (1.0, 1.06, GREW),
        (0.5, 1.06, GREW),
        (0.94, 1.0, SHRANK),
        (1.04, 0.94, SHRANK),
    ],
)
def test_what_is_said_of_a_count(instructions: float, calls: float, verdict: str) -> None:
    now = Count(1000.0 * instructions, 20.0 * calls, 0.0)
    assert Comparison("notify", now, FIGURE).verdict == verdict
    assert Comparison("notify", now, None).verdict == MISSING


@pytest.mark.parametrize(("calls", "verdict"), [(0.14, KEPT), (0.16, GREW), (0.04, SHRANK)])
def test_calls_that_a_batch_makes_once(calls: float, verdict: str) -> None:
    """Of few, five per cent would be none: it is five per cent of one call an operation."""
    figure = Figure(1000.0, 0.1, "3.1", "as it was first")
    assert Comparison("notify", Count(1000.0, calls, 0.0), figure).verdict == verdict


@pytest.mark.parametrize(
    ("now", "code", "said"),
    [
        (Count(1040.0, 20.8, 9999.0), 0, None),
        (Count(1060.0, 20.0, 0.0), command.GROWN, "request has grown: 1,000.0 -> 1,060.0 instr"),
        (Count(1000.0, 22.0, 0.0), command.GROWN, "20.0 -> 22.0 calls"),
        (Count(940.0, 20.0, 0.0), 0, "request has become cheaper: store it"),
    ],
)
def test_the_exit_code_and_what_is_said(
    counts: dict[str, Count],
    file: Path,
    capsys: pytest.CaptureFixture[str],
    now: Count,
    code: int,
    said: str | None,
) -> None:
    before = file.read_text()
    counts["request"] = now
    assert command.main([]) == code
    printed = capsys.readouterr().out
    for name in PATHS:
        assert re.search(rf"│ {name} ", printed)
    advice = printed.rpartition("┘")[2]
    if said is None:
        assert not advice.strip()
    else:
        assert said in advice
        assert "bench.guard --only request --store" in advice
    assert "notify" not in advice
    assert file.read_text() == before


def test_what_seems_to_have_grown_is_counted_again_and_the_least_counts(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = {
        "notify": [Count(1000.0, 23.0, 0.0), Count(1049.0, 22.0, 0.0), Count(1200.0, 20.0, 0.0)],
        "request": [Count(1060.0, 20.0, 0.0)] * 3,
        "serial": [Count(1000.0, 20.0, 0.0)],
    }
    monkeypatch.setattr(measure, "count", lambda name, keep: costs[name].pop(0))
    monkeypatch.setattr(stored, "environment", lambda core: HERE)
    assert command.main(["--only", "notify", "--only", "serial"]) == 0
    assert command.main(["--only", "request"]) == command.GROWN
    assert not any(costs.values())


def test_another_cython_is_named_beside_a_growth(
    counts: dict[str, Count],
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    counts["request"] = Count(1060.0, 20.0, 0.0)
    monkeypatch.setattr(stored, "cython", lambda: "3.9")
    assert command.main([]) == command.GROWN
    assert "stored with Cython 3.1; this is 3.9" in capsys.readouterr().out


@pytest.mark.usefixtures("counts")
def test_in_another_environment_nothing_passes_for_compared(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored.write({ELSEWHERE: dict.fromkeys(PATHS, FIGURE)}, file)
    assert command.main([]) == command.NOT_COMPARED
    printed = capsys.readouterr().out
    assert "NOT COMPARED: " + ", ".join(PATHS) in printed
    assert f"\n  {ELSEWHERE}\n" in printed
    assert f"this is\n  {HERE}\n" in printed


@pytest.mark.usefixtures("counts")
def test_a_path_without_a_figure_is_not_compared(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = dict.fromkeys(PATHS, FIGURE)
    del figures["serial"]
    stored.write({HERE: figures}, file)
    assert command.main([]) == command.NOT_COMPARED
    assert "NOT COMPARED: serial." in capsys.readouterr().out
    assert command.main(["--only", "request"]) == 0


def test_a_growth_is_not_hidden_by_what_is_not_compared(
    counts: dict[str, Count], file: Path
) -> None:
    figures = dict.fromkeys(PATHS, FIGURE)
    del figures["serial"]
    stored.write({HERE: figures}, file)
    counts["request"] = Count(1060.0, 20.0, 0.0)
    assert command.main([]) == command.GROWN


# ---------------------------------------------------------------------------------------- storing


def test_only_what_has_left_the_tolerance_is_stored(counts: dict[str, Count], file: Path) -> None:
    """Or growths of 4 % would add up, each with the reason of another."""
    stored.write({HERE: dict.fromkeys(PATHS, FIGURE), ELSEWHERE: {"notify": FIGURE}}, file)
    counts["request"] = Count(1200.0, 20.0, 0.0)
    counts["notify"] = Count(1040.0, 20.0, 0.0)
    counts["publish"] = Count(700.0, 20.0, 0.0)
    assert command.main(["--store", "it does more now"]) == 0
    found = stored.read(file).figures
    assert found[ELSEWHERE] == {"notify": FIGURE}
    changed = {name for name, figure in found[HERE].items() if figure != FIGURE}
    assert changed == {"request", "publish"}
    request = found[HERE]["request"]
    assert (request.instructions, request.calls) == (1200.0, 20.0)
    assert request.reason == "it does more now"
    assert request.cython == stored.cython()
    assert command.main([]) == 0


def test_what_is_named_is_stored_in_any_case(counts: dict[str, Count], file: Path) -> None:
    counts["notify"] = Count(1010.0, 20.0, 0.0)
    assert command.main(["--only", "notify", "--store", "measured anew"]) == 0
    found = stored.read(file).figures[HERE]
    assert found["notify"].instructions == 1010.0
    assert found["request"] == FIGURE


@pytest.mark.usefixtures("counts")
@pytest.mark.parametrize("reason", ["", "   "])
def test_a_figure_is_not_stored_without_a_reason(
    file: Path, capsys: pytest.CaptureFixture[str], reason: str
) -> None:
    before = file.read_text()
    with pytest.raises(SystemExit) as ended:
        command.main(["--store", reason])
    assert ended.value.code == 2
    assert "say why" in capsys.readouterr().err
    assert file.read_text() == before


def test_a_figure_that_changes_has_another_reason(
    counts: dict[str, Count], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = file.read_text()
    counts["request"] = Count(1200.0, 20.0, 0.0)
    with pytest.raises(SystemExit) as ended:
        command.main(["--store", FIGURE.reason])
    assert ended.value.code == 2
    assert "the old figure of request" in capsys.readouterr().err
    assert file.read_text() == before


ANOTHER: dict[str, Any] = {
    "instructions": 1200.0,
    "calls": 21.0,
    "cython": "3.2",
    "reason": "as it is now",
    "seal": "0123456789abcdef",
}


@pytest.fixture
def edit(file: Path) -> Edit:
    """``edit(name, key, ...)``: change a path's figure by hand, or take a key of it away."""

    def edited(name: str, key: str, value: Any = None, place: str = HERE) -> None:
        document = json.loads(file.read_text())
        document[place][name] = {**document[place][name], key: value}
        if value is None:
            del document[place][name][key]
        file.write_text(json.dumps(document))

    return edited


@pytest.mark.usefixtures("counts")
@pytest.mark.parametrize("value", [ANOTHER, {}], ids=["changed", "taken away"])
@pytest.mark.parametrize("key", ANOTHER)
def test_a_figure_is_not_changed_by_hand(
    file: Path, edit: Edit, capsys: pytest.CaptureFixture[str], key: str, value: dict[str, Any]
) -> None:
    """And is stored again with a reason, though it be near enough."""
    edit("request", key, value.get(key))
    with pytest.raises(stored.Edited, match="request was not stored"):
        stored.read(file)
    assert command.main([]) == command.FAILED
    assert "--only request --store" in capsys.readouterr().err
    assert command.main(["--store", "measured anew"]) == 0
    found = stored.read(file).figures[HERE]
    assert (found["request"].instructions, found["request"].reason) == (1000.0, "measured anew")
    assert found["notify"] == FIGURE


@pytest.mark.usefixtures("counts")
@pytest.mark.parametrize(
    ("name", "place"), [("notify", HERE), ("request", ELSEWHERE)], ids=["path", "environment"]
)
def test_what_was_changed_by_hand_is_not_stored_along_with_another(
    file: Path, edit: Edit, capsys: pytest.CaptureFixture[str], name: str, place: str
) -> None:
    stored.write({each: dict.fromkeys(PATHS, FIGURE) for each in (HERE, ELSEWHERE)}, file)
    edit(name, "instructions", 1200.0, place)
    before = file.read_text()
    assert command.main(["--only", "request", "--store", "measured anew"]) == command.FAILED
    assert f"{name} was not stored as it stands there, of {place}" in capsys.readouterr().err
    assert file.read_text() == before


@pytest.mark.parametrize("key", ["seal", "instructions"])
def test_who_breaks_the_seal_needs_another_reason_too(
    counts: dict[str, Count], file: Path, edit: Edit, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    counts["request"] = Count(1200.0, 20.0, 0.0)
    edit("request", key)
    before = file.read_text()
    with pytest.raises(SystemExit) as ended:
        command.main(["--store", FIGURE.reason])
    assert ended.value.code == 2
    assert "the old figure of request" in capsys.readouterr().err
    assert file.read_text() == before


@pytest.mark.parametrize("place", [HERE, ELSEWHERE])
def test_a_figure_is_of_its_path_and_environment(file: Path, place: str) -> None:
    """A cheaper one is not put in the place of another, with its seal."""
    stored.write({HERE: {"notify": FIGURE}}, file)
    figures = json.loads(file.read_text())[HERE]
    name = "request" if place == HERE else "notify"
    file.write_text(json.dumps({place: {name: figures["notify"]}}))
    with pytest.raises(stored.Edited, match=f"{name} was not stored as it stands there"):
        stored.read(file)


def test_the_stored_figures() -> None:
    """Of every path, in each environment, and with a reason."""
    found = stored.read(stored.FILE).figures
    assert found
    for figures in found.values():
        assert set(figures) == set(PATHS)
        for figure in figures.values():
            assert figure.instructions > 0
            assert figure.calls > 0
            assert figure.cython
            assert len(figure.reason) > 10


# --------------------------------------------------------------------------------------- counting


COUNTED = """\
# callgrind format
version: 1
positions: line
events: Ir
summary: 1000

ob=/python
fl=???
fn=loop
0 100
cob=/core.so
cfn=read
calls=2 0
0 800

ob=/core.so
fn=read
0 50
cfn=parse
calls=2 0
0 700
0 30
cob=/python
cfn=handler
calls=4 0
0 90

fn=parse
12 300
cob=/libc
cfn=recv
calls=6 12
13 20
13 4

ob=/python
fn=handler
0 90
"""


def test_what_an_object_does_itself_is_counted_once() -> None:
    count = measure.count_in(COUNTED, "/core.so", 2)
    assert count.instructions == (50 + 30 + 300 + 4) / 2
    assert count.calls == (4 + 6) / 2
    assert count.total == (100 + 50 + 30 + 300 + 4 + 90) / 2
    with pytest.raises(BenchError, match="nothing of /other"):
        measure.count_in(COUNTED, "/other.so", 2)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (b"\0GCC: (Debian 12.2.0-14+deb12u1) 12.2.0\0", "gcc 12.2.0"),
        (b"\0GCC: (GNU) 13.1.1 20230614\0GCC: (GNU) 13.1.1\0", "gcc 13.1.1"),
        (b"GCC: (GNU) 12.2.0\0Debian clang version 16.0.6 (15)\0", "clang 16.0.6 and gcc 12.2.0"),
        (b"\x7fELF", "an unknown compiler"),
    ],
)
def test_the_compiler_is_read_from_what_it_made(code: bytes, said: str) -> None:
    assert compiler.names_in(code) == said


def test_the_environment_names_this_build() -> None:
    words = stored.environment(measure.core_file())
    assert "CPython 3." in words
    assert re.search(r"(gcc|clang) \d+\.\d+", words)
    assert "/" not in words


@pytest.mark.usefixtures("file")
def test_without_valgrind_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.main(["--only", "notify"]) == command.FAILED
    said = capsys.readouterr().err
    assert "valgrind is not installed" in said
    assert "apt-get install valgrind" in said


@pytest.mark.parametrize("name", PATHS)
async def test_a_path_does_what_is_counted(name: str, tmp_path: Path) -> None:
    marks: list[str] = []

    def mark(which: str) -> Callable[[], None]:
        return lambda: marks.append(which)

    await counted.do(name, mark("begin"), mark("end"))
    assert marks == ["begin", "end"]
    async with PATHS[name].prepared(tmp_path) as work:
        with pytest.raises(BenchError, match=f"0 of {OPERATIONS}"):
            await work.check()
        await work.run()
        await work.check()


@pytest.mark.native
@pytest.mark.timeout(240)
def test_a_path_costs_the_same_each_time(tmp_path: Path) -> None:
    if shutil.which("valgrind") is None:
        assert os.environ.get("CI") != "true", "valgrind is to be installed before the tests"
        pytest.skip("valgrind is not installed")
    first, second = measure.count("notify"), measure.count("notify", tmp_path)
    assert first.instructions > 10
    assert first.calls > 0
    assert first.total > first.instructions
    assert second.instructions == pytest.approx(first.instructions, rel=0.01)
    assert second.calls == pytest.approx(first.calls, abs=0.05)
    kept = (tmp_path / "notify.callgrind").read_text()
    assert measure.count_in(kept, measure.core_file(), OPERATIONS) == second
