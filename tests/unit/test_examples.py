"""The examples as a reader would run them: real processes, the commands of their docstrings."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0


class Terminal:
    """Where commands are run; all terminals of a test have one runtime directory, one cluster."""

    def __init__(self, runtime: Path) -> None:
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        self.environment = {
            **os.environ,
            "PYTHONASYNCIODEBUG": "",  # which says more than the example
            "XDG_RUNTIME_DIR": str(runtime),
            "PYTHONPATH": os.pathsep.join(str(ROOT / path) for path in paths if path),
        }

    def start(self, command: str) -> subprocess.Popen[str]:
        words = shlex.split(command)
        assert words[0] == "python"
        return subprocess.Popen(
            [sys.executable, *words[1:]],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: str) -> tuple[int, str]:
        process = self.start(command)
        try:
            out, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
            process.communicate()
        return process.returncode, out

    @contextmanager
    def serving(self, command: str, stop: signal.Signals = signal.SIGINT) -> Iterator[list[str]]:
        """A server for the length of a block, stopped in order; what it printed comes after."""
        process = self.start(command)
        printed: list[str] = []
        try:
            assert process.stdout is not None
            printed.append(process.stdout.readline().rstrip())
            assert printed[0].endswith("Ctrl-C stops it"), printed[0] + process.stdout.read()
            yield printed
            process.send_signal(stop)
            out, _ = process.communicate(timeout=PATIENCE)
            printed += out.splitlines()
            assert process.returncode == 0, out
        finally:
            process.kill()
            process.communicate()


@pytest.fixture
def terminal(tmp_path: Path) -> Terminal:
    runtime = tmp_path / "runtime"
    runtime.mkdir(0o700)
    return Terminal(runtime)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_echo(terminal: Terminal, stop: signal.Signals) -> None:
    with terminal.serving("python examples/echo/server.py", stop) as printed:
        code, out = terminal.run("python examples/echo/client.py")
        assert code == 0, out
        assert out.splitlines() == [
            "waiting for a server ...",
            "call: pong from node 0",
            "request: pong",
        ]
    assert printed[1:] == ["ping from node 1"] * 2


def test_echo_client_first(terminal: Terminal) -> None:
    client = terminal.start("python examples/echo/client.py")
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "waiting for a server ...\n"
        with terminal.serving("python examples/echo/server.py"):
            out, _ = client.communicate(timeout=PATIENCE)
        assert client.returncode == 0, out
        assert out.splitlines() == ["call: pong from node 1", "request: pong"]
    finally:
        client.kill()
        client.communicate()


TEXTS = '"  some words "  "and a few more words"'
RESULTS = ["And A Few More Words (5 words)", "Some Words (2 words)"]


def test_pipeline_in_one_process(terminal: Terminal) -> None:
    with terminal.serving("python examples/pipeline/stages.py"):
        code, out = terminal.run(f"python examples/pipeline/send.py {TEXTS}")
    assert code == 0, out
    assert out.splitlines()[0] == "waiting for the stages ..."
    assert sorted(out.splitlines()[1:]) == RESULTS


def test_pipeline_in_four_processes(terminal: Terminal) -> None:
    stages = "python examples/pipeline/stages.py"
    with (
        terminal.serving(f"{stages} strip"),
        terminal.serving(f"{stages} title"),
        terminal.serving(f"{stages} title"),
        terminal.serving(f"{stages} count"),
    ):
        code, out = terminal.run(f"python examples/pipeline/send.py {TEXTS}")
    assert code == 0, out
    assert sorted(out.splitlines()[1:]) == RESULTS


def test_serial_join(terminal: Terminal) -> None:
    with terminal.serving("python examples/serial_join/desk.py") as printed:
        code, out = terminal.run("python examples/serial_join/departments.py")
    assert code == 0, out
    assert out.splitlines() == ["waiting for the desk ...", "all four orders have been dealt with"]
    assert printed[1:] == [
        "order 1: shipped",
        "order 2: refused (declined, 3 in stock)",
        "order 3: refused (paid, 0 in stock)",
        "order 4: shipped",
    ]


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_leader(terminal: Terminal, end: signal.Signals) -> None:
    processes = []
    try:
        for said in ("nobody leads yet", "node 0 leads"):
            process = terminal.start("python examples/leader/leader.py")
            processes.append(process)
            assert process.stdout is not None
            assert process.stdout.readline() == f"{said}\n"
            if said == "nobody leads yet":
                assert re.fullmatch(r"node 0 leads, token \d+\n", process.stdout.readline())
                assert process.stdout.readline() == "  1\n"
        first, second = processes
        assert second.stdout is not None
        first.send_signal(end)
        assert first.wait(PATIENCE) == (0 if end is signal.SIGINT else -end)
        assert re.fullmatch(r"node 1 leads, token \d+\n", second.stdout.readline())
        assert second.stdout.readline() == "  1\n"
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_stage_that_there_is_not(terminal: Terminal) -> None:
    code, out = terminal.run("python examples/pipeline/stages.py strop")
    assert code == 2
    assert "there is no stage strop" in out


@pytest.mark.parametrize("name", ["stages.py", "send.py"])
def test_help(terminal: Terminal, name: str) -> None:
    code, out = terminal.run(f"python examples/pipeline/{name} --help")
    assert code == 0
    assert "usage:" in out
    assert "in another terminal" in out


def test_every_example_says_how_to_run_it() -> None:
    files = [path for path in (ROOT / "examples").rglob("*.py") if path.name != "__init__.py"]
    assert len(files) >= 4
    for path in files:
        docstring = path.read_text().split('"""')[1]
        commands = re.findall(r"python (examples/\S+\.py)", docstring)
        assert commands, path
        assert all((ROOT / command).is_file() for command in commands), path
