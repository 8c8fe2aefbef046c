"""A gateway of the chat, which browsers connect to.

All of the chat is started by    python examples/chat/main.py
"""

from __future__ import annotations

import argparse
import json

from domi_fast import Node, run
from domi_fast.errors import AuthError
from domi_fast.gateway import Gateway, Login

MOST_NAME = 24


def admit(login: Login) -> str:
    """Whoever has a name may come in; rooms hear it with each message."""
    name = login.data.decode("utf-8", "replace").strip()
    if not 1 <= len(name) <= MOST_NAME:
        raise AuthError(f"a name of 1 to {MOST_NAME} letters is wanted")
    return name


class Ready:
    """Says where the gateway that was started before it takes clients."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def start(self) -> None:
        print(
            json.dumps({"node": self._gateway.node.id, "port": self._gateway.port}),
            flush=True,
        )

    async def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description="A gateway of the chat: see main.py.")
    parser.add_argument("--registry", required=True, help="URL of the cluster's registry")
    parser.add_argument("--origin", action="append", help="where the page comes from; repeatable")
    options = parser.parse_args()
    node = Node("chat-gateway", registry=options.registry)
    gateway = Gateway(node, service="chat", authenticate=admit, origins=options.origin)
    run(gateway, Ready(gateway))


if __name__ == "__main__":
    main()
