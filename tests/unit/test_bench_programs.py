"""The programs in C that benchmarks are measured against: they compile, and say what is wrong."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from bench import suite
from bench.child import BenchError
from bench.figures import Figure
from bench.peers import c_echo, raw_stream
from bench.peers.c_program import HERE, Program, build
from bench.settings import Settings

PROGRAMS = sorted(path.stem for path in HERE.glob("*.c") if path.stem != "vectorcalls")

pytestmark = pytest.mark.native


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_compiles_without_a_warning_and_explains_itself(
    name: str, tmp_path: Path
) -> None:
    compiler = (os.environ.get("CC") or "cc").split()
    command = [*compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, str(HERE / f"{name}.c"), "-o", str(tmp_path / name)], check=True)
    told = subprocess.run([tmp_path / name, "--help"], check=True, capture_output=True, text=True)
    assert told.stdout.startswith(name)
    wrong = subprocess.run([tmp_path / name], check=False, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr == told.stdout


def test_a_program_is_compiled_again_when_a_header_is_newer() -> None:
    program = build("raw_stream")
    old = (HERE / "sockets.h").stat().st_mtime - 1
    os.utime(program, (old, old))
    assert build("raw_stream") == program
    assert program.stat().st_mtime > old


def test_a_program_that_ends_or_hangs_is_told() -> None:
    with (
        Program("raw_stream", "--sender") as ended,
        pytest.raises(BenchError, match="raw_stream ended with code 2"),
    ):
        ended.answer()
    with Program("raw_stream", "--receiver", "--size", "1", timeout=0.2) as hanging:
        assert hanging.answer()["port"] > 0
        with pytest.raises(BenchError, match=r"raw_stream said nothing for 0\.2 s"):
            hanging.answer()


def test_echoes_that_poll_go_over_unix_sockets_too() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        with pytest.raises(ValueError, match="need two CPUs"):
            c_echo.round_trip(count=10, busy=True, unix=True)
        return
    found = c_echo.round_trip(count=100, warm_up=10, busy=True, unix=True)
    assert (found["transport"], found["busy"], found["count"]) == ("unix", True, 100)
    assert 0 < found["min_ns"] <= found["p50_ns"] <= found["p99_ns"] <= found["max_ns"]


def test_an_echo_that_polls_has_one_frame_under_way() -> None:
    with pytest.raises(ValueError, match="one frame"):
        c_echo.round_trip(count=10, busy=True, window=2)


@pytest.mark.parametrize("block", [1 << 16, 1 << 20])
@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("fixed", [False, True])
def test_a_stream_need_not_be_whole_blocks(block: int, more: int, fixed: bool) -> None:
    found = raw_stream.measure(None, None, block + more, block, fixed=fixed)
    assert (found["size"], found["block"]) == (block + more, block)
    assert found["bytes_per_s"] > 0


def test_the_anchor_of_one_way_is_the_faster_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([1.0, 2.0, 4.0, 3.0])
    asked = []

    def give(*_how_much: int, fixed: bool) -> dict[str, float]:
        asked.append(fixed)
        return {"bytes_per_s": next(rates)}

    monkeypatch.setattr(raw_stream, "measure", give)
    detail: dict[str, list[float]] = {into: [] for into in suite.RAW_STREAMS}
    large = Figure("notify-1MiB", "", "B/s", anchor="C", detail=detail)
    figures = {16: Figure("notify-16B", "", "/s"), 1 << 20: large}
    for number in range(2):
        suite.raw_streams(number, Settings(2, smoke=True, cpus=(0, 1)), figures)
    assert asked == [False, True, True, False]
    assert detail == {"anchor_allocated": [1.0, 3.0], "anchor_fixed": [2.0, 4.0]}
    assert large.anchor_values == [2.0, 4.0]
