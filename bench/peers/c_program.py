"""The programs in C beside this file: each is compiled when it is first needed, and prints JSON."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from bench import compiler
from bench.child import OUT, BenchError, Child

HERE = Path(__file__).parent

__all__ = ["Program", "build", "cpu"]


def build(name: str) -> Path:
    """Compiles the program if its source is newer, and returns where it is."""
    program = OUT / name
    source = HERE / f"{name}.c"
    newest = max(path.stat().st_mtime for path in (source, *HERE.glob("*.h")))
    if program.exists() and program.stat().st_mtime >= newest:
        return program
    try:
        compile_it = [*compiler.command(), "-std=gnu11", "-O2", "-Wall", "-Wextra"]
    except compiler.NoCompiler as error:
        raise BenchError(str(error)) from error
    OUT.mkdir(parents=True, exist_ok=True)
    # Two benchmarks may start at once: each compiles for itself, and the last one's file stays.
    handle, path = tempfile.mkstemp(dir=OUT, prefix=f"{name}.")
    os.close(handle)
    fresh = Path(path)
    try:
        subprocess.run([*compile_it, str(source), "-o", path], check=True)
        fresh.chmod(0o755)
        fresh.replace(program)
    finally:
        fresh.unlink(missing_ok=True)
    return program


def cpu(number: int | None) -> list[str]:
    """What such a program is told, for it to stay on this CPU."""
    return [] if number is None else ["--cpu", str(number)]


class Program(Child):
    """One that runs.

    :param name: of its source, without ``.c``.
    :param timeout: seconds within which each of its lines must come.
    """

    def __init__(self, name: str, *arguments: str, timeout: float = 120.0) -> None:
        super().__init__(name, [str(build(name)), *arguments], timeout)
