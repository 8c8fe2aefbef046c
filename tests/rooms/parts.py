"""Real zones and gateways of one cluster."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from domi_fast import LibraryChannel, Node
from domi_fast.gateway import Gateway
from domi_fast.stateful import Zone
from tests.rooms.groups import Ledger
from tests.support import until

SERVICE = "room"
GENEROUS: dict[str, Any] = {
    "tcp_port": 0,
    "rate": 1e6,
    "burst": 1_000_000,
    "groups_per_client": 1 << 16,
    "history": 1 << 18,
    "history_bytes": 1 << 28,
    "write_limit": 1 << 28,
}
"""Settings of a gateway whose limits nobody meets."""


class Memory:
    """What a zone's ``memory`` says: the share in use."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self) -> float:
        return self.share


def ledger(of: Zone, id: int) -> Ledger:
    """The group of this id."""
    found = of.group(id)
    assert isinstance(found, Ledger)
    return found


@contextlib.asynccontextmanager
async def gateway(
    url: str, *, node: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[Gateway]:
    """A gateway on a node of its own; ``node`` are that one's settings."""
    settings = {**GENEROUS, **settings}
    made = Node(**{"name": "gateway", "registry": url, **(node or {})})
    async with Gateway(made, **settings) as gate:
        yield gate


@contextlib.asynccontextmanager
async def zone(
    url: str, factory: Any = Ledger, *, node: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[Zone]:
    """A zone of the service "room", on a node of its own; ``node`` are that one's settings."""
    made = Node(**{"name": SERVICE, "registry": url, **(node or {})})
    async with Zone(made, factory, **settings) as one:
        yield one


async def acquainted(gateways: list[Gateway], zones: list[Zone]) -> None:
    """Until each gateway knows each zone, and each zone can tell each gateway."""
    for gate in gateways:
        for each in zones:
            await until(lambda gate=gate, each=each: gate.zones.has(each.node.id))
            await until(
                lambda gate=gate, each=each: (
                    gate.node.id in each.node.peers
                    and LibraryChannel.GATEWAY in each.node.peers[gate.node.id].channels
                )
            )
    for each in zones:
        for other in zones:
            if other is not each:
                await until(lambda each=each, other=other: other.node.id in each.node.peers)
