"""The keys that nodes hold for a while, and what stands under them: who it is that holds them.

Elections, locks and names have this in common.
"""

from __future__ import annotations

import asyncio
import json
import re

from .config import NodeConfig
from .errors import DomiError, RegistryError
from .holder import Holder
from .membership import Membership
from .registry.base import Entry

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


class Keys:
    """Reads and writes keys of one cluster for one node. Belongs to the node's loop."""

    def __init__(self, config: NodeConfig, members: Membership) -> None:
        self._config = config
        self._members = members
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def machine(self) -> int:
        """This node's machine id."""
        return self._members.id

    def open(self) -> None:
        """The node starts, on this loop."""
        self._loop = asyncio.get_running_loop()

    def check(self) -> None:
        """Raise DomiError unless the node has started, on this loop."""
        if self._loop is None or self._members.id < 0:
            raise DomiError(
                "the node has not started: elections, locks and names come after its start()"
            )
        if asyncio.get_running_loop() is not self._loop:
            raise DomiError("the node belongs to another event loop: use its cluster there")

    def key(self, folder: str, *names: str) -> str:
        """Where it stands in the registry. Raises ValueError for a name that is not allowed."""
        for name in names:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(
                    f"name {name!r}: 1 to 128 letters, digits, '.', '_' and '-' are allowed, and "
                    "no '.' in front"
                )
        return "/".join(("domi", self._config.cluster, folder, *names))

    def sign(self, value: bytes = b"") -> bytes:
        """What this node writes there, with a value of its own behind."""
        members = self._members
        head = {"id": members.id, "name": self._config.name, "mark": members.offer.mark.hex()}
        return json.dumps(head).encode() + b"\n" + value

    def read(self, entry: Entry) -> tuple[Holder, bool]:
        """Who wrote it, by the machine id that it has now, and whether it was this node.

        Raises RegistryError when no node did.
        """
        head, _, value = entry.value.partition(b"\n")
        try:
            fields = json.loads(head)
            mark = bytes.fromhex(fields["mark"])
            known = self._members.locate(mark)
            machine = int(fields["id"]) if known is None else known
            holder = Holder(machine, str(fields["name"]), value, entry.epoch)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RegistryError(
                f"registry entry {entry.key} is not a holder's: {error!r}"
            ) from None
        return holder, mark == self._members.offer.mark
