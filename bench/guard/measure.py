"""Counts what a path costs: callgrind runs it, and its file says which object did what."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench import compiler
from bench.child import ROOT, BenchError
from bench.guard.paths import OPERATIONS
from bench.two_process.processes import module_command
from domi_fast import _core

METER = Path(__file__).with_name("meter.c")
TIMEOUT = 120.0

__all__ = ["Count", "build_meter", "core_file", "count", "count_in", "find_valgrind"]


@dataclass(frozen=True)
class Count:
    """What one operation costs.

    :ivar instructions: that the core executes itself.
    :ivar calls: out of the core: to the interpreter, the event loop, the C library, Python's code.
    :ivar total: instructions of the whole process; they depend on how the interpreter was built.
    """

    instructions: float
    calls: float
    total: float


def core_file() -> str:
    path = _core.__file__
    assert path is not None
    return os.path.realpath(path)


def find_valgrind() -> str:
    """Where it is; raises :class:`BenchError`, which says how to install it."""
    found = shutil.which("valgrind")
    if found is None:
        raise BenchError(
            "valgrind is not installed, and nothing can be counted without it: apt-get install "
            "valgrind (Debian, Ubuntu), dnf install valgrind valgrind-devel (Fedora)"
        )
    return found


def build_meter(folder: Path) -> Path:
    """Compile ``meter.c`` into the folder."""
    library = folder / "meter.so"
    flags = ["-O2", "-Wall", "-Wextra", "-shared", "-fPIC"]
    try:
        command = [*compiler.command(), *flags, str(METER), "-o", str(library)]
    except compiler.NoCompiler as error:
        raise BenchError(str(error)) from error
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(
            f"{METER.name} does not compile; it needs valgrind's headers:\n{done.stderr}"
        )
    return library


def count(name: str, keep: Path | None = None) -> Count:
    """Run a path under callgrind; some seconds.

    :param keep: a folder to leave callgrind's file in, for ``callgrind_annotate``.
    """
    valgrind = find_valgrind()
    if _core.is_debug_build():
        raise BenchError("the core is a debug build, whose instructions no user has")
    with tempfile.TemporaryDirectory(prefix="domi-guard-") as folder:
        meter = build_meter(Path(folder))
        written = Path(folder, "counted")
        command = [
            *(valgrind, "--quiet", "--tool=callgrind", "--instr-atstart=no"),
            *("--compress-strings=no", "--compress-pos=no", f"--callgrind-out-file={written}"),
            *module_command("bench.guard.counted", name),
        ]
        environment = {
            **os.environ,
            "LD_PRELOAD": str(meter),
            "PYTHONHASHSEED": "0",
        }
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"{name} took longer than {TIMEOUT:g} s") from error
        # Numbered are those that the program asked for.
        measured = Path(f"{written}.1")
        if done.returncode or not measured.exists():
            said = (done.stdout + done.stderr)[-4000:]
            raise BenchError(f"{name} ended with code {done.returncode}:\n{said}")
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(measured, keep / f"{name}.callgrind")
        return count_in(measured.read_text(), core_file(), OPERATIONS)


def count_in(text: str, core: str, operations: int) -> Count:
    """What callgrind's file says of one operation.

    A function's own cost stands in lines that begin with a number. That of what it called is the
    one line behind ``calls=``, and stands with the called one again.

    :param core: the object whose instructions and calls are wanted, by its file.
    """
    instructions = calls = total = 0
    inside = inclusive = False
    called = ""  # the object of what is called; the caller's own where there is none
    for line in text.splitlines():
        kind, equals, value = line.partition("=")
        if equals:
            if kind == "ob":
                inside = value == core
            elif kind == "cob":
                called = value
            elif kind == "calls":
                if inside and called not in ("", core):
                    calls += int(value.split()[0])
                called = ""
                inclusive = True
        elif line[:1].isdigit():
            if not inclusive:
                cost = int(line.split()[1])
                total += cost
                instructions += cost if inside else 0
            inclusive = False
    if not instructions:
        raise BenchError(f"callgrind has counted nothing of {core}")
    return Count(instructions / operations, calls / operations, total / operations)
