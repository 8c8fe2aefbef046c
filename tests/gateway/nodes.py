"""A node with a gateway, in a cluster of its own."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator
from typing import Any

from domi_fast import Node
from domi_fast.gateway import Gateway


def gateway_of(*, node: dict[str, Any] | None = None, **settings: Any) -> Gateway:
    """
    :param node: settings of its node.
    """
    settings.setdefault("tcp_port", 0)
    url = f"memory://{uuid.uuid4().hex}"
    return Gateway(Node("gate", registry=url, **(node or {})), **settings)


@contextlib.asynccontextmanager
async def gateway(**settings: Any) -> AsyncIterator[Gateway]:
    async with gateway_of(**settings) as gate:
        yield gate
