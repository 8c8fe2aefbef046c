"""client.js in Node, against a gateway that says what a test tells it to."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import struct
import subprocess
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import WSCloseCode, WSMsgType, web

from domi_fast import encode_frame
from domi_fast.gateway import frames
from domi_fast.gateway.events import LibraryEvent
from tests.servers import absent, missing

DRIVER = Path(__file__).with_name("driver.mjs")
CLIENT = Path(frames.__file__).with_name("client.js")
OLDEST_NODE = 20
PATIENCE = 20.0
GRACE = 60.0
ID = struct.pack("<Q", 2**62 + 7) + bytes(range(16))
OTHER = struct.pack("<Q", 2**62 + 8) + bytes(range(16))
QUICK = {"firstDelay": 10, "maxDelay": 40, "stay": 5000}

pytestmark = pytest.mark.browser


class Program:
    """The program in Node that has the client."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def do(self, name: str, *values: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, *values]).encode() + b"\n")

    async def said(self) -> tuple[Any, Any]:
        """What happened next."""
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), PATIENCE)
        assert line, "the program has ended"
        what, value = json.loads(line)
        return what, value

    async def hears(self, what: Any) -> Any:
        """The value of what happens next, which is this."""
        found, value = await self.said()
        assert found == what, (found, value)
        return value


@contextlib.asynccontextmanager
async def program() -> AsyncIterator[Program]:
    missing("node", "nodejs")
    version = subprocess.run(["node", "--version"], check=True, capture_output=True, text=True)
    if int(version.stdout[1:].split(".")[0]) < OLDEST_NODE:
        absent(f"Node {OLDEST_NODE}", "nodejs")
    process = await asyncio.create_subprocess_exec(
        *("node", "--experimental-websocket", "--no-warnings", str(DRIVER), str(CLIENT)),
        stdin=PIPE,
        stdout=PIPE,
    )
    try:
        yield Program(process)
        assert process.stdin is not None
        process.stdin.close()
        assert await asyncio.wait_for(process.wait(), PATIENCE) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class Connection:
    """The gateway's end of one."""

    def __init__(self, socket: web.WebSocketResponse) -> None:
        self.socket = socket
        self.over = asyncio.Event()

    async def heard(self) -> tuple[int, bytes, bytes]:
        """The next frame of the client."""
        message = await asyncio.wait_for(self.socket.receive(), PATIENCE)
        assert message.type is WSMsgType.BINARY, message
        event, data, extend = frames.parse(message.data)
        return event, data, extend

    async def hears(self, event: int) -> bytes:
        """The data of the next frame, which has this event."""
        found, data, _ = await self.heard()
        assert found == event, (found, data)
        return data

    async def hears_group(self) -> tuple[int, int, bytes]:
        """Group, event and data of the next frame, which is for a group."""
        event, data, extend = await self.heard()
        assert event == LibraryEvent.GROUP, (event, data)
        address = frames.address_of(extend)
        return address.group, address.event, data

    async def ends(self) -> int | None:
        """The code with which the client closes."""
        message = await asyncio.wait_for(self.socket.receive(), PATIENCE)
        assert message.type is WSMsgType.CLOSE, message
        code: int | None = self.socket.close_code
        return code

    async def say(self, frame: bytes) -> None:
        await self.socket.send_bytes(frame)

    async def close(self, code: int, reason: str = "") -> None:
        await self.socket.close(code=code, message=reason.encode())

    def cut(self) -> None:
        """End it without a word."""
        transport = self.socket._req.transport  # type: ignore[union-attr]
        assert transport is not None
        transport.abort()

    async def welcome(self, session: bytes = ID) -> None:
        await self.hears(LibraryEvent.HELLO)
        await self.say(frames.welcome(session, GRACE))


class Gateway:
    """Takes connections, and leaves what is said on them to the test."""

    def __init__(self) -> None:
        self._connections: asyncio.Queue[Connection] = asyncio.Queue()
        self._all: list[Connection] = []
        self.times: list[float] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/"

    async def connection(self) -> Connection:
        return await asyncio.wait_for(self._connections.get(), PATIENCE)

    async def _take(self, request: web.Request) -> web.StreamResponse:
        self.times.append(time.monotonic())
        socket = web.WebSocketResponse(autoping=False)
        await socket.prepare(request)
        connection = Connection(socket)
        self._all.append(connection)
        self._connections.put_nowait(connection)
        await connection.over.wait()
        return socket

    @contextlib.asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator[Gateway]:
        server = web.Server(self._take)
        runner = web.ServerRunner(server, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            for connection in self._all:
                connection.over.set()
            await runner.cleanup()


def group_text(event: int, text: str) -> bytes:
    return encode_frame(event, text.encode())


def resume(session: bytes, received: int) -> bytes:
    return frames.RESUME.pack(session, received)


async def test_a_session_from_its_beginning_to_its_end() -> None:
    async with Gateway().serving() as gateway, program() as page:
        page.do("make", gateway.url, {"credentials": "token"})
        page.do("connect")
        connection = await gateway.connection()
        assert await connection.hears(LibraryEvent.HELLO) == b"token"
        page.do("send", "666", 50, "waits")
        await connection.say(frames.welcome(ID, GRACE))
        welcome = {"user": str(2**62 + 7), "gateway": gateway.url, "grace": GRACE * 1000}
        assert await page.hears("welcome") == welcome
        assert await page.hears("connected") == str(2**62 + 7)
        page.do("send", str(2**64 - 1), 65535, "for the last group")
        page.do("tell", 60, "for the gateway")
        assert await connection.hears_group() == (666, 50, b"waits")
        assert await connection.hears_group() == (2**64 - 1, 65535, b"for the last group")
        assert await connection.hears(60) == b"for the gateway"
        await connection.say(group_text(51, "hello"))
        assert await page.hears(51) == "hello"
        await connection.say(frames.refused(666, 50, 3, "all full"))
        assert await page.hears("refused") == {
            "group": "666",
            "event": 50,
            "code": 3,
            "reason": "all full",
        }
        await connection.say(frames.lost(2**64 - 1, "gone"))
        assert await page.hears("lost") == {"group": str(2**64 - 1), "reason": "gone"}
        page.do("close")
        assert await page.hears("closed") == {"code": 1000, "reason": ""}
        assert await connection.ends() == 1000
        page.do("session")
        assert await page.hears("session") is None


async def test_credentials_may_be_asked_for() -> None:
    async with Gateway().serving() as gateway, program() as page:
        page.do("make", gateway.url, {"asks": "later"})
        page.do("connect")
        connection = await gateway.connection()
        assert await connection.hears(LibraryEvent.HELLO) == b"later"


async def test_a_lost_connection_is_resumed_without_loss_or_repetition() -> None:
    async with Gateway().serving() as gateway, program() as page:
        page.do("make", gateway.url, {"reconnect": QUICK})
        page.do("connect")
        connection = await gateway.connection()
        await connection.welcome()
        await page.hears("welcome")
        await page.hears("connected")
        for text in ("one", "two", "three"):
            page.do("send", "5", 50, text)
            assert await connection.hears_group() == (5, 50, text.encode())
        await connection.say(group_text(50, "first"))
        await connection.say(frames.lost(9, "counted, too"))
        await page.hears(50)
        await page.hears("lost")
        connection.cut()
        assert (await page.hears("away"))["code"] == 1006
        page.do("tell", 60, "four")
        connection = await gateway.connection()
        assert await connection.hears(LibraryEvent.RESUME) == resume(ID, 2)
        # The gateway has had one of the three only.
        await connection.say(frames.resumed(1, GRACE))
        assert await connection.hears_group() == (5, 50, b"two")
        assert await connection.hears_group() == (5, 50, b"three")
        assert await connection.hears(60) == b"four"
        await connection.say(group_text(50, "second"))
        assert (await page.hears("resumed"))["user"] == str(2**62 + 7)
        assert await page.hears(50) == "second"
        connection.cut()
        await page.hears("away")
        connection = await gateway.connection()
        assert await connection.hears(LibraryEvent.RESUME) == resume(ID, 3)
        await connection.say(frames.resumed(4, GRACE))
        await page.hears("resumed")
        page.do("tell", 60, "five")
        assert await connection.hears(60) == b"five"


async def test_another_client_goes_on_with_what_suspend_gave() -> None:
    async with Gateway().serving() as gateway, program() as page, program() as reloaded:
        page.do("make", gateway.url, {})
        page.do("connect")
        connection = await gateway.connection()
        await connection.welcome()
        await page.hears("welcome")
        await page.hears("connected")
        page.do("send", "5", 50, "one")
        await connection.hears_group()
        await connection.say(group_text(50, "first"))
        await page.hears(50)
        page.do("suspend")
        kept = await page.hears("session")
        assert await connection.ends() == 4000
        page.do("send", "5", 50, "two")
        page.do("session")
        kept = await page.hears("session")

        reloaded.do(
            "make", [f"ws://127.0.0.1:{gateway.port}/other", gateway.url], {"session": kept}
        )
        reloaded.do("connect")
        connection = await gateway.connection()
        assert await connection.hears(LibraryEvent.RESUME) == resume(ID, 1)
        await connection.say(frames.resumed(1, GRACE))
        assert await connection.hears_group() == (5, 50, b"two")
        assert (await reloaded.hears("resumed"))["gateway"] == gateway.url
        assert await reloaded.hears("connected") == str(2**62 + 7)


async def test_the_frame_that_a_handler_is_dealing_with_is_counted() -> None:
    async with Gateway().serving() as gateway, program() as page:
        page.do("make", gateway.url, {})
        page.do("connect")
        connection = await gateway.connection()
        await connection.welcome()
        await page.hears("welcome")
        await page.hears("connected")
        await connection.say(group_text(50, "first"))
        await connection.say(group_text(52, "a handler that asks for the session"))
        await page.hears(50)
        assert json.loads(await page.hears("session"))["received"] == 2


async def test_an_expired_session_is_followed_by_another_on_the_same_connection() -> None:
    async with Gateway().serving() as gateway, program() as page:
        page.do("make", gateway.url, {"reconnect": QUICK})
        page.do("connect")
        connection = await gateway.connection()
        await connection.welcome()
        await page.hears("welcome")
        await page.hears("connected")
        page.do("send", "5", 50, "one")
        await connection.hears_group()
        connection.cut()
        await page.hears("away")
        connection = await gateway.connection()
        await connection.hears(LibraryEvent.RESUME)
        page.do("again")
        page.do("session")
        await page.hears("session")  # the program has heard of the commands
        await connection.say(frames.expired("too late"))
        assert await page.hears("expired") == {
            "reason": "too late",
            "unconfirmed": [{"group": "5", "event": 50, "data": "one", "node": "0"}],
        }
        await connection.welcome(OTHER)
        assert (await page.hears("welcome"))["user"] == str(2**62 + 8)
        # Once, as the program has sent it again once.
        page.do("tell", 60, "two")
        assert await connection.hears_group() == (5, 50, b"one")
        assert await connection.hears(60) == b"two"
        connection.cut()
        await page.hears("away")
        connection = await gateway.connection()
        assert await connection.hears(LibraryEvent.RESUME) == resume(OTHER, 0)


async def test_a_pong_confirms_what_was_sent_before_the_ping() -> None:
    async with Gateway().serving() as gateway, program() as page:
        page.do("make", gateway.url, {"outboxFrames": 4})
        page.do("connect")
        connection = await gateway.connection()
        await connection.welcome()
        await page.hears("welcome")
        await page.hears("connected")
        page.do("tell", 60, "one")
        assert await connection.hears(60) == b"one"
        assert await connection.hears(LibraryEvent.HEARTBEAT) == b"ping"
        for text in ("two", "three", "four"):
            page.do("tell", 60, text)
            assert await connection.hears(60) == text.encode()
        page.do("tell", 60, "five")
        assert "RangeError: the outbox is full: 4 messages" in await page.hears("raised")
        await connection.say(encode_frame(LibraryEvent.HEARTBEAT, b"pong"))
        await connection.say(encode_frame(LibraryEvent.HEARTBEAT, b"ping"))
        assert await connection.hears(LibraryEvent.HEARTBEAT) == b"pong"
        page.do("tell", 60, "five")
        assert await connection.hears(60) == b"five"
        assert await connection.hears(LibraryEvent.HEARTBEAT) == b"ping"
        page.do("session")
        kept = json.loads(await page.hears("session"))
        assert kept["confirmed"] == 1
        sent = [frames.parse(base64.b64decode(each)).data for each in kept["outbox"]]
        assert sent == [b"two", b"three", b"four", b"five"]


async def test_the_bytes_that_wait_are_bounded() -> None:
    async with program() as page:
        page.do("make", "ws://127.0.0.1:1/", {"outboxBytes": 100})
        page.do("tell", 60, "x" * 84)  # and 8 of its head
        page.do("tell", 60, "x")
        assert "1 messages of 92 bytes wait" in await page.hears("raised")
        page.do("tell", 60, "")
        page.do("tell", 60, "")
        assert "2 messages of 100 bytes wait" in await page.hears("raised")


async def test_a_time_of_grace_that_is_over_ends_the_session() -> None:
    async with program() as page:
        async with Gateway().serving() as gateway:
            page.do("make", gateway.url, {"reconnect": QUICK})
            page.do("connect")
            connection = await gateway.connection()
            await connection.hears(LibraryEvent.HELLO)
            await connection.say(frames.welcome(ID, 0.1))
            await page.hears("welcome")
            await page.hears("connected")
            connection.cut()
            await page.hears("away")
        expired = await page.hears("expired")
        assert expired["reason"] == "the time of grace is over"
        async with Gateway().serving(gateway.port) as again:
            connection = await again.connection()
            await connection.welcome(OTHER)
            await page.hears("welcome")


async def test_a_gateway_that_does_not_answer_is_tried_again() -> None:
    async with Gateway().serving() as gateway, program() as page:
        page.do("make", gateway.url, {"reconnect": QUICK, "timeout": 100})
        page.do("connect")
        connection = await gateway.connection()
        await connection.hears(LibraryEvent.HELLO)
        assert await connection.ends() == 4000
        connection = await gateway.connection()
        await connection.welcome()
        await page.hears("welcome")


async def test_bye_ends_a_connection_as_a_close_frame_does() -> None:
    async with Gateway().serving() as gateway, program() as page:
        page.do("make", gateway.url, {"reconnect": QUICK})
        page.do("connect")
        connection = await gateway.connection()
        await connection.welcome()
        await page.hears("welcome")
        await page.hears("connected")
        await connection.say(frames.bye(1001, "drained"))
        assert await page.hears("away") == {"code": 1001, "reason": "drained"}
        assert await page.hears("expired") == {"reason": "drained", "unconfirmed": []}
        connection = await gateway.connection()
        await connection.welcome(OTHER)
        await page.hears("welcome")


async def test_a_silent_gateway_is_left() -> None:
    async with Gateway().serving() as gateway, program() as page:
        page.do("make", gateway.url, {"heartbeat": 50, "reconnect": QUICK})
        page.do("connect")
        connection = await gateway.connection()
        await connection.welcome()
        await page.hears("welcome")
        await page.hears("connected")
        assert await connection.hears(LibraryEvent.HEARTBEAT) == b"ping"
        assert (await page.hears("away"))["code"] == 4005
        assert await connection.ends() == 4005
        connection = await gateway.connection()
        await connection.hears(LibraryEvent.RESUME)


async def test_after_some_codes_the_client_stays_away() -> None:
    async with Gateway().serving() as gateway, program() as page:
        page.do("make", gateway.url, {"reconnect": QUICK})
        for code in (1000, 1002, 1003, 1007, 1008, 1009, 4001, 4002, 4004):
            page.do("connect")
            connection = await gateway.connection()
            # Not RESUME: it has no wish to have the last one again.
            await connection.welcome()
            await page.hears("welcome")
            await page.hears("connected")
            await connection.close(code, "why")
            assert await page.hears("closed") == {"code": code, "reason": "why"}
            page.do("session")
            assert await page.hears("session") is None
        page.do("connect")
        connection = await gateway.connection()
        await connection.hears(LibraryEvent.HELLO)
        await connection.close(4001, "no")
        assert await page.hears("closed") == {"code": 4001, "reason": "no"}
        assert await page.hears("rejected") == "the connection is closed: 4001 no"


async def test_a_gateway_that_closes_is_left_for_the_next() -> None:
    async with Gateway().serving() as gateway, Gateway().serving() as next, program() as page:
        page.do("make", [gateway.url, next.url], {"reconnect": QUICK})
        page.do("connect")
        connection = await gateway.connection()
        await connection.welcome()
        await page.hears("welcome")
        await page.hears("connected")
        await connection.close(WSCloseCode.GOING_AWAY, "drained")
        assert await page.hears("away") == {"code": 1001, "reason": "drained"}
        assert await page.hears("expired") == {"reason": "drained", "unconfirmed": []}
        connection = await next.connection()
        await connection.welcome(OTHER)
        assert (await page.hears("welcome"))["gateway"] == next.url


async def test_a_gateway_that_is_out_of_reach_is_tried_first_and_then_left() -> None:
    async with Gateway().serving() as next, program() as page:
        async with Gateway().serving() as gateway:
            page.do("make", [gateway.url, next.url], {"reconnect": {**QUICK, "stay": 300}})
            page.do("connect")
            connection = await gateway.connection()
            await connection.welcome()
            await page.hears("welcome")
            await page.hears("connected")
            connection.cut()
            await page.hears("away")
            lost = time.monotonic()
        expired = await page.hears("expired")
        assert expired["reason"] == "its gateway is out of reach"
        assert time.monotonic() - lost >= 0.25
        connection = await next.connection()
        await connection.welcome(OTHER)
        assert (await page.hears("welcome"))["gateway"] == next.url


async def test_without_a_session_the_next_gateway_is_tried_at_once() -> None:
    async with Gateway().serving() as gone:
        nobody = gone.url
    async with Gateway().serving() as gateway, program() as page:
        page.do("make", [nobody, gateway.url], {"reconnect": QUICK})
        page.do("connect")
        connection = await gateway.connection()
        await connection.welcome()
        assert (await page.hears("welcome"))["gateway"] == gateway.url


async def test_the_tries_become_rarer() -> None:
    first, most = 40, 160
    async with Gateway().serving() as gateway, program() as page:
        reconnect = {"firstDelay": first, "maxDelay": most}
        page.do("make", gateway.url, {"reconnect": reconnect})
        page.do("connect")
        ended = []
        for _ in range(6):
            connection = await gateway.connection()
            await connection.hears(LibraryEvent.HELLO)
            ended.append(time.monotonic())
            await connection.close(1013, "full")
        await gateway.connection()
        waits = [after - before for before, after in zip(ended, gateway.times[1:], strict=True)]
        for number, wait in enumerate(waits):
            assert wait >= 0.9 * min(first * 2**number, most) / 2000, waits


async def test_the_tries_become_no_rarer_than_allowed() -> None:
    async with Gateway().serving() as gateway, program() as page:
        page.do("make", gateway.url, {"reconnect": {"firstDelay": 10, "maxDelay": 20}})
        page.do("connect")
        for _ in range(12):  # the last of which would come 10 s after the one before
            connection = await gateway.connection()
            await connection.hears(LibraryEvent.HELLO)
            await connection.close(1013, "full")
        waits = [after - before for before, after in itertools.pairwise(gateway.times)]
        assert max(waits) < 5.0, waits


async def test_who_does_not_want_to_reconnect_keeps_the_session() -> None:
    async with Gateway().serving() as gateway, program() as page:
        page.do("make", gateway.url, {"reconnect": False})
        page.do("connect")
        connection = await gateway.connection()
        await connection.welcome()
        await page.hears("welcome")
        await page.hears("connected")
        connection.cut()
        assert (await page.hears("closed"))["code"] == 1006
        page.do("connect")
        connection = await gateway.connection()
        assert await connection.hears(LibraryEvent.RESUME) == resume(ID, 0)


async def test_a_session_that_somebody_else_has_gone_on_with_is_given_up() -> None:
    async with Gateway().serving() as gateway, program() as page:
        page.do("make", gateway.url, {"reconnect": QUICK})
        page.do("connect")
        connection = await gateway.connection()
        await connection.welcome()
        await page.hears("welcome")
        await page.hears("connected")
        connection.cut()
        await page.hears("away")
        connection = await gateway.connection()
        await connection.hears(LibraryEvent.RESUME)
        await connection.say(frames.resumed(1, GRACE))
        assert "another page" in (await page.hears("expired"))["reason"]
        assert await connection.ends() == 1000
        connection = await gateway.connection()
        await connection.welcome(OTHER)
        assert (await page.hears("welcome"))["user"] == str(2**62 + 8)


BAD = {
    "short": b"\x08\x00\x00",
    "two frames": encode_frame(50, b"a") + encode_frame(50, b"b"),
    "an extend that is longer": struct.pack("<IHH", 8, 1, 50),
    "a second WELCOME": frames.welcome(ID, GRACE),
    "a REFUSED that is cut": encode_frame(LibraryEvent.REFUSED, b"123"),
    "a LOST that is cut": encode_frame(LibraryEvent.LOST, b"1234567"),
    "an EXPIRED of a session": frames.expired("it is not"),
}


async def test_a_gateway_that_breaks_the_protocol_is_left() -> None:
    async with Gateway().serving() as gateway, program() as page:
        page.do("make", gateway.url, {"reconnect": QUICK})
        for name in (*BAD, "text"):
            page.do("connect")
            connection = await gateway.connection()
            await connection.welcome()
            await page.hears("welcome")
            await page.hears("connected")
            if name == "text":
                await connection.socket.send_str("hello")
            else:
                await connection.say(BAD[name])
            closed = await page.hears("closed")
            assert closed["code"] == 1002, name
            assert closed["reason"], name
            assert await connection.ends() == 1000, name


async def test_messages_before_a_session_are_out_of_turn() -> None:
    async with Gateway().serving() as gateway, program() as page:
        page.do("make", gateway.url, {})
        page.do("connect")
        connection = await gateway.connection()
        await connection.say(group_text(50, "too early"))
        assert await page.hears("closed") == {"code": 1002, "reason": "event 50 out of turn"}


async def test_what_a_handler_raises_is_the_pages_own() -> None:
    async with Gateway().serving() as gateway, program() as page:
        page.do("make", gateway.url, {})
        page.do("connect")
        connection = await gateway.connection()
        await connection.welcome()
        await page.hears("welcome")
        await page.hears("connected")
        await connection.say(group_text(53, "its handler raises"))
        await connection.say(group_text(50, "heard"))
        assert await page.hears("uncaught") == "of a handler"
        assert await page.hears(50) == "heard"


WRONG: list[tuple[list[Any], str]] = [
    (["send", "-1", 50, ""], "group -1: 0 to 2**64-1 are allowed"),
    (["send", str(2**64), 50, ""], "group 18446744073709551616: 0 to 2**64-1"),
    (["send", "1", 49, ""], "event 49: 50 to 65535 are allowed"),
    (["tell", 65536, ""], "event 65536: 50 to 65535 are allowed"),
    (["make", [], {}], "no URL"),
    (["make", "http://127.0.0.1/", {}], "ws:// or wss:// is wanted"),
    (["make", "ws://127.0.0.1/", {"session": "{}"}], "session: give what client.session"),
]


async def test_what_cannot_be_is_refused_with_words() -> None:
    async with program() as page:
        page.do("make", "ws://127.0.0.1:1/", {})
        for command, words in WRONG:
            page.do(*command)
            assert words in await page.hears("raised")
