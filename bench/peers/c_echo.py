"""The anchor of every latency figure: the same round trip in C, with nothing around it.

The program is ``epoll_echo.c`` beside this file, or ``busy_echo.c`` for two sides that poll.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.peers.c_program import Program, cpu

__all__ = ["round_trip"]


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
    :param busy: both sides poll instead of sleeping in epoll: one frame at a time.
    :param unix: over a UNIX socket instead of TCP on the loopback address.
    :param window: frames under way at a time; with more than one a rate is measured.
    :returns: ``rate`` (frames a second) with a window, otherwise ``mean_ns``, ``min_ns``,
        ``p50_ns``, ``p99_ns``, ``p999_ns``, ``max_ns``; and what was measured.
    """
    if busy and window > 1:
        raise ValueError("the echo that polls has one frame under way")
    usable = os.sched_getaffinity(0)
    if busy and (len(usable) < 2 or (cpu_server is not None and cpu_server == cpu_client)):
        raise ValueError("two processes that poll without sleeping need two CPUs")
    for number in (cpu_server, cpu_client):
        if number is not None and number not in usable:
            raise ValueError(f"CPU {number} is not among the usable ones: {sorted(usable)}")
    program = "busy_echo" if busy else "epoll_echo"
    # What only the other program has to be told.
    once, rate = ([], []) if busy else (["--once"], ["--window", str(window)])
    with ExitStack() as stack:
        where: list[str] = []
        if unix:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="domi-"))
            where = ["--unix", str(Path(folder, "echo"))]
        # It ends with its connection; what ends it otherwise is for the one that never got any.
        server = stack.enter_context(
            Program(program, "--server", *once, *where, *cpu(cpu_server), timeout=timeout)
        )
        port = server.answer()["port"]
        if not unix:
            where = ["--port", str(port)]
        counts = ["--count", str(count), "--warm-up", str(warm_up), *rate]
        client = stack.enter_context(
            Program(program, "--client", *where, *cpu(cpu_client), *counts, timeout=timeout)
        )
        result = client.answer()
    return {**result, "cpu_server": cpu_server, "cpu_client": cpu_client}


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
