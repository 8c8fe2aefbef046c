"""Who is lost for its silence while a serial thread has its session held, and who is not."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from domi_fast import Context, Node
from tests.certificates import Authority
from tests.serial.modes import make_serial
from tests.support import session, until

pytestmark = pytest.mark.usefixtures("threaded")

INTERVAL, TIMEOUT = 0.1, 0.5
BLOCK = bytes(1 << 20)


class Held:
    """Two nodes, of which the second sends, and the thread of the first computes until ``over``.

    :ivar lost: the session that is held, at the first node.
    :ivar ran: what the thread has been given.
    """

    def __init__(self, a: Node, b: Node) -> None:
        self.a, self.b = a, b
        self.lost: Any = session(a, b.id)
        self.ran: list[bytes] = []
        self.over = threading.Event()

    def compute(self, ctx: Context) -> None:
        self.ran.append(ctx.data)
        while not self.over.is_set():
            hashlib.sha256(BLOCK).digest()  # without the interpreter's lock

    def silence(self) -> None:
        """From now on the second node hears nothing, and so says nothing."""
        asyncio.get_running_loop().remove_reader(session(self.b, self.a.id).descriptor)

    async def beats(self, count: int) -> None:
        """Wait until the first node has said so many heartbeats, of eight bytes or more."""
        sent = self.lost.bytes_out
        await until(lambda: self.lost.bytes_out >= sent + 8 * count or self.lost.closed, 20)


@pytest.fixture(params=["tcp", "tls", "unix"])
def way(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Settings of the two nodes, by which they are connected."""
    if request.param == "tls":
        tls = Authority(tmp_path).issue("a", "b")
        return {name: {"tls": tls} for name in "ab"}
    if request.param == "unix":
        return {name: {"unix_path": str(tmp_path / name)} for name in "ab"}
    return {name: {} for name in "ab"}


@asynccontextmanager
async def held(
    registry_url: str, way: dict[str, dict[str, Any]], messages: list[bytes]
) -> AsyncIterator[Held]:
    async with (
        Node(
            "a",
            registry=registry_url,
            heartbeat_interval=INTERVAL,
            heartbeat_timeout=TIMEOUT,
            **way["a"],
        ) as a,
        Node(
            "b", registry=registry_url, heartbeat_interval=60, heartbeat_timeout=120, **way["b"]
        ) as b,
    ):
        await a.wait_peers(1, 5)
        found = Held(a, b)
        serial = make_serial(a, ring_size=4096)
        serial.subscribe(50, found.compute)
        async with serial:
            try:
                await b.wait_subscribed(50, timeout=5)
                b.notify_many(50, messages)
                # The ring has room for less than thirty.
                await until(lambda: serial.backlog > 20)
                yield found
            finally:
                found.over.set()


async def test_who_says_nothing_is_lost(registry_url: str, way: dict[str, dict[str, Any]]) -> None:
    async with held(registry_url, way, [bytes(100)] * 200) as found:
        found.silence()
        begun = asyncio.get_running_loop().time()
        await until(lambda: found.lost.closed, 10)
        assert asyncio.get_running_loop().time() - begun < 6 * TIMEOUT
        assert found.lost.reason.startswith("silent for")
        assert found.a.counters()["peers_silent"] == 1
        # It was held all the time.
        assert len(found.ran) == 1
        assert found.lost.frames_in < 150


async def test_who_says_something_is_kept(
    registry_url: str, way: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is heard though nobody reads what it says, and the loop looks now and again only."""
    loop = asyncio.get_running_loop()
    call_later, armed = loop.call_later, 0

    def counted(delay: float, callback: Any, *args: Any, **context: Any) -> Any:
        nonlocal armed
        # One that calls early, as its loop rounds, is asked for the rest: that is no other timer.
        armed += getattr(callback, "__name__", "") == "on_timer" and delay > 0.0005
        return call_later(delay, callback, *args, **context)

    async with held(registry_url, way, [bytes(100)] * 200) as found:
        monkeypatch.setattr(loop, "call_later", counted)
        begun = loop.time()
        await found.beats(int(4 * TIMEOUT / INTERVAL))
        # The scheduler looks a hundred times a second whether its thread keeps going.
        assert armed < 300 * (loop.time() - begun)
        assert not found.lost.closed
        await until(lambda: found.a.peers[found.b.id].phi < 1)
        assert len(found.ran) == 1
        found.silence()
        await until(lambda: found.lost.closed, 10)
        assert found.lost.reason.startswith("silent for")
        assert found.lost.frames_in < 150


async def test_who_can_say_no_more_is_kept(
    registry_url: str, way: dict[str, dict[str, Any]]
) -> None:
    """What it has sent fills the sockets, and its heartbeats wait behind that."""
    messages = [b"%0100d" % number for number in range(80_000)]
    async with held(registry_url, way, messages) as found:
        await found.beats(int(4 * TIMEOUT / INTERVAL))
        assert not found.lost.closed
        assert found.b.peers[found.a.id].queued > 1 << 20
        assert len(found.ran) == 1
        found.over.set()
        await until(lambda: len(found.ran) == len(messages), 60)
        assert found.ran == messages
        assert not found.lost.closed


async def test_who_has_said_goodbye_is_read_to_the_end(
    registry_url: str, way: dict[str, dict[str, Any]]
) -> None:
    messages = [b"%0100d" % number for number in range(500)]
    async with held(registry_url, way, messages) as found:
        await found.b.close()
        # Nothing will happen that could be waited for.
        await asyncio.sleep(4 * TIMEOUT)
        assert not found.lost.closed
        found.over.set()
        await until(lambda: len(found.ran) == len(messages), 20)
        assert found.ran == messages
        assert found.a.counters()["peers_silent"] == 0
