"""A process that a benchmark starts, talks to in lines of JSON, and always brings to an end."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from bench.figures import Figure

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "bench" / "out"  # what the benchmarks leave behind

Kind = TypeVar("Kind", bound="Child")

__all__ = ["OUT", "ROOT", "BenchError", "Child"]


class BenchError(Exception):
    """A benchmark could not be measured: a process failed, fell silent or counted wrong.

    :ivar figures: those of the benchmark that could be measured all the same.
    """

    def __init__(self, reason: str, figures: Sequence[Figure] = ()) -> None:
        super().__init__(reason)
        self.figures = figures


class Child:
    """One that runs. Use it as a context manager; it ends with its input, or is killed.

    :param name: for the errors.
    :param command: its command line.
    :param timeout: seconds within which each of its lines must come, where nothing else is said.
    """

    def __init__(self, name: str, command: Sequence[str], timeout: float = 120.0) -> None:
        self.name = name
        self._timeout = timeout
        self._rest = b""
        self._process = subprocess.Popen(
            command, cwd=ROOT, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def say(self, line: str) -> None:
        """One line of its input. Raises BenchError if it has gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
        except OSError as error:
            raise BenchError(f"{self.name} has gone: {error}") from error

    def answer(self, timeout: float | None = None) -> dict[str, Any]:
        """The next line that it prints.

        Raises BenchError when none comes within ``timeout`` seconds, or it ends without one.
        """
        answer: dict[str, Any] = json.loads(self._line(timeout or self._timeout))
        return answer

    def _line(self, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise BenchError(f"{self.name} said nothing for {timeout:g} s")
                read = os.read(descriptor, 65536)
                if not read:
                    raise BenchError(f"{self.name} ended with code {self._process.wait(5.0)}")
                self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def end(self, patience: float = 5.0) -> None:
        """Close its input, which ends it; less gently when that has not helped after
        ``patience`` seconds."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):  # it has ended, and has not read all of it
            process.stdin.close()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(1.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        process.stdout.close()

    def __enter__(self: Kind) -> Kind:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After a failure nobody waits for one that may be in the middle of something.
        self.end(5.0 if kind is None else 0.5)
