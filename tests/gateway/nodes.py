"""A node with a gateway, in a cluster of its own."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator
from typing import Any

from domi_fast import Node
from domi_fast.gateway import Gateway


@contextlib.asynccontextmanager
async def gateway(**settings: Any) -> AsyncIterator[Gateway]:
    settings.setdefault("tcp_port", 0)
    node = Node("gate", registry=f"memory://{uuid.uuid4().hex}")
    async with Gateway(node, **settings) as gate:
        yield gate
