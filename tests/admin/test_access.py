"""Who may change a node through its admin pages, and what a connection to them may take."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from domi_fast import Node, admin
from tests.admin.http import Answer, ask, exchange, parse
from tests.support import ROOT, forget_records, nodes, until

TOKEN = "this-test-made-this-token"
OTHER = "another-token-of-this-test"
SHOWN = {"Authorization": f"Bearer {TOKEN}"}
# An address for documentation (RFC 5737): never routed, and not loopback.
ADDRESS = "192.0.2.1"


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


@pytest.fixture(autouse=True)
def no_token_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(admin.TOKEN_VARIABLE, raising=False)


def changing(node: Node) -> list[str]:
    """Every path of the node's own table that changes something."""
    assert node._admin is not None
    found = [path for path, (method, _) in node._admin.routes.items() if method != "GET"]
    assert set(found) >= {"/pause", "/resume", "/drain", "/exit"}
    return found


async def refused(node: Node, status: int, **arguments: Any) -> None:
    """Every changing path answers with this status, counted; the node goes on as before."""
    before = node.counters().get("refused_admin_callers", 0)
    for path in changing(node):
        answer: Answer = await ask(node.http_port, path, "POST", **arguments)
        assert answer.status == status, (path, answer)
        assert answer.json()["error"]
        assert node.counters()["refused_admin_callers"] == before + 1
        before += 1
        assert ("WWW-Authenticate" in answer.headers) == (status == 401)
    assert node.state == "serving"


async def allowed(node: Node, **arguments: Any) -> None:
    answer = await ask(node.http_port, "/exit", "POST", **arguments)
    assert answer.status == 202, answer
    await node.close()


# --------------------------------------------------------------------------------------- the caller


async def test_without_a_token_this_machine_may(registry_url: str) -> None:
    async with nodes(registry_url, "a", http_port=0) as (a,):
        await allowed(a)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1:80", "[::1]:8080", "LOCALHOST:1"])
async def test_by_every_name_of_loopback(registry_url: str, name: str) -> None:
    async with nodes(registry_url, "a", http_port=0) as (a,):
        await allowed(a, headers={"Host": name})


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"Authorization": f"Bearer {OTHER}"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
        {"Authorization": "Bearer \xff\xfe"},
        {"X-Authorization": f"Bearer {TOKEN}"},
    ],
)
async def test_with_a_token_nobody_may_without_it(registry_url: str, given: dict[str, str]) -> None:
    async with nodes(registry_url, "a", http_port=0, admin_token=TOKEN) as (a,):
        await refused(a, 401, headers=given)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_with_the_token(registry_url: str, scheme: str) -> None:
    async with nodes(registry_url, "a", http_port=0, admin_token=TOKEN) as (a,):
        await allowed(a, headers={"Authorization": f"{scheme} {TOKEN}"})


async def test_a_token_of_the_environment(
    registry_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(admin.TOKEN_VARIABLE, TOKEN)
    async with nodes(registry_url, "a", http_port=0) as (a,):
        await refused(a, 401)
        await allowed(a, headers=SHOWN)
    # The program's own word is the stronger one.
    async with nodes(registry_url, "a", http_port=0, admin_token=OTHER) as (a,):
        await refused(a, 401, headers=SHOWN)
    monkeypatch.setenv(admin.TOKEN_VARIABLE, "short")
    with pytest.raises(ValueError, match=admin.TOKEN_VARIABLE):
        await Node("a", registry=registry_url, http_port=0).start()


@pytest.mark.parametrize("header", ["Forwarded", "X-Forwarded-For", "X-Real-IP", "Via"])
async def test_a_proxy_on_this_machine_is_not_its_caller(registry_url: str, header: str) -> None:
    async with nodes(registry_url, "a", http_port=0) as (a,):
        await refused(a, 401, headers={header: "for=198.51.100.7"})


OUTSIDE = """
import asyncio, json, sys
from domi_fast import Node
from tests.admin.http import ask

async def main(address, token):
    node = Node("a", registry="memory://a", host=address, insecure=True, http_port=0,
                admin_token=token or None)
    found = {}
    async with node:
        for path, (method, _) in node._admin.routes.items():
            answer = await ask(node.http_port, path, method, host=address)
            found[path] = [method, answer.status, node.state]
        shown = {"Authorization": f"Bearer {token}"}
        for name, headers in (("shown", shown), ("posed", {**shown, "Host": "localhost"})):
            answer = await ask(node.http_port, "/pause", "POST", host=address, headers=headers)
            found[name] = answer.status
    print(json.dumps(found))

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.netns
@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("ip"),
    reason="needs root, unshare and ip",
)
@pytest.mark.parametrize("token", ["", TOKEN])
def test_from_another_address_than_loopback(token: str) -> None:
    """Every path of the table, from an address that a network namespace alone has."""
    script = 'ip link set lo up && ip address add "$1/32" dev lo && exec "$2" -c "$3" "$1" "$4"'
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", script, "sh", ADDRESS, sys.executable, OUTSIDE, token],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    posed = {"shown": found.pop("shown"), "posed": found.pop("posed")}
    assert len(found) >= 10
    for path, (method, status, state) in found.items():
        assert (status, state) == (200 if method == "GET" else 401, "serving"), path
    # Whoever has the token may; whoever only says that he is local may not.
    assert posed == ({"shown": 200, "posed": 200} if token else {"shown": 401, "posed": 401})


async def test_a_caller_who_is_refused_is_logged(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it calls from and why, and nothing of what it showed."""
    async with nodes(registry_url, "a", http_port=0, admin_token=TOKEN) as (a,):
        caplog.set_level(logging.DEBUG, "domi_fast.admin")
        caplog.clear()
        given = {"Authorization": f"Bearer {OTHER}"}
        answer = await ask(a.http_port, "/pause", "POST", headers=given)
        assert answer.status == 401
        (told,) = logged(caplog)
        assert told.startswith("refused 127.0.0.1")
        assert "(401): this needs the node's admin token" in told
        assert OTHER not in caplog.text
        # What is asked for rightly, and what is asked for wrongly by anybody, is not.
        assert (await ask(a.http_port, "/nothing")).status == 404
        assert (await ask(a.http_port, "/pause", "POST", headers=SHOWN)).status == 200
        assert len(logged(caplog)) == 1
        assert a.counters()["refused_admin_callers"] == 1


# ------------------------------------------------------------------------------- somebody's browser


@pytest.mark.parametrize(
    "name", ["evil.example", "evil.example:80", "192.0.2.1", "localhost.evil", ""]
)
async def test_a_name_that_was_made_to_lead_here(registry_url: str, name: str) -> None:
    async with nodes(registry_url, "a", http_port=0) as (a,):
        await refused(a, 403, headers={"Host": name})
        for path in ("/node", "/peers", "/metrics"):
            counted = a.counters()["refused_admin_callers"]
            assert (await ask(a.http_port, path, headers={"Host": name})).status == 403
            assert a.counters()["refused_admin_callers"] == counted + 1


async def test_what_names_no_host_is_no_browser(registry_url: str) -> None:
    """A load balancer that asks with HTTP/1.0 may read, and not change anything."""
    async with nodes(registry_url, "a", http_port=0) as (a,):
        assert a.http_port is not None
        for line, status in (("GET /health", 200), ("POST /pause", 403)):
            data = await exchange("127.0.0.1", a.http_port, f"{line} HTTP/1.0\r\n\r\n".encode())
            assert parse(data).status == status
        assert a.state == "serving"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://localhost"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
@pytest.mark.parametrize("token", [None, TOKEN])
async def test_pages_of_other_origins_may_not(
    registry_url: str, headers: dict[str, str], token: str | None
) -> None:
    async with nodes(registry_url, "a", http_port=0, admin_token=token) as (a,):
        await refused(a, 403, headers={**headers, **SHOWN})


async def test_a_page_of_ours_may(registry_url: str) -> None:
    async with nodes(registry_url, "a", http_port=0) as (a,):
        origin = f"http://127.0.0.1:{a.http_port}"
        await allowed(a, headers={"Origin": origin, "Sec-Fetch-Site": "same-origin"})


# --------------------------------------------------------------------------------------- the limits


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET",
        b"GET /ping HTTP/1.1\r\nHost: localhost\r\nX: ",
        b"POST /pause HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nx",
        b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\nGET",
    ],
)
async def test_a_request_that_does_not_come_to_its_end(
    registry_url: str, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte at a time keeps a connection no longer than none."""
    monkeypatch.setattr(admin, "REQUEST_TIME", 0.3)
    async with nodes(registry_url, "a", http_port=0) as (a,):
        assert a.http_port is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", a.http_port)
        writer.write(sent)
        ended = asyncio.ensure_future(reader.read())
        begun = time.monotonic()
        while not ended.done() and time.monotonic() < begun + 5:
            await asyncio.wait([ended], timeout=0.05)
            if not writer.is_closing():
                writer.write(b"a")
        assert ended.done()
        assert a.state == "serving"
        writer.close()
        await asyncio.gather(ended, writer.wait_closed(), return_exceptions=True)


async def test_a_request_that_takes_long_to_answer_is_not_cut(
    registry_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "REQUEST_TIME", 0.1)
    async with nodes(registry_url, "a", http_port=0) as (a,):

        async def pause() -> None:
            await asyncio.sleep(0.5)

        monkeypatch.setattr(a, "pause", pause)
        assert (await ask(a.http_port, "/pause", "POST")).status == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /ping HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 5000 + b"\r\n\r\n", 400),
        (b"POST /pause HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999\r\n\r\n", 413),
        (b"POST /pause HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", 413),
        (b"GET /ping HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx", 413),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    ],
)
async def test_what_is_too_large_or_no_http(registry_url: str, sent: bytes, status: int) -> None:
    async with nodes(registry_url, "a", http_port=0) as (a,):
        assert a.http_port is not None
        assert parse(await exchange("127.0.0.1", a.http_port, sent)).status == status
        assert (await ask(a.http_port, "/ping")).status == 200
        assert a.state == "serving"


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """All that was logged, but for what a loop in debug mode tells of its connections."""
    assert TOKEN not in caplog.text
    return [
        record.getMessage()
        for record in caplog.records
        if (record.name, record.levelno) != ("asyncio", logging.DEBUG)
    ]


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /pause HTTP/1.1\r\nHost: localhost\r\nAuthorization : Bearer TOKEN\r\n\r\n",
        b"GET /ping HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer TOKEN\r\nX: \x01\r\n\r\n",
        b"POST /pause HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer TOKEN\x00\r\n\r\n",
        b"POST /pause TOKEN\r\nHost: localhost\r\n\r\n",
        b"POST /pause HTTP/1.1\r\nHost: localhost\r\nHost: TOKEN\r\n\r\n",
        b"POST /pause HTTP/1.1\r\nHost: localhost\r\nContent-Length: TOKEN\r\n\r\n",
        b"POST /pause HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nTOKEN\r\n",
        b"POST /pause HTTP/1.1\r\nHost: localhost\r\nX: TOKEN" + b"a" * 5000 + b"\r\n\r\n",
        b"GET /TOKEN" + b"a" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /TOKEN?TOKEN HTTP/1.1\r\nHost: TOKEN\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nTOKEN",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03TOKEN\r\n\r\n",
        b"GET /node HTTP/1.1\r\nHost: localhost\r\n\r\nTOKEN TOKEN\r\n\r\n",
    ],
)
async def test_what_is_refused_is_neither_logged_nor_repeated(
    registry_url: str, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is wrong with a request, what was in it may be a secret; the error is JSON."""
    async with nodes(registry_url, "a", http_port=0, admin_token=TOKEN) as (a,):
        assert a.http_port is not None
        caplog.set_level(logging.DEBUG)
        caplog.clear()
        data = await exchange("127.0.0.1", a.http_port, sent.replace(b"TOKEN", TOKEN.encode()))
        told = logged(caplog)
        assert len(told) == a.counters().get("refused_admin_callers", 0)
        assert all(text.startswith("refused 127.0.0.1") for text in told)
        assert a.state == "serving"
    assert TOKEN.encode() not in data
    assert b"aiohttp" not in data
    head, _, last = data.rpartition(b"\r\n\r\n")
    assert json.loads(last)["error"]
    answer = parse(head[head.rindex(b"HTTP/1.") :] + b"\r\n\r\n" + last)
    assert 400 <= answer.status < 500
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert answer.headers["Server"] == "domi_fast"


@pytest.mark.parametrize(
    "sent",
    [
        b"POST http://xn--/TOKEN HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST http://[TOKEN/ HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nTOKEN\r\n\r\n",
    ],
)
async def test_what_is_cut_is_not_logged(
    registry_url: str, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """What aiohttp fails on, in one version or another, before it can be answered."""
    async with nodes(registry_url, "a", http_port=0) as (a,):
        assert a.http_port is not None
        caplog.clear()
        begun = time.monotonic()
        data = await exchange("127.0.0.1", a.http_port, sent.replace(b"TOKEN", TOKEN.encode()))
        assert time.monotonic() - begun < admin.REQUEST_TIME / 2
        assert TOKEN.encode() not in data
        assert not logged(caplog)
        assert (await ask(a.http_port, "/ping")).status == 200


async def test_connections_beyond_the_limit_are_cut(
    registry_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "domi_fast.admin")
    monkeypatch.setattr(admin, "MAX_CONNECTIONS", 3)
    async with nodes(registry_url, "a", http_port=0) as (a,):
        assert a.http_port is not None
        assert a._admin is not None
        server = a._admin._connections
        assert server is not None
        socks = [socket.create_connection(("127.0.0.1", a.http_port)) for _ in range(3)]
        await until(lambda: len(server.connections) == 3)
        with pytest.raises((ConnectionResetError, IndexError)):  # cut: no answer, not even an error
            await ask(a.http_port, "/ping")
        assert a.counters()["refused_admin_connections"] == 1
        (told,) = logged(caplog)
        assert told.startswith("refused 127.0.0.1")
        assert "3 connections" in told
        for sock in socks:
            sock.close()
        await until(lambda: not server.connections)
        assert (await ask(a.http_port, "/ping")).status == 200
