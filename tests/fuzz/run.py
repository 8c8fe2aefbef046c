"""Runs the fuzz targets, a process for each processor: for a minute, or (DOMI_SOAK=1) far longer.

    make fuzz                                       a minute
    make fuzz ARGS="--only frames --seconds 600"
    make fuzz ARGS="--only frames input"            one input again

Begins with the corpus in tests/fuzz/corpus. What is found beyond it stays in build/fuzz, and
``--keep`` adds to the corpus whatever of it takes a path that the corpus does not. An input that
crashes, hangs, or needs too much memory is printed, and fails the run.
"""

from __future__ import annotations

import argparse
import base64
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOUND = ROOT / "build" / "fuzz"
HARNESS = FOUND / "harness"
SOAK = os.environ.get("DOMI_SOAK") == "1"
MINUTE = 60.0
# An input that takes so many seconds hangs; one takes microseconds.
TIMEOUT = 10
RSS_LIMIT_MB = 1024


def build() -> None:
    """Compile reader.pyx, unless that was done since it, or the core, has changed."""
    source, name = HERE / "reader.pyx", "fuzz_reader"
    found = find_spec("domi_fast")  # which cannot be imported without the sanitizers
    assert found is not None
    assert found.origin is not None
    core = Path(found.origin).parent
    module = HARNESS / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    newest = max(path.stat().st_mtime for path in (source, *core.glob("_core.*")))
    if module.exists() and module.stat().st_mtime > newest:
        return
    HARNESS.mkdir(parents=True, exist_ok=True)
    generated = HARNESS / f"{name}.c"
    cython = [sys.executable, "-m", "cython", "-3", f"-I{core.parent}", f"--module-name={name}"]
    subprocess.run([*cython, str(source), "-o", str(generated)], check=True)
    flags = ["-O1", "-g", "-fPIC", "-shared", "-fno-omit-frame-pointer", "-UNDEBUG"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    flags += [f"-fsanitize-ignorelist={HERE / 'unsanitized.txt'}"]
    parts = ROOT / "src" / "domi_fast" / "_core_parts"
    flags += [f"-I{sysconfig.get_path('include')}", f"-I{parts}", f"-I{parts.parent}"]
    compiler = shlex.split(os.environ.get("CC", "clang"))
    subprocess.run([*compiler, *flags, str(generated), "-o", str(module)], check=True)


@dataclass(frozen=True)
class Target:
    """:ivar soak: executions of it under DOMI_SOAK=1.

    :ivar largest: bytes of its inputs.
    """

    name: str
    soak: int
    largest: int


TARGETS = [
    Target("frames", 100_000_000, 384),
    Target("handshake", 10_000_000, 256),
    Target("sessions", 1_000_000, 512),
]


def environment(more: str = "malloc_context_size=1") -> dict[str, str]:
    """The core's sanitizers come with atheris, and Python's objects from malloc, so that the bytes
    behind one are nobody's. The debug build looks for leaks; LeakSanitizer would report the
    interpreter's own. Each object is an allocation, and the stacks of all would take much of the
    time; an input that is run again (``more``) has them.
    """
    preloaded = Path(atheris.path(), "asan_with_fuzzer.so")
    assert preloaded.exists(), preloaded
    return {
        **os.environ,
        "LD_PRELOAD": str(preloaded),
        "PYTHONPATH": str(HARNESS),
        "PYTHONMALLOC": "malloc",
        "PYTHONHASHSEED": "0",
        "ASAN_OPTIONS": f"detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=32:{more}",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


def command(target: Target, *arguments: object) -> list[str]:
    program = [sys.executable, "-m", f"tests.fuzz.{target.name}"]
    limits = [f"-timeout={TIMEOUT}", f"-rss_limit_mb={RSS_LIMIT_MB}", f"-max_len={target.largest}"]
    return [*program, *limits, *map(str, arguments)]


class Run:
    """One process of a target, until it ends."""

    def __init__(self, target: Target, number: int, *limits: str) -> None:
        self.folder = FOUND / target.name
        self.artifacts = self.folder / "artifacts" / str(number)
        inputs = self.folder / "inputs"
        for folder in (self.artifacts, inputs):
            folder.mkdir(parents=True, exist_ok=True)
        for old in self.artifacts.iterdir():
            old.unlink()
        self.log = self.folder / f"log-{number}"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command(
                    target,
                    f"-artifact_prefix={self.artifacts}/",
                    "-print_final_stats=1",
                    "-reload=10",
                    *limits,
                    inputs,
                    HERE / "corpus" / target.name,
                ),
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment(),
            )

    def figures(self) -> tuple[int, str]:
        """Executions, and what libFuzzer says of the paths that were taken."""
        text = self.log.read_text(errors="replace")
        count = re.search(r"stat::number_of_executed_units: (\d+)", text)
        covered = re.findall(r"cov: (\d+) ft: (\d+)", text)
        assert count, f"{self.log} has no final figures"
        assert covered, f"{self.log} tells of no coverage: the core was not built for fuzzing"
        return int(count[1]), "{} edges, {} features".format(*covered[-1])

    def failed(self) -> bool:
        """Print why it has failed, if it has."""
        if self.process.wait() == 0 and not any(self.artifacts.iterdir()):
            return False
        text = self.log.read_text(errors="replace")
        print("\n".join(text.splitlines()[-120:]))
        for path in sorted(self.artifacts.iterdir()):
            data = path.read_bytes()
            print(f"\n{path}: {len(data)} bytes\n{data.hex()}\n{base64.b64encode(data).decode()}")
        return True


def fuzz(target: Target, processes: int, seconds: float | None, executions: int) -> bool:
    """Whether nothing was found."""
    begun = time.monotonic()
    limit = f"-max_total_time={seconds:.0f}" if seconds else f"-runs={-(-executions // processes)}"
    runs = [
        Run(target, number, limit, f"-seed={os.getpid() + number}") for number in range(processes)
    ]
    try:
        failures = [run.failed() for run in runs]  # each says why
        if any(failures):
            return False
    finally:
        for run in runs:
            if run.process.poll() is None:
                run.process.kill()
                run.process.wait()
    took = time.monotonic() - begun
    figures = [run.figures() for run in runs]
    count = sum(executed for executed, _ in figures)
    print(
        f"{target.name}: {count:,} executions in {took:.0f} s, {count / took:,.0f} a second; "
        f"{figures[0][1]}",
        flush=True,
    )
    if seconds is None and count < executions:
        print(f"{target.name}: {executions:,} were wanted")
        return False
    return count > 0


def keep(target: Target) -> None:
    """Add to the corpus what was found, in as few inputs as take the same paths."""
    corpus = HERE / "corpus" / target.name
    corpus.mkdir(parents=True, exist_ok=True)
    merged = FOUND / target.name / "merged"
    merged.mkdir(parents=True, exist_ok=True)
    for old in merged.iterdir():
        old.unlink()
    arguments = command(target, "-merge=1", merged, corpus, FOUND / target.name / "inputs")
    subprocess.run(arguments, check=True, cwd=ROOT, env=environment())
    for old in corpus.iterdir():
        old.unlink()
    for new in merged.iterdir():
        new.rename(corpus / new.name)
    print(f"{target.name}: {len(list(corpus.iterdir()))} inputs")


def main() -> None:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--only", choices=[target.name for target in TARGETS])
    parser.add_argument("--seconds", type=float, help="in all")
    parser.add_argument("--executions", type=int, help="of each target")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", action="store_true", help="add what was found to the corpus")
    parser.add_argument("inputs", nargs="*", help="files that are run once, and nothing else")
    options = parser.parse_args()
    chosen = [each for each in TARGETS if options.only in (None, each.name)]
    build()
    seconds = options.seconds
    if seconds is None and options.executions is None and not SOAK:
        seconds = MINUTE
    for target in chosen:
        if options.keep:
            keep(target)
        elif options.inputs:
            subprocess.run(
                command(target, *options.inputs), check=True, cwd=ROOT, env=environment("")
            )
        elif not fuzz(
            target,
            options.processes,
            None if seconds is None else seconds / len(chosen),
            options.executions or target.soak,
        ):
            sys.exit(f"{target.name}: found something, or did not run to its end")


if __name__ == "__main__":
    main()
