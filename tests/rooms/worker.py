"""A zone or a gateway in a process of its own: ``python -m tests.rooms.worker LOOP``.

One line of JSON each way a command (tests/support.py, Worker).
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
from typing import Any

from domi_fast import Node
from domi_fast.gateway import Gateway, Login
from domi_fast.stateful import SqliteSnapshots, Zone
from tests.conftest import LOOPS
from tests.rooms.groups import Ledger
from tests.rooms.parts import GENEROUS, SERVICE


class Process:
    def __init__(self) -> None:
        self.part: Any = None

    async def zone(self, url: str, file: str | None, node: dict[str, Any], **settings: Any) -> int:
        store = None if file is None else SqliteSnapshots(file)
        made = Node(SERVICE, registry=url, **node)
        self.part = Zone(made, Ledger, snapshots=store, **settings)
        await self.part.start()
        return int(made.id)

    async def gateway(
        self, url: str, node: dict[str, Any], *, password: str = "", **settings: Any
    ) -> dict[str, Any]:
        """Refuses who does not say the password, where there is one."""
        if password:
            settings["authenticate"] = lambda login: judge(login, password.encode())
        gate = self.part = Gateway(Node("gateway", registry=url, **node), **settings)
        gate.handle(60, lambda message: message.reply(61, message.data))
        await gate.start()
        return {"machine": gate.node.id, "port": gate.port, "tcp_port": gate.tcp_port}

    async def generous(self, url: str, node: dict[str, Any], **settings: Any) -> dict[str, Any]:
        return await self.gateway(url, node, **{**GENEROUS, **settings})

    async def said(self, group: int) -> int | None:
        """How much the group has said; None: it is not here."""
        found = self.part.groups.get(group)
        return None if found is None else found.said

    async def usage(self) -> dict[str, int]:
        """What this process has of descriptors and memory, and the gateway of clients."""
        gc.collect()
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
        return {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "memory": pages * os.sysconf("SC_PAGE_SIZE"),
            "sessions": len(self.part.users),
            "connections": self.part.clients,
            "tasks": len(asyncio.all_tasks()),
            "objects": len(gc.get_objects()),
        }


def judge(login: Login, password: bytes) -> bool:
    return login.data == password


async def serve() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    process = Process()
    while line := await reader.readline():
        command, arguments = json.loads(line)
        try:
            answer = "ok", await getattr(process, command)(**arguments)
        except Exception as error:
            answer = "error", repr(error)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    LOOPS[sys.argv[1]]().run_until_complete(serve())
