"""The anchor of every latency figure: the same round trip in C, with nothing around it.

The program is ``epoll_echo.c`` beside this file, or ``busy_echo.c`` for two sides that poll; it is
compiled when it is first needed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUT = Path(__file__).resolve().parents[1] / "out"

__all__ = ["build", "round_trip"]


def build(name: str = "epoll_echo") -> Path:
    """Compiles the program if its source is newer, and returns where it is."""
    program = OUT / name
    source = HERE / f"{name}.c"
    newest = max(path.stat().st_mtime for path in (source, HERE / "echo.h"))
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


def round_trip(
    cpu_server: int | None = None,
    cpu_client: int | None = None,
    count: int = 100_000,
    busy: bool = False,
    unix: bool = False,
    *,
    warm_up: int = 5_000,
    window: int = 1,
    timeout: float = 120.0,
) -> dict[str, Any]:
    """Measures ``count`` round trips of a 12-byte frame between two processes.

    :param cpu_server: the CPU that the server is pinned to, or ``None``.
    :param cpu_client: the same for the client.
    :param busy: both sides poll instead of sleeping in epoll: over TCP, one frame at a time.
    :param unix: over a UNIX socket instead of TCP on the loopback address.
    :param window: frames under way at a time; with more than one a rate is measured.
    :returns: ``rate`` (frames a second) with a window, otherwise ``mean_ns``, ``min_ns``,
        ``p50_ns``, ``p99_ns``, ``p999_ns``, ``max_ns``; and what was measured.
    """
    usable = os.sched_getaffinity(0)
    if busy and (len(usable) < 2 or (cpu_server is not None and cpu_server == cpu_client)):
        raise ValueError("two processes that poll without sleeping need two CPUs")
    if busy and (unix or window > 1):
        raise ValueError("the echo that polls goes over TCP, and has one frame under way")
    for cpu in (cpu_server, cpu_client):
        if cpu is not None and cpu not in usable:
            raise ValueError(f"CPU {cpu} is not among the usable ones: {sorted(usable)}")
    program = str(build("busy_echo" if busy else "epoll_echo"))
    # What only the other program has to be told.
    once, rate = ([], []) if busy else (["--once"], ["--window", str(window)])
    with ExitStack() as stack:
        where: list[str] = []
        if unix:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="domi-"))
            where = ["--unix", str(Path(folder, "echo"))]
        server = subprocess.Popen(
            [program, "--server", *once, *where, *_cpu(cpu_server)],
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(_end, server)
        assert server.stdout is not None
        hello = server.stdout.readline()
        if not hello:
            raise RuntimeError(f"the echo server ended with code {server.wait()}")
        if not unix:
            where = ["--port", str(json.loads(hello)["port"])]
        command = [program, "--client", *where, *_cpu(cpu_client)]
        command += ["--count", str(count), "--warm-up", str(warm_up), *rate]
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, timeout=timeout
        )
    result: dict[str, Any] = json.loads(done.stdout)
    return {**result, "cpu_server": cpu_server, "cpu_client": cpu_client}


def _cpu(cpu: int | None) -> list[str]:
    return [] if cpu is None else ["--cpu", str(cpu)]


def _end(server: subprocess.Popen[str]) -> None:
    # The server ends with its connection; kill is for the one that never got any.
    try:
        server.wait(1.0)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    if server.stdout is not None:
        server.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers.c_echo", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--cpu-server", type=int, metavar="N", help="pin the server to this CPU")
    parser.add_argument("--cpu-client", type=int, metavar="N", help="pin the client to this CPU")
    parser.add_argument("--count", type=int, default=100_000, help="round trips to measure")
    parser.add_argument("--warm-up", type=int, default=5_000, help="round trips before them")
    parser.add_argument("--window", type=int, default=1, help="frames under way: for a rate")
    parser.add_argument("--busy", action="store_true", help="poll instead of sleeping in epoll")
    parser.add_argument("--unix", action="store_true", help="a UNIX socket instead of TCP")
    given = parser.parse_args()
    try:
        result = round_trip(
            given.cpu_server,
            given.cpu_client,
            given.count,
            given.busy,
            given.unix,
            warm_up=given.warm_up,
            window=given.window,
        )
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
