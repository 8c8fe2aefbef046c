"""A TCP port that clients connect to."""

from __future__ import annotations

import asyncio
import socket
import ssl
from abc import ABC, abstractmethod
from typing import Final

from ..transport import listen_tcp

HANDSHAKE_TIME: Final = 10.0


class Port(ABC):
    """Listens from ``start`` to ``close``. Belongs to the loop that started it.

    :param setting: what the port is called in the settings.
    :ivar port: the TCP port, once it has started.
    """

    def __init__(self, setting: str, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        self._setting = setting
        self._host = host
        self._wanted = port
        self._tls = tls
        self._server: asyncio.Server | None = None
        self.port: int | None = None

    @abstractmethod
    def protocol(self) -> asyncio.Protocol:
        """What serves one connection."""

    async def start(self) -> None:
        """Listen. Raises OSError, which names the address, when that cannot be."""
        try:
            sock = listen_tcp(self._host, self._wanted)
        except OSError as error:
            raise OSError(error.errno, f"{self._setting}: {error.strerror}") from None
        self.port = int(sock.getsockname()[1])
        try:
            self._server = await asyncio.get_running_loop().create_server(
                self.protocol,
                sock=sock,
                ssl=self._tls,
                ssl_handshake_timeout=None if self._tls is None else HANDSHAKE_TIME,
                backlog=socket.SOMAXCONN,
            )
        except BaseException:
            sock.close()
            raise

    def stop(self) -> None:
        """Take no more connections."""
        if self._server is not None:
            self._server.close()

    async def close(self) -> None:
        """Wait until it listens no more."""
        self.stop()
