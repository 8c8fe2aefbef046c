"""How much memory a process has: what a connection costs is the difference of two readings."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

PAGE = os.sysconf("SC_PAGE_SIZE")

__all__ = ["memory", "resident", "trim"]


def resident(process: int | str = "self") -> int:
    """Bytes of a process that are in memory, by the second number of ``statm``."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE


def trim() -> None:
    """Have unreferenced cycles freed and free memory given back to the system."""
    gc.collect()
    with suppress(AttributeError):  # not the GNU libc
        ctypes.CDLL(None).malloc_trim(0)


async def memory() -> dict[str, Any]:
    """Resident bytes as they are, and once all that is free has been given back."""
    as_is = resident()
    trim()
    # Dispatch leftovers of the loop's last turns belong to the past, not to the connections.
    await asyncio.sleep(0.05)
    trim()
    return {"rss": as_is, "rss_trimmed": resident()}
