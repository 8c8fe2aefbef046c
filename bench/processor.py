"""Who gets which processor on a machine that others work on: going last, having waited, staying."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["below_everybody", "kept_waiting", "stay"]


def below_everybody(process: int = 0) -> str:
    """Have every process go before this one, or the one given, on its CPU; how that was done."""
    try:
        os.sched_setscheduler(process, os.SCHED_IDLE, os.sched_param(0))
    except OSError:
        os.setpriority(os.PRIO_PROCESS, process, 19)
        return f"nice {os.getpriority(os.PRIO_PROCESS, process)}"
    return "SCHED_IDLE"


def stay(process: int, cpu: int) -> None:
    """Keep a process on one CPU from now on, with all the threads that it has.

    One that has ended meanwhile is nobody's error here: whoever asks it will hear of it.
    """
    with suppress(FileNotFoundError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), {cpu})


def kept_waiting(*processes: int) -> float:
    """Seconds that the threads of these processes, or of this one, could have run and had no
    processor; 0 where nobody counts them. Those that have ended are left out, and of a process
    that has, all.
    """
    waited = 0
    for process in processes or ("self",):
        for thread in Path(f"/proc/{process}/task").glob("*/schedstat"):
            with suppress(FileNotFoundError, ProcessLookupError):
                waited += int(thread.read_text().split()[1])
    return waited * 1e-9
