"""The programs in C beside this file: each is compiled when it is first needed, and prints JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).parent
OUT = Path(__file__).resolve().parents[1] / "out"

__all__ = ["Program", "build", "cpu"]


def build(name: str) -> Path:
    """Compiles the program if its source is newer, and returns where it is."""
    program = OUT / name
    source = HERE / f"{name}.c"
    newest = max(path.stat().st_mtime for path in (source, *HERE.glob("*.h")))
    if program.exists() and program.stat().st_mtime >= newest:
        return program
    compiler = os.environ.get("CC") or "cc"
    if shutil.which(compiler.split()[0]) is None:
        raise RuntimeError(f"no C compiler: {compiler!r} was not found; set CC")
    OUT.mkdir(parents=True, exist_ok=True)
    # Two benchmarks may start at once: each compiles for itself, and the last one's file stays.
    handle, path = tempfile.mkstemp(dir=OUT, prefix=f"{name}.")
    os.close(handle)
    fresh = Path(path)
    try:
        command = [*compiler.split(), "-std=gnu11", "-O2", "-Wall", "-Wextra"]
        subprocess.run([*command, str(source), "-o", path], check=True)
        fresh.chmod(0o755)
        fresh.replace(program)
    finally:
        fresh.unlink(missing_ok=True)
    return program


def cpu(number: int | None) -> list[str]:
    """What such a program is told, for it to stay on this CPU."""
    return [] if number is None else ["--cpu", str(number)]


class Program:
    """One that runs. Use it as a context manager; it ends with its input, or is killed.

    :param name: of its source, without ``.c``.
    :param timeout: seconds within which each of its lines must come.
    """

    def __init__(self, name: str, *arguments: str, timeout: float = 120.0) -> None:
        self._name = name
        self._timeout = timeout
        self._process = subprocess.Popen(
            [str(build(name)), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def say(self, line: str) -> None:
        """One line of its input."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next line that it prints. Raises RuntimeError when there is none."""
        assert self._process.stdout is not None
        # One that hangs ends without a word.
        watchdog = threading.Timer(self._timeout, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise RuntimeError(f"{self._name} ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Close its input, which ends it; less gently when that does not help."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):  # it has ended, and has not read all of it
            process.stdin.close()
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()
