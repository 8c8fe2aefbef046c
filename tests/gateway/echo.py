"""A gateway whose clients hear what they say, whatever it is: for suites that test WebSockets.

All is the gateway's own but for what a whole message is taken for.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from websockets.frames import Frame, Opcode

from domi_fast.gateway import Gateway
from domi_fast.gateway.websocket import WebSocketConnection, WebSocketListener
from tests.gateway.nodes import gateway_of


class EchoConnection(WebSocketConnection):
    def message(self, data: bytes) -> None:
        self.send(data)

    def text(self, data: bytes) -> None:
        self.write(Frame(Opcode.TEXT, data).serialize(mask=False))


@contextlib.asynccontextmanager
async def echo(**settings: Any) -> AsyncIterator[Gateway]:
    gate = gateway_of(rate=1e9, burst=1 << 30, authenticate_timeout=3600.0, **settings)
    gate._websockets = WebSocketListener(gate.config, gate._entrance, EchoConnection)
    async with gate:
        yield gate
