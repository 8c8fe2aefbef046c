"""The demonstration as a user runs it: it succeeds, it fails when it should, it leaves nothing."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo" / "main.py"
PATIENCE = 100.0
COLOUR = re.compile(rb"\x1b\[[0-9;]*3[0-7][0-9;]*m|\x1b\[[0-9;]*38;")
VERBS = (
    *("to=", "notify", "publish", "call", "request", "reply", "ventilator", "watch_channel"),
    *("error", "deadlines", "drained", "unsubscribe", "guest, tcp", "guest, unix", "kill -9"),
)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every file of the demonstration is below TMPDIR; at the end there is none, and no process."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []


def processes_of(folder: Path) -> list[str]:
    """The command lines that name the folder, as those of the demonstration's processes do."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(folder) in line:
                found.append(line.decode(errors="replace").replace("\0", " "))
    return found


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DEMO), *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def last(output: str) -> str:
    return output.splitlines()[-1]


def test_short() -> None:
    done = demo("--messages", "300", "--seed", "42")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert re.fullmatch(
        r"demo ok: [\d,]+ messages by every verb, each answer checked, one server killed, "
        r"in \d+\.\d s \(seed 42\)",
        last(done.stdout),
    )
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    for verb in VERBS:
        assert re.search(rf"^{re.escape(verb)} .*\d", done.stdout, re.MULTILINE), verb
    assert re.search(r"^notify .* 300 ", done.stdout, re.MULTILINE)
    assert "was killed with signal 9" in done.stdout


def test_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(os.path.abspath(p) for p in paths if p))
    monkeypatch.chdir("/")
    done = demo("--messages", "1")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_answer_fails() -> None:
    done = demo("--messages", "300", "--break")
    assert done.returncode == 1
    assert re.match(
        r"demo failed: call: server-2 answered message \d+ wrongly: .* \(seed \d+\)",
        last(done.stdout),
    )
    assert "demo ok" not in done.stdout


def test_a_crash_fails() -> None:
    done = demo("--messages", "300", "--break", "crash")
    assert done.returncode == 1
    # The client may be first to notice, or the one that waits for the processes.
    assert re.match(
        r"demo failed: (server-2 died in call \(exit code 70\)|call: .*)", last(done.stdout)
    )


def test_a_hang_fails_in_time() -> None:
    began = time.monotonic()
    done = demo("--messages", "300", "--break", "hang", "--timeout", "4")
    assert done.returncode == 1
    assert last(done.stdout).startswith("demo failed: not done after 4 s, in ")
    assert time.monotonic() - began >= 4.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_reaps_the_children(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, str(DEMO), "--messages", "1000000"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        while "to= " not in (line := process.stdout.readline()):
            assert line, "the demonstration ended by itself"
        process.send_signal(number)
        rest, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        assert last(rest).startswith(f"demo failed: interrupted by {number.name}")
    finally:
        process.kill()
        process.communicate()


def test_its_own_death_ends_the_children(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(DEMO), "--messages", "1000000"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        while "to= " not in (line := process.stdout.readline()):
            assert line, "the demonstration ended by itself"
        assert len(processes_of(tmp_path)) == 4
    finally:
        process.kill()
        process.communicate()
    end = time.monotonic() + 20.0
    while processes_of(tmp_path):
        assert time.monotonic() < end, "the children outlive the demonstration"
        time.sleep(0.02)
    for left in sorted(tmp_path.rglob("*"), reverse=True):
        left.rmdir() if left.is_dir() else left.unlink()


def on_terminal(*arguments: str, **environment: str) -> tuple[int, bytes]:
    """Run it with a terminal for its output; exit code and all that was written."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(DEMO), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm-256color", **environment},
    )
    os.close(slave)
    written = b""
    try:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if not select.select([master], [], [], 1.0)[0]:
                continue
            try:
                data = os.read(master, 65536)
            except OSError:  # EIO: the other end is closed, the process has ended
                break
            written += data
        return process.wait(PATIENCE), written
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    code, written = on_terminal("--messages", "2000")
    assert code == 0, written.decode()
    assert COLOUR.search(written)
    assert "━".encode() in written  # the bar
    assert b"demo ok: " in written.splitlines()[-1]


def test_without_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    code, written = on_terminal("--messages", "300", NO_COLOR="1")
    assert code == 0, written.decode()
    assert not COLOUR.search(written)
    assert b"demo ok: " in written.splitlines()[-1]


def test_help() -> None:
    done = demo("--help")
    assert done.returncode == 0
    for text in ("examples:", "--messages", "--seed", "--timeout", "--break", "NO_COLOR"):
        assert text in done.stdout


@pytest.mark.parametrize("wrong", [["--messages", "0"], ["--messages", "x"], ["--break", "it"]])
def test_wrong_arguments(wrong: list[str]) -> None:
    done = demo(*wrong)
    assert done.returncode == 2
    assert "usage:" in done.stderr
