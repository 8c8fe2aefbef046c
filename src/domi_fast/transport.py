"""Sockets: listening and dialling. What comes out is a detached, non-blocking descriptor."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import weakref
from collections.abc import Callable
from typing import Any

ACCEPTS_A_TURN = 32
ACCEPT_AGAIN = 0.1
BACKLOG = 1024
# Names that are this machine, whatever a resolver says of them: nothing need keep strangers out.
LOOPBACK = {"localhost": ("127.0.0.1", "::1")}


def tune(sock: socket.socket, peer: str) -> socket.socket:
    """Non-blocking, and small frames are not held back.

    :param peer: the other end's address, or a UNIX socket's path.
    """
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        return sock
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if (peer.startswith("127.") or peer == "::1") and hasattr(socket, "TCP_CONGESTION"):
        # Within a machine nothing is congested, and BBR, where it is the default, would pace.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    return sock


class Listener:
    """A listening socket that hands each connection on. Belongs to the loop's thread.

    :param sock: bound and listening, non-blocking.
    :param wanted: asked with the address of each connection; False closes it.
    :param connected: called with (descriptor, address) for those that are; owns the descriptor.
    :param short: called with the error each time that the process has no descriptor, or the kernel
        no memory, for a connection that waits; it is tried again every ``ACCEPT_AGAIN`` seconds.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        wanted: Callable[[str], bool],
        connected: Callable[[int, str], None],
        short: Callable[[OSError], None],
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._wanted = wanted
        self._connected = connected
        self._short = short
        self._retry: asyncio.TimerHandle | None = None
        self._path: str | None = sock.getsockname() if sock.family == socket.AF_UNIX else None
        loop.add_reader(sock.fileno(), self._accept)
        _listeners.add(self)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_A_TURN):
            if self._sock.fileno() < 0:
                return  # closed since the loop saw it readable, or by what was accepted before
            try:
                sock, address = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                # The socket stays readable, so look away for a moment.
                self._loop.remove_reader(self._sock.fileno())
                self._retry = self._loop.call_later(ACCEPT_AGAIN, self._resume)
                self._short(error)
                return
            name = f"unix:{self._path}" if self._path else f"{address[0]}:{address[1]}"
            if self._wanted(name):
                tune(sock, self._path or address[0])
                self._connected(sock.detach(), name)
            else:
                sock.close()

    def _resume(self) -> None:
        self._retry = None
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def abandon(self) -> None:
        """Close the copy of the socket in a forked child; the loop is the parent's."""
        self._sock.close()

    @property
    def port(self) -> int | None:
        return None if self._path else int(self._sock.getsockname()[1])

    def close(self) -> None:
        """Stop listening; a UNIX socket's file goes too."""
        if self._retry is not None:
            self._retry.cancel()
        if self._path:
            # First: once the socket is closed, another process may take the path.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()


_listeners: weakref.WeakSet[Listener] = weakref.WeakSet()


def _abandon_listeners() -> None:
    # A child that keeps its copies would let peers connect to a node that is dead.
    for listener in list(_listeners):
        listener.abandon()


os.register_at_fork(after_in_child=_abandon_listeners)


def _names(host: str) -> list[str | bytes]:
    """What the resolver is asked for: text only where the codec of other alphabets is needed."""
    return [name.encode() if name.isascii() else name for name in LOOPBACK.get(host, (host,))]


def listen_tcp(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises OSError."""
    name = _names(host)[0]
    info = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = info[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise OSError(
            error.errno, f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}"
        ) from None
    sock.setblocking(False)
    return sock


def listen_unix(path: str) -> socket.socket:
    """A listening UNIX socket; a file that a dead process left is replaced. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode) and not _is_served(path):
            os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise OSError(
            error.errno, f"cannot listen on {path}: {os.strerror(error.errno or 0)}"
        ) from None
    sock.setblocking(False)
    return sock


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return True


async def dial(host: str, port: int, unix_path: str | None) -> int:
    """Connect, over the UNIX socket if there is one, else to the first address that answers.

    A detached, non-blocking descriptor. Raises OSError.
    """
    if unix_path is not None:
        return await _dial(socket.AF_UNIX, unix_path, unix_path)
    loop = asyncio.get_running_loop()
    found = [
        each
        for name in _names(host)
        for each in await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    ]
    for family, _, _, _, address in found[:-1]:
        with contextlib.suppress(OSError):
            return await _dial(family, address, str(address[0]))
    family, _, _, _, address = found[-1]
    return await _dial(family, address, str(address[0]))


async def _dial(family: int, address: str | tuple[Any, ...], peer: str) -> int:
    sock = tune(socket.socket(family, socket.SOCK_STREAM), peer)
    try:
        await _connect(sock, address)
        if family != socket.AF_UNIX and sock.getsockname() == sock.getpeername():
            # The kernel may connect a dialler of an ephemeral port to itself.
            raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody listens")
        return sock.detach()
    except BaseException:
        sock.close()
        raise


async def _connect(sock: socket.socket, address: str | tuple[Any, ...]) -> None:
    """As ``loop.sock_connect``, of which uvloop's asks a resolver, in a thread, once more."""
    error = sock.connect_ex(address)
    if error == errno.EINPROGRESS:
        loop = asyncio.get_running_loop()
        writable = asyncio.Event()
        loop.add_writer(sock.fileno(), writable.set)
        try:
            await writable.wait()
        finally:
            loop.remove_writer(sock.fileno())
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))
