"""The driver's side: workers that are started, pinned and asked."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.child import BenchError, Child

START_TIMEOUT = 60.0

__all__ = ["Worker", "cluster", "module_command", "start", "start_pair"]


def module_command(module: str, *arguments: object) -> list[str]:
    """The command line that runs a module of the benchmarks in a process of its own."""
    return [sys.executable, "-m", module, *map(str, arguments)]


class Worker(Child):
    """A process that runs a module of the benchmarks.

    :param module: its name; it talks as :mod:`bench.two_process.commands` says.
    :param arguments: its command line.
    :param timeout: seconds within which it must be ready.
    """

    def __init__(self, module: str, *arguments: object, timeout: float = START_TIMEOUT) -> None:
        super().__init__(module.rpartition(".")[2], module_command(module, *arguments))
        try:
            self.ready = self.answer(timeout)
        except BaseException:
            self.end(patience=0.0)
            raise

    def ask(self, do: str, *, timeout: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Have a command carried out; its answer."""
        self.send(do, **arguments)
        return self.answer(timeout)

    def send(self, do: str, **arguments: Any) -> None:
        """Start a command; :meth:`answer` waits for it."""
        self.say(json.dumps({"do": do, **arguments}))

    def answer(self, timeout: float | None = None) -> dict[str, Any]:
        """The next line that it prints. Raises BenchError also when that tells of an error."""
        answer = super().answer(timeout)
        if "error" in answer:
            raise BenchError(f"{self.name} failed:\n{answer['error']}")
        return answer


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
