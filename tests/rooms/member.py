"""A member of a group: a client that talks all the time, and comes back when it is cut off."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from typing import Any

from websockets.exceptions import InvalidHandshake

from tests.gateway.clients import GROUP, LOST, REFUSED, Client, Closed, connected
from tests.reference import encode
from tests.rooms.groups import JOIN, SAID, SAY, SPOKEN

_REDIAL = 0.02
_COMES_BACK = (1006, 4003, 4004, 4005)


class Member:
    """Keeps what it has sent until nobody can want it again, and all that it is told.

    :ivar told: every counted frame: its event and data.
    :ivar serials: the numbers of what the group has said, as they came.
    :ivar faults: what no member may see: a gap in what the group says or in what one user says, a
        frame that comes twice, and, but where that is expected, LOST and REFUSED.
    :ivar longest_gap: seconds between two words of the group.
    :ivar resumptions: how often it has resumed its session.
    """

    def __init__(
        self, gateway: Any, carrier: str, group: int, *, expects_loss: bool = False
    ) -> None:
        self.gateway = gateway
        self.carrier = carrier
        self.group = group
        self.user = 0
        self.told: list[tuple[int, bytes]] = []
        self.serials: list[int] = []
        self.faults: list[str] = []
        self.longest_gap = 0.0
        self.resumptions = 0
        self.said = 0
        self.joined = asyncio.Event()
        self.lost = asyncio.Event()
        self.closed: Closed | None = None
        self._expects_loss = expects_loss
        self._outbox: list[bytes] = []
        self._filled = asyncio.Event()
        self._turns: dict[int, int] = {}
        self._heard_at: float | None = None
        self._client: Client | None = None
        self._session = b""
        self._received = 0
        self._over = False
        self._tasks: list[asyncio.Task[None]] = []

    # ------------------------------------------------------------------ what tests have it do

    async def __aenter__(self) -> Member:
        self._tasks.append(asyncio.ensure_future(self._live()))
        self.write(JOIN)
        await asyncio.wait_for(self.joined.wait(), 20)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over = True
        # A wait that has its result at this very moment takes no notice of its cancellation.
        while pending := [task for task in self._tasks if not task.done()]:
            for task in pending:
                task.cancel()
            await asyncio.wait(pending, timeout=0.5)
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result

    def write(self, event: int, data: bytes = b"") -> None:
        """To the group."""
        self._outbox.append(encode(GROUP, data, struct.pack("<QQH", 0, self.group, event)))
        self._filled.set()

    def say(self) -> None:
        """The next number."""
        self.write(SAY, struct.pack("<I", self.said))
        self.said += 1

    def talk(self, pause: float) -> None:
        """Say the next number every ``pause`` seconds, until :meth:`hush`."""
        self._talking = asyncio.ensure_future(self._talk(pause))
        self._tasks.append(self._talking)

    async def hush(self) -> None:
        self._talking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._talking

    def cut(self) -> None:
        """Lose the connection, if there is one."""
        if self._client is not None:
            self._client.cut()

    async def join_again(self) -> None:
        """After LOST; returns when it is a member."""
        self.joined.clear()
        self.lost.clear()
        self.write(JOIN)
        await asyncio.wait_for(self.joined.wait(), 20)

    async def leave(self) -> None:
        self._over = True
        assert self._client is not None
        await self._client.send(6)

    def heard(self, event: int) -> list[bytes]:
        return [data for what, data in self.told if what == event]

    # ------------------------------------------------------------------ its life

    async def _talk(self, pause: float) -> None:
        while True:
            self.say()
            await asyncio.sleep(pause)

    async def _live(self) -> None:
        while not self._over and self.closed is None:
            await self._live_once()

    async def _live_once(self) -> None:
        try:
            async with connected(self.gateway, self.carrier) as client:
                await self._be_connected(client)
        except Closed as closed:
            if closed.code not in _COMES_BACK:
                self.closed = closed
        except (OSError, EOFError, InvalidHandshake):
            await asyncio.sleep(_REDIAL)

    async def _be_connected(self, client: Client) -> None:
        if self._session:
            at = await client.resume(self._session, self._received)
            self.resumptions += 1
        else:
            await client.hello()
            self._session, self.user = client.session, client.user
            at = 0
        self._client = client
        sending = asyncio.ensure_future(self._send(client, at))
        try:
            while True:
                raw = await client.take_raw()
                event, data = struct.unpack_from("<H", raw, 6)[0], raw[8:]
                if event >= GROUP:
                    self._received += 1
                    self._hear(event, data)
        finally:
            self._client = None
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _send(self, client: Client, at: int) -> None:
        while True:
            while at < len(self._outbox):
                at += 1
                await client.send_raw(self._outbox[at - 1])
            self._filled.clear()
            await self._filled.wait()

    def _hear(self, event: int, data: bytes) -> None:
        self.told.append((event, data))
        if event == JOIN:
            self.joined.set()
        elif event == SAID:
            now = time.monotonic()
            if self._heard_at is not None:
                self.longest_gap = max(self.longest_gap, now - self._heard_at)
            self._heard_at = now
            self._check(*SPOKEN.unpack(data))
        elif event == LOST:
            self.serials, self._turns, self._heard_at = [], {}, None
            self.lost.set()
            if not self._expects_loss:
                self.faults.append(f"LOST: {data[8:].decode()}")
        elif event == REFUSED and not self._expects_loss:
            self.faults.append(f"REFUSED {struct.unpack_from('<QHH', data)}: {data[12:].decode()}")

    def _check(self, serial: int, user: int, number: int) -> None:
        if self.serials and serial != self.serials[-1] + 1:
            self.faults.append(f"word {serial} behind {self.serials[-1]}")
        self.serials.append(serial)
        due = self._turns.get(user, number)
        if number != due:
            self.faults.append(f"of user {user} {number} where {due} was due")
        self._turns[user] = number + 1
