"""A worker's side of its pipe: commands come in as lines of JSON, an answer goes out for each.

A worker ends when its input does, so that none outlives the program that started it.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import traceback
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

import uvloop

# Heartbeats so far apart that thousands of sessions in one process are idle when they should be.
CALM: dict[str, Any] = {"heartbeat_interval": 60.0, "heartbeat_timeout": 180.0}

Command = Callable[..., Awaitable[dict[str, Any]]]

# By the name of the loop.
RUNNERS: dict[str, Callable[[Coroutine[Any, Any, None]], None]] = {
    "uvloop": uvloop.run,
    "asyncio": asyncio.run,
}

__all__ = [
    "CALM",
    "RUNNERS",
    "Command",
    "check",
    "open_many_files",
    "percentiles",
    "pin",
    "run",
    "serve",
    "tell",
]


def pin(cpu: int | None) -> None:
    """Keep this process, and the threads that it will start, on one CPU."""
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
        # A node that polls has this one to itself, or is to show what becomes of it if not.
        warnings.filterwarnings("ignore", "busy_poll: ", RuntimeWarning)


def open_many_files() -> int:
    """Have this process open as many files as it may at all; how many."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def check(is_right: bool, what: str) -> None:
    """What was measured is nothing otherwise.

    :raises RuntimeError: with what it says; it breaks the benchmark.
    """
    if not is_right:
        raise RuntimeError(what)


def tell(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def percentiles(taken: Iterable[int]) -> dict[str, float]:
    """Nanoseconds, by the nearest rank: what the anchor in C prints of its own."""
    ordered = sorted(taken)
    count = len(ordered)

    def at(share: float) -> int:
        return ordered[min(count - 1, max(0, -int(-share * count // 1) - 1))]

    return {
        "count": count,
        "mean_ns": sum(ordered) / count,
        "min_ns": ordered[0],
        "p50_ns": at(0.5),
        "p99_ns": at(0.99),
        "p999_ns": at(0.999),
        "max_ns": ordered[-1],
    }


async def serve(commands: dict[str, Command], **ready: Any) -> None:
    """Say what is ready, then carry out one command after the other until the input ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tell({"ready": True, "loop": type(loop).__module__.partition(".")[0], **ready})
    while line := await reader.readline():
        arguments = json.loads(line)
        command = commands[arguments.pop("do")]
        try:
            answer = await command(**arguments)
        except Exception:
            tell({"error": traceback.format_exc(limit=-4)})
        else:
            tell(answer)


def run(work: Coroutine[Any, Any, None], loop: str = "uvloop") -> None:
    """On uvloop, as the library's own ``run`` does, or on asyncio's selector loop."""
    RUNNERS[loop](work)
