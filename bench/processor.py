"""Time that processes wanted a processor for and had none: of a machine that others work on."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

__all__ = ["kept_waiting"]


def kept_waiting(*processes: int) -> float:
    """Seconds that these, or this one, could have run and had no processor; 0 where nobody counts
    them.
    """
    waited = 0
    with suppress(OSError):
        for process in processes or ("self",):
            waited += int(Path(f"/proc/{process}/schedstat").read_text().split()[1])
    return waited * 1e-9
