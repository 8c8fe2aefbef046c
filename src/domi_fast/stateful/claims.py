"""Claims: the names of groups in the registry, and what is said of a group that is not here."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from ..errors import RegistryError
from ..gateway import wire
from ..names import Name

log = logging.getLogger(__name__)

# Seconds between two attempts to claim what was taken or could not be asked for.
RETRY_PAUSE: Final = 0.02


class Closed(Exception):
    """The group is not opened here.

    :ivar code: why, or 0: it is elsewhere.
    :ivar elsewhere: the machine id of where it is, or NOWHERE: ask again.
    """

    def __init__(self, code: int, elsewhere: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.elsewhere = elsewhere

    def answer(self, group: int) -> bytes:
        return wire.closed(group, self.code, self.elsewhere, str(self))


async def give_back(name: Name) -> None:
    """Release it, however long that takes."""
    while True:
        if await _given_back(name):
            return
        await asyncio.sleep(RETRY_PAUSE * 10)


async def _given_back(name: Name) -> bool:
    try:
        await name.release()
    except (RegistryError, OSError) as error:
        log.warning("the name %s cannot be given back yet: %s", name.name, error)
        return False
    return True
