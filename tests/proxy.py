"""A way to a server that a test can cut."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable


class Proxy:
    """Passes bytes on between whoever connects to ``port`` and a server, on the test's own loop.

    While it is cut nothing gets through and nobody is told, as when a cable is pulled; what was
    under way arrives when it is mended. What was connected when it was deadened stays so for ever.

    :ivar through: what is made of the bytes on their way.
    """

    def __init__(self, server_port: int) -> None:
        self.port = 0
        self.through: Callable[[bytes], bytes] = bytes
        self._server_port = server_port
        self._whole = asyncio.Event()
        self._whole.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._dead: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None

    async def __aenter__(self) -> Proxy:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._listener is not None
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def connections(self) -> int:
        """How many there are, those that nothing gets through among them."""
        return len(self._tasks)

    def cut(self) -> None:
        self._whole.clear()

    def mend(self) -> None:
        self._whole.set()

    def deaden(self) -> None:
        self._dead |= self._tasks

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._whole.wait()
            there, back = await asyncio.open_connection("127.0.0.1", self._server_port)
            with contextlib.closing(back):
                await asyncio.gather(
                    self._pump(task, reader, back), self._pump(task, there, writer)
                )
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _pump(
        self,
        task: asyncio.Task[None],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        while data := await reader.read(1 << 16):
            await self._whole.wait()
            if task in self._dead:
                continue
            writer.write(self.through(data))
            await writer.drain()
        writer.close()
