"""How much is measured, where and in what order."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Settings", "Skip", "choose_cpus", "in_turn"]


class Skip(Exception):
    """A benchmark cannot be run on this machine."""


@dataclass(frozen=True)
class Settings:
    """How much is measured, and where.

    :ivar cpus: one processor or two: servers run on the first, clients on the second.
    """

    rounds: int
    smoke: bool
    cpus: tuple[int, ...]

    @property
    def fewer_rounds(self) -> int:
        """Of what takes long, or hardly differs."""
        return max(1, self.rounds // 2)

    def few(self, count: int) -> int:
        """That many, or next to nothing for a smoke test."""
        return max(1, count // 100) if self.smoke else count

    def pair(self) -> tuple[int, int]:
        if len(self.cpus) < 2:
            raise Skip("it needs two processors")
        return self.cpus[0], self.cpus[1]


def choose_cpus() -> tuple[int, ...]:
    """Two usable processors, on cores of their own where that can be told; or the only one."""
    chosen: dict[tuple[str, str], int] = {}
    usable = sorted(os.sched_getaffinity(0))
    for cpu in usable:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            package = (topology / "physical_package_id").read_text().strip()
            core = (topology / "core_id").read_text().strip()
        except OSError:
            package, core = "", str(cpu)
        chosen.setdefault((package, core), cpu)
    found = sorted(chosen.values())[:2]
    return tuple(found if len(found) == 2 else usable[:2])


def in_turn(number: int, *steps: Callable[[], None]) -> None:
    """All of them, in the other order in every second round: none always has the warmer machine."""
    for step in steps if number % 2 == 0 else reversed(steps):
        step()
