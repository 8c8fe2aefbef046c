"""The programs in C beside this file: each is compiled when it is first needed, and prints JSON."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from bench.child import BenchError, Child

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
        raise BenchError(f"no C compiler: {compiler!r} was not found; set CC")
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


class Program(Child):
    """One that runs.

    :param name: of its source, without ``.c``.
    :param timeout: seconds within which each of its lines must come.
    """

    def __init__(self, name: str, *arguments: str, timeout: float = 120.0) -> None:
        super().__init__(name, [str(build(name)), *arguments], timeout)
