"""The driver's side: workers that are started, pinned, asked, and always brought to an end."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.figures import Figure

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT = 60.0

__all__ = ["BenchError", "Worker", "cluster", "module_command", "start", "start_pair"]


class BenchError(Exception):
    """A benchmark could not be measured: a worker failed, fell silent or counted wrong.

    :ivar figures: those of the benchmark that could be measured all the same.
    """

    def __init__(self, reason: str, figures: Sequence[Figure] = ()) -> None:
        super().__init__(reason)
        self.figures = figures


def module_command(module: str, *arguments: object) -> list[str]:
    """The command line that runs a module of the benchmarks in a process of its own."""
    return [sys.executable, "-m", module, *map(str, arguments)]


class Worker:
    """A process that runs a module of the benchmarks. Use it as a context manager.

    :param module: its name; it talks as :mod:`bench.two_process.commands` says.
    :param arguments: its command line.
    """

    def __init__(self, module: str, *arguments: object, timeout: float = START_TIMEOUT) -> None:
        self.name = module.rpartition(".")[2]
        self._rest = b""
        self._process = subprocess.Popen(
            module_command(module, *arguments),
            cwd=ROOT,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            self.ready = self.answer(timeout)
        except BaseException:
            self.end(patience=0.0)
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, *, timeout: float = 120.0, **arguments: Any) -> dict[str, Any]:
        """Have a command carried out; its answer."""
        self.send(do, **arguments)
        return self.answer(timeout)

    def send(self, do: str, **arguments: Any) -> None:
        """Start a command; :meth:`answer` waits for it."""
        assert self._process.stdin is not None
        line = json.dumps({"do": do, **arguments}).encode() + b"\n"
        try:
            self._process.stdin.write(line)
        except OSError as error:
            raise BenchError(f"{self.name} has gone: {error}") from error

    def answer(self, timeout: float) -> dict[str, Any]:
        """The next line that the worker prints, which must come within ``timeout`` seconds."""
        answer: dict[str, Any] = json.loads(self._line(timeout))
        if "error" in answer:
            raise BenchError(f"{self.name} failed:\n{answer['error']}")
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
        """Close its input, which ends it; less gently when that does not help."""
        process = self._process
        with suppress(OSError):
            if process.stdin is not None:
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
        if process.stdout is not None:
            process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After a failure nobody waits for a worker that may be in the middle of something.
        self.end(5.0 if kind is None else 0.5)


@contextmanager
def cluster() -> Iterator[tuple[ExitStack, Path]]:
    """A folder for a registry and sockets, and a stack for what is started."""
    with tempfile.TemporaryDirectory(prefix="domi-bench-") as folder, ExitStack() as stack:
        yield stack, Path(folder)


def start(
    stack: ExitStack,
    module: str,
    folder: Path,
    cpu: int | None,
    *more: object,
    timeout: float = START_TIMEOUT,
) -> Worker:
    pinned = [] if cpu is None else ["--cpu", cpu]
    registry = f"sqlite://{folder / 'registry.db'}"
    arguments = ["--registry", registry, *pinned, *more]
    module = f"bench.two_process.{module}"
    return stack.enter_context(Worker(module, *arguments, timeout=timeout))


def start_pair(
    stack: ExitStack, folder: Path, cpus: tuple[int, int], *more: object, unix: bool = False
) -> Worker:
    """A server and a client that knows it; the client."""
    paths = [["--unix", folder / name] if unix else [] for name in ("server", "client")]
    start(stack, "server", folder, cpus[0], *paths[0], *more)
    return start(stack, "client", folder, cpus[1], *paths[1], *more)
