"""The program that valgrind runs: one path, prepared, warmed up, and done between two marks."""

from __future__ import annotations

import argparse
import ctypes
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench.guard.paths import PATHS
from bench.two_process.commands import run

WARM_UPS = 3  # after which every table has grown and every free list is full

__all__ = ["do"]


async def do(name: str, begin: Callable[[], object], end: Callable[[], object]) -> None:
    """Do the path; ``begin`` and ``end`` are called around the part that counts."""
    with tempfile.TemporaryDirectory(prefix="domi-guard-") as folder:
        async with PATHS[name].prepared(Path(folder)) as work:
            for _ in range(WARM_UPS):
                await work.run()
                await work.check()
            # How much there is to collect says nothing of the path.
            gc.collect()
            gc.disable()
            try:
                begin()
                await work.run()
                end()
            finally:
                gc.enable()
            await work.check()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=PATHS)
    given = parser.parse_args()
    meter = ctypes.CDLL(None)  # preloaded
    run(do(given.name, meter.meter_begin, meter.meter_end))


if __name__ == "__main__":
    main()
