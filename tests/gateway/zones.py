"""A zone that does what the test says, and keeps what gateways tell it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from domi_fast import Context, LibraryChannel, Node
from domi_fast.gateway import wire
from domi_fast.gateway.ids import Ids
from domi_fast.gateway.wire import ToGateway, ToZone
from domi_fast.gateway.zones import kind_of
from tests.support import until


class ScriptedZone:
    """Opens what it is asked to, unless ``closes`` says what else it answers.

    :ivar said: what gateways have said, but for HELLO: kind, machine id, the message.
    :ivar closes: for a group: the refusal, and the machine id of where it is.
    :ivar silent: whether it answers no OPEN.
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        self.said: asyncio.Queue[tuple[ToZone, int, bytes]] = asyncio.Queue()
        self.closes: dict[int, tuple[int, int]] = {}
        self.silent = False
        self.opened: list[int] = []
        self.state: dict[str, Any] = {
            "zone": Ids(node.id).next(),
            "service": node.config.name,
            "version": node.config.version,
            "open": True,
            "full": False,
            "memory": 0.5,
            "groups": 0,
            "users": 0,
            "host": "127.0.0.1",
            "port": node.port,
        }
        node.subscribe(LibraryChannel.ZONE, self._hear)

    @property
    def id(self) -> int:
        return int(self.state["zone"])

    def publish(self, **changes: Any) -> None:
        self.state.update(changes)
        self.node.publish(LibraryChannel.GATEWAY, self._state())

    def tell(self, gateway: Node, message: bytes) -> None:
        self.node.notify(LibraryChannel.GATEWAY, message, to=gateway.id)

    async def claim(self, group: int) -> Any:
        """Take the group's name in the registry."""
        return await self.node.cluster.names(kind_of(self.node.config.name)).claim(str(group))

    async def hear(self, kind: ToZone) -> tuple[int, bytes]:
        """The machine id and the message that come next, which are of this kind."""
        what, machine, raw = await asyncio.wait_for(self.said.get(), 10)
        assert what is kind, (what, raw)
        return machine, raw

    async def message(self) -> wire.UserMessage:
        _, raw = await self.hear(ToZone.MESSAGE)
        return wire.parse_message(raw)

    def _state(self) -> bytes:
        return bytes((ToGateway.STATE,)) + json.dumps(self.state).encode()

    def _hear(self, context: Context) -> None:
        kind, raw = ToZone(context.data[0]), context.data
        if kind is ToZone.HELLO:
            self.node.notify(LibraryChannel.GATEWAY, self._state(), to=context.sender)
            return
        if kind is not ToZone.OPEN:
            self.said.put_nowait((kind, context.sender, raw))
            return
        _, group = wire.unpack(wire.GROUP, raw)
        self.opened.append(group)
        if self.silent:
            return
        if group in self.closes:
            code, elsewhere = self.closes[group]
            answer = wire.closed(group, code, elsewhere, "as the test says")
        else:
            answer = wire.group(ToGateway.OPENED, group)
        self.node.notify(LibraryChannel.GATEWAY, answer, to=context.sender)


@contextlib.asynccontextmanager
async def zone(gate: Any, name: str = "room", **settings: Any) -> AsyncIterator[ScriptedZone]:
    """A zone that the gateway knows."""
    async with Node(name, registry=gate.node.config.registry, **settings) as node:
        scripted = ScriptedZone(node)
        scripted.publish()
        await node.wait_subscribed(LibraryChannel.GATEWAY)
        scripted.publish()
        await until(lambda: gate.zones.has(node.id))
        yield scripted
