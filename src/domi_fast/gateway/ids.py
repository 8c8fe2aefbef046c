"""Ids of 64 bits that no other in the cluster has, and that say which node made them.

From the top: 0, 41 bits of milliseconds since 2024, 10 bits of machine id, 12 bits that count
(after Twitter's Snowflake, 2010). All are above 1,023, and so none is a machine id.
"""

from __future__ import annotations

import time
from typing import Final

_EPOCH: Final = 1_704_067_200_000
_COUNT_BITS: Final = 12
_MACHINE_BITS: Final = 10
_MACHINES: Final = 1 << _MACHINE_BITS


class Ids:
    """Makes ids for one node. Its time never goes back, and runs ahead rather than repeat itself.

    :param machine: the node's machine id, 0-1023.
    """

    def __init__(self, machine: int) -> None:
        if not 0 <= machine < _MACHINES:
            raise ValueError(f"machine id {machine}: 0 to {_MACHINES - 1} are allowed")
        self._machine = machine << _COUNT_BITS
        self._offset = time.time_ns() - time.monotonic_ns()
        self._last = 0

    def next(self) -> int:
        """Another id."""
        now = (self._offset + time.monotonic_ns()) // 1_000_000 - _EPOCH
        # Milliseconds and the count as one number, the machine put between them afterwards.
        self._last = max(self._last + 1, now << _COUNT_BITS)
        moment, count = self._last >> _COUNT_BITS, self._last & ((1 << _COUNT_BITS) - 1)
        return (moment << (_MACHINE_BITS + _COUNT_BITS)) | self._machine | count


def machine_of(id: int) -> int:
    """The machine id of the node that made it."""
    return (id >> _COUNT_BITS) & (_MACHINES - 1)
