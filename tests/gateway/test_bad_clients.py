"""What clients may not do: each is refused or cut, and told why."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from typing import Any

import pytest
import trustme
from websockets.exceptions import InvalidStatus

from domi_fast.gateway import CloseCode
from tests.gateway.clients import HEARTBEAT, Closed, TcpClient, Told, WebSocketClient, connected
from tests.gateway.nodes import gateway
from tests.reference import encode
from tests.support import until

CARRIERS = ["tcp", "websocket"]

BAD_FRAMES = {
    "a length below the header": (struct.pack("<IHH", 7, 0, 60), 1002),
    "an extend beyond the frame": (struct.pack("<IHH", 8, 1, 60), 1002),
    "a length over the limit": (struct.pack("<IHH", 65537, 0, 60), 1009),
    "an extend with an event of the gateway": (encode(60, b"x", b"y"), 1002),
    "an address of another size": (encode(8, b"x", b"y"), 1002),
    "no address": (encode(8, b"x"), 1002),
    "a second hello": (encode(1), 1002),
    "a resume within a session": (encode(3, bytes(32)), 1002),
    "a welcome from a client": (encode(2, bytes(28)), 1002),
    "an event that nobody has": (encode(49), 1002),
    "event 0": (encode(0), 1002),
}


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("what", BAD_FRAMES)
async def test_a_frame_that_is_none_ends_the_session(carrier: str, what: str) -> None:
    raw, code = BAD_FRAMES[what]
    if carrier == "websocket" and code == 1009:
        raw, code = encode(60, bytes(65536)), 1009
    async with gateway() as gate, connected(gate, carrier) as client:
        await client.hello()
        await client.send_raw(raw)
        closed = await client.closed()
        assert closed.code == code
        assert closed.reason
        assert gate.users == frozenset()
        await client.close()
        await until(lambda: gate.clients == 0)
        assert gate.node.counters()["clients_cut"] == 1


@pytest.mark.parametrize(
    "message", [b"", b"\0" * 7, encode(60) + b"x", encode(60)[:-1] + b"", encode(60) * 2]
)
async def test_a_message_is_one_frame(message: bytes) -> None:
    async with gateway() as gate, connected(gate) as client:
        await client.hello()
        await client.send_raw(message)
        closed = await client.closed()
        assert closed.code == CloseCode.PROTOCOL_ERROR
        assert "a message of" in closed.reason


async def test_frames_come_as_binary_messages() -> None:
    async with gateway() as gate, connected(gate) as client:
        assert isinstance(client, WebSocketClient)
        await client.hello()
        await client.connection.send("text")
        closed = await client.closed()
        assert closed.code == CloseCode.UNSUPPORTED
        assert closed.reason == "a text: frames come as binary messages"


async def test_a_message_may_come_in_fragments() -> None:
    async with gateway() as gate, connected(gate) as client:
        assert isinstance(client, WebSocketClient)
        gate.handle(60, lambda message: message.reply(61, message.data))
        await client.hello()
        raw = encode(60, b"in three pieces")
        await client.connection.send([raw[:3], raw[3:9], raw[9:]])
        assert await client.take() == Told(61, b"in three pieces")


async def test_fragments_count_together() -> None:
    async with gateway(message_limit=1000) as gate, connected(gate) as client:
        assert isinstance(client, WebSocketClient)
        await client.hello()
        await client.connection.send([bytes(600), bytes(600)])
        assert (await client.closed()).code == CloseCode.TOO_BIG


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_frame_as_large_as_it_may_be(carrier: str) -> None:
    async with gateway(message_limit=1000) as gate, connected(gate, carrier) as client:
        gate.handle(60, lambda message: message.reply(61, message.data))
        await client.hello()
        await client.send(60, bytes(992))
        assert await client.take() == Told(61, bytes(992))
        await client.send(60, bytes(993))
        assert (await client.closed()).code == CloseCode.TOO_BIG


# ------------------------------------------------------------------------------------------ floods


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_flood_is_cut(carrier: str) -> None:
    async with gateway(rate=10, burst=20) as gate, connected(gate, carrier) as client:
        heard: list[Any] = []
        gate.handle(60, heard.append)
        await client.hello()
        try:
            for _ in range(100):
                await client.send(60)
        except Exception:
            pass
        closed = await client.closed()
        assert closed.code in (CloseCode.FLOOD, 1006)
        if closed.code == CloseCode.FLOOD:
            assert closed.reason == "more than 10 messages a second, after 20 at once"
        assert 19 <= len(heard) <= 21  # the hello is one of 20
        assert gate.users == frozenset()


async def test_control_frames_are_messages_too() -> None:
    async with gateway(rate=1, burst=10) as gate, connected(gate) as client:
        assert isinstance(client, WebSocketClient)
        await client.hello()
        for _ in range(30):
            await client.connection.ping()
        assert (await client.closed()).code == CloseCode.FLOOD


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_who_keeps_to_the_rate_is_not_cut(carrier: str) -> None:
    async with gateway(rate=1e6, burst=2) as gate, connected(gate, carrier) as client:
        gate.handle(60, lambda message: message.reply(61, message.data))
        await client.hello()
        for number in range(200):
            await client.send(60, b"%d" % number)
            assert await client.take() == Told(61, b"%d" % number)


async def test_who_is_judged_is_not_read() -> None:
    asked = asyncio.Event()

    async def judge(login: Any) -> bool:
        asked.set()
        await asyncio.Event().wait()
        return True

    settings: dict[str, Any] = {"authenticate": judge, "rate": 1e6, "burst": 10_000}
    async with gateway(**settings) as gate, connected(gate, "tcp") as client:
        assert isinstance(client, TcpClient)
        await client.send(1)
        await asked.wait()
        frames = encode(60, bytes(65_000)) * 1000
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(client.send_raw(frames), 1.0)
        (connection,) = gate._entrance._connections
        held = sum(len(data) for _, data, _ in connection.waiting)
        assert held <= 1 << 20
        client.cut()


async def test_frames_behind_hello_are_bounded() -> None:
    async def judge(login: Any) -> bool:
        await asyncio.Event().wait()
        return True

    settings: dict[str, Any] = {"authenticate": judge, "rate": 1e6, "burst": 10_000}
    async with gateway(**settings) as gate, connected(gate, "tcp") as client:
        await client.send_raw(encode(1) + encode(60) * 300)
        closed = await client.closed()
        assert closed.code == CloseCode.FLOOD
        assert closed.reason == "256 frames behind HELLO, before its answer"


# ------------------------------------------------------------------------------------------ origins


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        (None, None, True),
        (None, "http://127.0.0.1:{port}", True),
        (None, "http://127.0.0.1:1", False),
        (None, "https://evil.example", False),
        (None, "null", False),
        (["https://chat.example"], "https://chat.example", True),
        (["https://chat.example"], "HTTPS://CHAT.example", True),
        (["https://chat.example"], "https://chat.example.evil", False),
        (["https://chat.example"], "http://chat.example", False),
        (["https://chat.example"], None, True),
        ("*", "https://evil.example", True),
    ],
)
async def test_the_origin_of_a_page(origins: Any, origin: str | None, allowed: bool) -> None:
    async with gateway(origins=origins) as gate:
        if origin is not None:
            origin = origin.format(port=gate.port)
        if allowed:
            async with connected(gate, origin=origin) as client:
                await client.hello()
        else:
            with pytest.raises(InvalidStatus) as refused:
                async with connected(gate, origin=origin):
                    pass
            assert refused.value.response.status_code == 403
            assert refused.value.response.body == b"pages of this origin may not connect here\n"
            await until(lambda: gate.clients == 0)


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "//", "\xff"])
async def test_an_origin_that_is_no_url(origin: str) -> None:
    async with gateway() as gate:
        reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
        writer.write(request(gate, f"Origin: {origin}"))
        assert (await reader.readline()).split()[1] == b"403"
        writer.close()


async def test_what_comes_right_behind_the_request() -> None:
    async with gateway() as gate:
        for junk in (b"junk", b"\x81\x00", bytes(200)):
            reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
            writer.write(request(gate) + junk)
            await asyncio.wait_for(reader.read(), 5)
            writer.close()
        await until(lambda: gate.clients == 0)


def request(gate: Any, *lines: str) -> bytes:
    """An opening handshake, with more lines."""
    all_of_it = [
        "GET / HTTP/1.1",
        f"Host: 127.0.0.1:{gate.port}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
        *lines,
    ]
    return "\r\n".join([*all_of_it, "", ""]).encode("latin-1")


async def test_empty_fragments_are_not_kept() -> None:
    async with gateway(rate=1e6, burst=10_000) as gate, connected(gate) as client:
        assert isinstance(client, WebSocketClient)
        gate.handle(60, lambda message: message.reply(61, message.data))
        await client.hello()
        raw = encode(60, b"x")
        await client.connection.send([raw[:3], *[b""] * 500, raw[3:]])
        assert await client.take() == Told(61, b"x")
        pieces = [raw[:3], *[b""] * 500]

        async def unfinished() -> Any:
            for piece in pieces:
                yield piece
            (user,) = gate.users
            connection = gate._sessions.get(user).connection
            await until(lambda: connection._parts)
            assert len(connection._parts) == 1
            yield raw[3:]

        await client.connection.send(unfinished())
        assert await client.take() == Told(61, b"x")


async def test_two_origins_or_hosts_are_none() -> None:
    async with gateway() as gate:
        for name, status in (("Origin", b"403"), ("Host", b"400")):
            value = f"127.0.0.1:{gate.port}"
            lines = [
                "GET / HTTP/1.1",
                f"Host: {value}",
                "Upgrade: websocket",
                "Connection: Upgrade",
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
                "Sec-WebSocket-Version: 13",
                f"{name}: {'http://' if name == 'Origin' else ''}{value}",
            ]
            if name == "Origin":
                lines.append(lines[-1])
            reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
            writer.write("\r\n".join([*lines, "", ""]).encode())
            assert (await reader.readline()).split()[1] == status
            writer.close()


# ---------------------------------------------------------------------------------- slow and silent


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_who_does_not_read_is_cut_within_its_limit(carrier: str) -> None:
    async with gateway(write_limit=64 * 1024) as gate, connected(gate, "tcp") as other:
        await other.hello()
        reader = await slow_reader(gate, carrier)
        (user,) = gate.users - {other.user}
        session = gate._sessions.get(user)
        connection = session.connection
        assert connection is not None
        most = 0
        for number in range(10_000):
            gate.send(user, 61, bytes(8192))
            if session.connection is None or connection.stage.name == "CLOSED":
                break
            most = max(most, connection._transport.get_write_buffer_size())
            if number % 16 == 0:
                await asyncio.sleep(0)
        else:
            pytest.fail("it was never cut")
        assert most <= 64 * 1024 + 8192 + 64
        assert gate.node.counters()["clients_slow"] == 1
        gate.send(other.user, 61, b"x")
        assert await other.take() == Told(61, b"x")
        await until(lambda: gate.clients == 1)
        assert gate.users == {user, other.user}  # and it may come back
        reader.close()


async def slow_reader(gate: Any, carrier: str) -> socket.socket:
    """A client with a session that reads no more."""
    loop = asyncio.get_running_loop()
    port = gate.tcp_port if carrier == "tcp" else gate.port
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await loop.sock_connect(sock, ("127.0.0.1", port))
    before = gate.users
    if carrier == "websocket":
        request = (
            f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            "Connection: keep-alive, Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n"
        )
        await loop.sock_sendall(sock, request.encode())
        assert (await loop.sock_recv(sock, 4096)).startswith(b"HTTP/1.1 101 ")
        hello = encode(1)
        await loop.sock_sendall(sock, bytes((0x82, 0x80 | len(hello), 0, 0, 0, 0)) + hello)
    else:
        await loop.sock_sendall(sock, encode(1))
    await until(lambda: gate.users != before)
    return sock


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_who_is_half_open_is_cut(carrier: str) -> None:
    async with gateway(ping_interval=0.1, ping_timeout=0.2) as gate:
        sock = await slow_reader(gate, carrier)
        (user,) = gate.users
        await until(lambda: gate.clients == 0)
        assert gate.node.counters()["clients_silent"] == 1
        assert gate.users == {user}  # and it may come back
        sock.close()


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_who_answers_pings_stays(carrier: str) -> None:
    settings = {"ping_interval": 0.1, "ping_timeout": 0.1}
    async with gateway(**settings) as gate, connected(gate, carrier) as client:
        await client.hello()
        asyncio.get_running_loop().call_later(1.0, gate.send, client.user, 61, b"still here")
        while (told := await client.take()).event == HEARTBEAT:
            assert told.data == b"ping"
            await client.send(HEARTBEAT, b"pong")
        assert told == Told(61, b"still here")


async def test_who_sends_no_whole_request_is_cut() -> None:
    async with gateway(authenticate_timeout=0.2) as gate:
        reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
        writer.write(b"GET / HTTP/1.1\r\n")
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()


# ------------------------------------------------------------------------------------------- limits


async def test_connections_that_say_nothing_are_bounded() -> None:
    async with gateway(client_limit=5) as gate:
        opened = [await asyncio.open_connection("127.0.0.1", gate.port) for _ in range(100)]
        await until(lambda: gate.node.counters()["clients_cut"] == 100 - 5 - 32)
        assert gate.clients == 5 + 32
        for _, writer in opened:
            writer.transport.abort()
        await until(lambda: gate.clients == 0)


async def test_more_clients_than_may_be_are_refused() -> None:
    async with (
        gateway(client_limit=2) as gate,
        connected(gate) as one,
        connected(gate, "tcp") as two,
    ):
        await one.hello()
        await two.hello()
        with pytest.raises(InvalidStatus) as refused:
            async with connected(gate):
                pass
        assert refused.value.response.status_code == 503
        async with connected(gate, "tcp") as third:
            closed = await third.closed()
            assert closed.code == CloseCode.TRY_LATER
            assert closed.reason == "this gateway has 2 clients, as many as it may have"
        gate.send(two.user, 61, b"x")
        assert await two.take() == Told(61, b"x")


# ---------------------------------------------------------------------------------------------- tls


# Before Python 3.11 asyncio says so of a transport whose handshake has failed.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function _SSLProtocolTransport.__del__"
    ":pytest.PytestUnraisableExceptionWarning"
)
async def test_all_ports_speak_tls() -> None:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    async with gateway(tls=server, http_port=0) as gate:
        gate.handle(60, lambda message: message.reply(61, message.data))
        url = f"wss://localhost:{gate.port}/"
        from websockets.asyncio.client import connect

        async with connect(url, ssl=client, compression=None, proxy=None) as connection:
            one = WebSocketClient(connection)
            await one.hello()
            await one.send(60, b"secret")
            assert await one.take() == Told(61, b"secret")
        streams = await asyncio.open_connection("localhost", gate.tcp_port, ssl=client)
        two = TcpClient(*streams)
        await two.hello()
        await two.send(60, bytes(20_000))
        assert await two.take() == Told(61, bytes(20_000))
        await two.send(49)
        assert (await two.closed()).code == CloseCode.PROTOCOL_ERROR
        await two.close()
        plain = TcpClient(*await asyncio.open_connection("127.0.0.1", gate.tcp_port))
        await plain.send(1)
        with pytest.raises((Closed, ConnectionError)):
            await plain.take()
        await plain.close()
