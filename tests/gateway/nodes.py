"""A node with a gateway, in a cluster of its own."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator
from typing import Any

from domi_fast import Node
from domi_fast.gateway import Gateway


def gateway_of(**settings: Any) -> Gateway:
    settings.setdefault("tcp_port", 0)
    return Gateway(Node("gate", registry=f"memory://{uuid.uuid4().hex}"), **settings)


@contextlib.asynccontextmanager
async def gateway(**settings: Any) -> AsyncIterator[Gateway]:
    async with gateway_of(**settings) as gate:
        yield gate
