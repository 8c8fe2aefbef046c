"""What the tests of several files share: waiting for a condition, nodes, raw peers, processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from domi_fast import Context, FrameReader, Node, encode_frame
from domi_fast.channels import LibraryChannel
from domi_fast.handshake import Offer

if TYPE_CHECKING:
    from typing_extensions import Self

ROOT = Path(__file__).resolve().parent.parent
MAGIC = struct.pack("<I", 2299)


async def until(condition: Callable[[], object], timeout: float = 5.0) -> None:
    """Wait until the condition holds; for what no node can be asked to wait for."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not within {timeout} s: {_text(condition)}"
        await asyncio.sleep(0.002)


def until_now(condition: Callable[[], object], timeout: float = 5.0, pause: float = 0.005) -> None:
    """The same for tests without a loop."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not within {timeout} s: {_text(condition)}"
        time.sleep(pause)


def _text(condition: Callable[[], object]) -> str:
    code = condition.__code__
    return f"{code.co_name} at {code.co_filename}:{code.co_firstlineno}"


def compile_c(source: Path, target: Path, *flags: str) -> Path:
    """Compile one file of C11 with whatever compiles the core; the warnings are errors."""
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    command = [*compiler.split(), "-std=c11", "-D_POSIX_C_SOURCE=200809L", "-Wall", "-Wextra"]
    subprocess.run([*command, "-Werror", str(source), "-o", str(target), *flags], check=True)
    return target


@asynccontextmanager
async def nodes(url: str, *names: str, **settings: Any) -> AsyncIterator[list[Node]]:
    """Nodes of one cluster, all connected with each other."""
    made = [Node(name, registry=url, **settings) for name in names]
    try:
        await asyncio.gather(*(node.start() for node in made))
        for node in made:
            await node.wait_peers(len(made) - 1, 5)
        yield made
    finally:
        await asyncio.gather(*(node.close() for node in made))


@asynccontextmanager
async def busy(client: Node, server: Node) -> AsyncIterator[Callable[[], int]]:
    """With requests under way, none of which fails; how many were answered."""
    if 50 not in server.channels:
        server.subscribe(50, lambda ctx: ctx.reply(ctx.data))
    await client.wait_subscribed(50, timeout=10)
    answered = 0
    over = asyncio.Event()

    async def load() -> None:
        nonlocal answered
        while not over.is_set():
            assert await client.request(50, b"x") == b"x"
            answered += 1
            await asyncio.sleep(0.001)

    loading = asyncio.ensure_future(load())
    try:
        yield lambda: answered
    finally:
        over.set()
        await loading


def forget_records(caplog: pytest.LogCaptureFixture) -> None:
    """Let go of what was logged: a record keeps the traceback, and that the message handled."""
    for phase in ("setup", "call"):
        caplog.get_records(phase).clear()
    caplog.clear()


def session(node: Any, machine: int) -> Any:
    """The live session of a node with another."""
    found = node._router.session(machine)
    assert found is not None, f"node {node.id} has no session with node {machine}"
    return found


def link(one: Node, other: Node) -> tuple[Any, Any]:
    """Both ends of the session between two nodes."""
    return session(one, other.id), session(other, one.id)


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """A stretch of time without pauses by the garbage collector."""
    import gc

    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------------- handlers


def echo(ctx: Context) -> None:
    ctx.reply(ctx.data)


def endings(request: Any) -> list[str]:
    """How the request ends, once for each time that it ends."""
    found: list[str] = []

    def ended(done: Any) -> None:
        if done.cancelled():
            found.append("cancelled")
        elif done.exception() is not None:
            found.append(type(done.exception()).__name__)
        else:
            found.append("answer")

    request.add_done_callback(ended)
    return found


# --------------------------------------------------------------------------------------- raw peers


class RawPeer:
    """A peer made of a bare socket, which does only what a test tells it to do."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.reader = FrameReader()
        self.frames: list[Any] = []

    @classmethod
    async def connect(
        cls, port: int, *, receive_buffer: int | None = None, source: str = "127.0.0.1"
    ) -> Self:
        sock = socket.socket()
        sock.bind((source, 0))
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        return cls(sock)

    @classmethod
    async def plain(cls, node: Node, machine: int, *, receive_buffer: int | None = None) -> RawPeer:
        """A peer that speaks the original protocol and has been taken in."""
        peer = await cls.connect(node.port, receive_buffer=receive_buffer)
        name = encode_frame(LibraryChannel.NODE_NAME, struct.pack("<H", machine))
        await peer.send(MAGIC + name)
        await until(lambda: machine in node.peers)
        return peer

    @classmethod
    async def guest(cls, node: Node, name: str = "raw") -> RawPeer:
        """A guest that has been taken in."""
        peer = await cls.connect(node.port)
        await peer.send(guest_greeting(name))
        assert (await peer.frame()).channel == LibraryChannel.WELCOME
        return peer

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def frame(self, timeout: float = 5.0) -> Any:
        """The next frame; EOFError when there will be none."""
        while not self.frames:
            data = await asyncio.wait_for(
                asyncio.get_running_loop().sock_recv(self.sock, 1 << 20), timeout
            )
            if not data:
                raise EOFError
            self.frames += self.reader.feed(data)
        return self.frames.pop(0)

    async def frame_on(self, channel: int, timeout: float = 5.0) -> Any:
        """The next frame of this channel; the others are passed over."""
        while True:
            frame = await self.frame(timeout)
            if frame.channel == channel:
                return frame

    def reset(self) -> None:
        """Close with RST: what lies unread on either side is thrown away."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        self.sock.close()


def guest_greeting(name: str = "raw") -> bytes:
    """The bytes by which a guest introduces itself."""
    offer = Offer(name, "0", "", epoch=0, instance=os.urandom(16))
    return MAGIC + encode_frame(LibraryChannel.GUEST_NAME, offer.encode())


# --------------------------------------------------------------------------------------- processes


def environment() -> dict[str, str]:
    """This process's, for one that runs elsewhere: the paths of Python are absolute."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in paths if p)}


class Worker:
    """A process that runs nodes (tests/cluster/worker.py): one JSON line each way a command.

    :param program: a module with other commands.
    """

    def __init__(self, loop: str = "uvloop", program: str = "tests.cluster.worker") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", program, loop],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment(),
        )
        self._buffer = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, command: str, **arguments: Any) -> None:
        """Send a command; ``answer`` gets its result."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, arguments]).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, timeout: float = 30.0) -> Any:
        """The result of the oldest command that has none yet."""
        assert self.process.stdout is not None
        end = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = end - time.monotonic()
            assert left > 0, f"process {self.pid} did not answer within {timeout} s"
            if select.select([self.process.stdout], [], [], left)[0]:
                data = os.read(self.process.stdout.fileno(), 1 << 20)
                assert data, f"process {self.pid} ended: {self.process.wait(10)}"
                self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        kind, result = json.loads(line)
        assert kind == "ok", f"process {self.pid}: {result}"
        return result

    def ask(self, command: str, *, wait: float = 30.0, **arguments: Any) -> Any:
        self.tell(command, **arguments)
        return self.answer(wait)

    async def ask_later(self, command: str, *, wait: float = 30.0, **arguments: Any) -> Any:
        """``ask`` while this process's own loop goes on."""
        self.tell(command, **arguments)
        return await asyncio.to_thread(self.answer, wait)

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)

    def reap(self) -> None:
        """End it, whatever state it is in, and collect what is left of it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@contextlib.contextmanager
def workers(*loops: str) -> Iterator[list[Worker]]:
    """A process for each loop named; none of them outlives the block."""
    started: list[Worker] = []
    try:
        for loop in loops:
            started.append(Worker(loop))  # noqa: PERF401 - each must be reaped once it is there
        yield started
    finally:
        for worker in started:
            worker.reap()


def slowness() -> float:
    """How many times longer than alone this process takes now, because others use the machine."""
    begun, used = time.monotonic(), time.process_time()
    while time.process_time() - used < 0.05:
        pass
    return max(1.0, (time.monotonic() - begun) / 0.05)
