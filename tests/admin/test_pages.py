"""The admin pages: what they tell, and what they have the node do."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from domi_fast import Context, DomiError, Node, RegistryError, connect, metrics
from tests.admin.http import ask
from tests.support import ROOT, echo, forget_records, nodes, until

CORE_PARTS = ROOT / "src" / "domi_fast" / "_core_parts"
SAMPLE = re.compile(r'([a-z_]+)\{((?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)*)\} (\d+)')


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


def samples(page: str) -> dict[str, list[tuple[dict[str, str], int]]]:
    """Each family's samples; every line must be of the form that Prometheus reads."""
    assert page.endswith("\n")
    found: dict[str, list[tuple[dict[str, str], int]]] = {}
    announced: list[str] = []
    for line in page.splitlines():
        if line.startswith("# HELP "):
            announced.append(line.split()[2])
            assert len(line.split(maxsplit=3)[3]) > 5, line
        elif line.startswith("# TYPE "):
            assert line.split()[2] == announced[-1]
            kind = line.split()[3]
            assert kind == ("counter" if announced[-1].endswith("_total") else "gauge"), line
        else:
            matched = SAMPLE.fullmatch(line)
            assert matched, line
            assert matched[1] == announced[-1]
            labels = dict(re.findall(r'([a-z_]+)="((?:[^"\\]|\\.)*)"', matched[2]))
            found.setdefault(matched[1], []).append((labels, int(matched[3])))
    assert len(set(announced)) == len(announced)
    return found


async def test_ping(registry_url: str) -> None:
    async with nodes(registry_url, "a", http_port=0) as (a,):
        answer = await ask(a.http_port, "/ping")
        assert (answer.status, answer.text) == (200, "pong\n")
        assert answer.headers["Cache-Control"] == "no-store"


async def test_health(registry_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(registry_url, "a", http_port=0, lease_ttl=0.3) as (a,):
        answer = await ask(a.http_port, "/health")
        assert answer.status == 200
        assert answer.json() == {"state": "serving", "registered": True}
        registry: Any = a._mesh._registry

        async def is_away(*_: object) -> None:
            raise RegistryError("the registry is away")

        with monkeypatch.context() as away:
            away.setattr(registry, "_keep_alive", False)
            away.setattr(registry, "claim", is_away)
            await until(lambda: not a.registered)
            answer = await ask(a.http_port, "/health")
            assert answer.status == 503
            assert answer.json() == {"state": "serving", "registered": False}
        await until(lambda: a.registered)
        assert (await ask(a.http_port, "/health")).status == 200


async def test_metrics(registry_url: str) -> None:
    async with nodes(registry_url, 'a"\\\nb', "b", http_port=0) as (a, b):
        b.subscribe(50, echo)
        await a.wait_subscribed(50)
        for _ in range(3):
            await a.request(50, b"x")
        answer = await ask(a.http_port, "/metrics")
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        found = samples(answer.text)
        own = {"cluster": "default", "node": r"a\"\\\nb", "id": str(a.id)}
        for family in found.values():
            for labels, _ in family:
                assert own.items() <= labels.items()
        for name, value in a.counters().items():
            kind = "" if name in metrics.GAUGES else "_total"
            [(_, shown)] = found[f"domi_{name}{kind}"]
            assert shown <= value
        assert found["domi_frames_in_total"][0][1] >= 3
        assert found["domi_peers"] == [(own, 1)]
        assert found["domi_registered"] == [(own, 1)]
        assert found["domi_peer_queued_bytes"] == [
            ({**own, "peer": str(b.id), "peer_name": "b"}, 0)
        ]
        assert found["domi_process_resident_memory_bytes"][0][1] > 1 << 20
        states = {labels["state"]: value for labels, value in found["domi_state"]}
        assert states == {state: int(state == "serving") for state in metrics.STATES}


async def test_what_was_dropped_is_shown_by_peer_and_channel(registry_url: str) -> None:
    settings: dict[str, Any] = {"queue_limit": 64 << 10, "when_full": "drop_newest"}
    async with nodes(registry_url, "a", http_port=0, **settings) as (a,):
        a.subscribe(50, lambda ctx: None)
        for _ in range(100):
            a.notify(50, bytes(1_000))
        found = samples((await ask(a.http_port, "/metrics")).text)
        own = {"cluster": "default", "node": "a", "id": str(a.id), "peer": str(a.id)}
        dropped = a.drops()[a.id, 50]
        assert dropped == 100 - 66
        assert found["domi_dropped_frames_total"] == [({**own, "channel": "50"}, dropped)]
        assert found["domi_dropped_slow_peer_total"][0][1] == dropped


def test_every_counter_is_explained() -> None:
    """So that each is there from the beginning, with a HELP of its own."""
    package = CORE_PARTS.parent
    parts = [*CORE_PARTS.glob("*.pxi"), *package.rglob("*.py")]
    text = "".join(path.read_text() for path in parts)
    counted = set(re.findall(r'(?:\b|_)(?:count|note)\("(\w+)"[,)]', text))
    assert len(counted) > 10
    always = {"frames_in", "frames_out", "bytes_in", "bytes_out"}
    assert counted == set(metrics.COUNTERS) - always


async def test_node_peers_and_channels(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", http_port=0, version="1.2") as (a, b):
        a.subscribe(50, echo)
        b.subscribe(50, echo)
        b.subscribe(60, echo)
        await a.wait_subscribed(60)
        await a.wait_subscribed(50, 2)
        async with await connect(f"tcp://127.0.0.1:{a.port}") as guest:
            guest.subscribe(70, echo)
            await a.wait_subscribed(70)
            told = (await ask(a.http_port, "/node")).json()
            assert told.pop("counters")["frames_in"] > 0
            assert told.pop("uptime") >= 0
            assert told.pop("rss") > 1 << 20
            assert told == {
                "id": a.id,
                "name": "a",
                "version": "1.2",
                "cluster": "default",
                "state": "serving",
                "registered": True,
                "host": "127.0.0.1",
                "port": a.port,
                "unix_path": None,
                "http_port": a.http_port,
                "pid": os.getpid(),
                "peers": 1,
                "channels": 2,
                "queued": 0,
            }
            assert (await ask(a.http_port, "/peers")).json() == [
                {
                    "id": b.id,
                    "name": "b",
                    "version": "1.2",
                    "state": "serving",
                    "address": a.peers[b.id].address,
                    "plain": False,
                    "queued": 0,
                    "channels": [50, 60],
                }
            ]
            assert (await ask(a.http_port, "/channels")).json() == [
                {"channel": 50, "nodes": sorted([a.id, b.id])},
                {"channel": 60, "nodes": [b.id]},
                {"channel": 70, "nodes": [a.id]},
            ]


async def test_the_registry_knows_the_port(registry_url: str) -> None:
    b = Node("b", registry=registry_url)
    async with nodes(registry_url, "a", http_port=0) as (a,), b:
        members = a._mesh._members
        await until(lambda: b.id in members.view)
        assert (members.view[a.id].http, members.view[b.id].http) == (a.http_port, None)
        assert b.http_port is None


async def test_pause_and_resume(registry_url: str) -> None:
    async with nodes(registry_url, "a", http_port=0) as (a,):
        answer = await ask(a.http_port, "/pause", "POST")
        assert (answer.status, answer.json()) == (200, {"state": "paused"})
        assert a.state == "paused"
        assert (await ask(a.http_port, "/health")).status == 503
        answer = await ask(a.http_port, "/resume", "POST")
        assert (answer.status, answer.json()) == (200, {"state": "serving"})
        assert (await ask(a.http_port, "/health")).status == 200


async def test_drain_answers_when_the_work_is_done(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", http_port=0) as (a, b):
        asked, may_end = asyncio.Event(), asyncio.Event()

        @a.subscribe(50)
        async def works(ctx: Context) -> None:
            asked.set()
            await may_end.wait()
            ctx.reply(b"done")

        await b.wait_subscribed(50)
        request = asyncio.ensure_future(b.request(50, b""))
        await asked.wait()
        drain = asyncio.ensure_future(ask(a.http_port, "/drain?deadline=20", "POST"))
        await until(lambda: a.state == "draining")
        assert (await ask(a.http_port, "/health")).status == 503
        assert not drain.done()
        may_end.set()
        answer = await drain
        assert (answer.status, answer.json()) == (200, {"finished": True})
        assert await request == b"done"
        await until(lambda: a.state == "closed")
        await b.wait_peers(0, 5)


async def test_drain_says_what_was_not_finished(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", http_port=0, drain_timeout=0.1) as (a, b):
        asked = asyncio.Event()

        @a.subscribe(50)
        async def hangs(ctx: Context) -> None:
            asked.set()
            await asyncio.Event().wait()

        await b.wait_subscribed(50)
        request = asyncio.ensure_future(b.request(50, b""))
        await asked.wait()
        answer = await ask(a.http_port, "/drain?deadline=0.05", "POST")
        assert (answer.status, answer.json()) == (200, {"finished": False})
        await asyncio.gather(request, return_exceptions=True)
        await b.wait_peers(0, 5)


@pytest.mark.parametrize("query", ["deadline=soon", "deadline=-1", "deadline=nan", "dead=1"])
async def test_a_drain_that_is_not_understood_does_nothing(registry_url: str, query: str) -> None:
    async with nodes(registry_url, "a", http_port=0) as (a,):
        answer = await ask(a.http_port, f"/drain?{query}", "POST")
        assert answer.status == 400
        assert query.partition("=")[0] in answer.json()["error"]
        assert a.state == "serving"


async def test_exit_closes_the_node(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", http_port=0) as (a, b):
        port = a.http_port
        answer = await ask(port, "/exit", "POST")
        assert (answer.status, answer.json()) == (202, {"exiting": True})
        await b.wait_peers(0, 5)
        await a.close()
        with pytest.raises(OSError, match="onnect"):
            await ask(port, "/ping")


def test_exit_ends_the_program(sqlite_url: str, tmp_path: Path) -> None:
    """With exit code 0, once its node is closed; what runs beside the node is closed too."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from domi_fast import Node, Serial, run\n"
        "class Says:\n"
        "    async def start(self): print(node.http_port, flush=True)\n"
        "    async def close(self): print('closed', node.state)\n"
        f"node = Node('a', registry={sqlite_url!r}, http_port=0)\n"
        "run(node, Serial(node), Says())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-W", "error", str(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            answer = asyncio.run(ask(port, "/exit", "POST"))
            assert answer.status == 202
            out, errors = process.communicate(timeout=20)
        finally:
            process.kill()
        assert (process.returncode, out, errors) == (0, "closed closed\n", "")


async def test_wrong_paths_and_methods(registry_url: str) -> None:
    async with nodes(registry_url, "a", http_port=0) as (a,):
        assert a._admin is not None
        for path, (method, _) in a._admin.routes.items():
            for wrong in {"GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"} - {method}:
                answer = await ask(a.http_port, path, wrong)
                if (method, wrong) == ("GET", "HEAD"):
                    assert (answer.status, answer.text) == (200, "")
                    continue
                assert (answer.status, answer.headers["Allow"]) == (405, method), (path, wrong)
        assert a.state == "serving"
        answer = await ask(a.http_port, "/")
        assert answer.status == 404
        assert "/health" in answer.json()["error"]


async def test_a_page_that_fails_is_logged(
    registry_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes(registry_url, "a", http_port=0) as (a,):

        def fails() -> int:
            raise LookupError("of this test")

        monkeypatch.setattr(metrics, "rss", fails)
        answer = await ask(a.http_port, "/metrics")
        assert answer.status == 500
        assert "of this test" not in answer.text
        assert "/metrics failed" in caplog.text
        assert (await ask(a.http_port, "/ping")).status == 200


# ---------------------------------------------------------------------------------- start and close


async def test_a_port_that_is_taken(registry_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        node = Node("a", registry=registry_url, http_port=port)
        with pytest.raises(OSError, match=rf"http_port.*127\.0\.0\.1:{port}"):
            await node.start()
        assert node.state == "closed"


async def test_the_port_is_free_again_whatever_happens(registry_url: str) -> None:
    async with nodes(registry_url, "a", http_port=0) as (a,):
        port = a.http_port
    # A start that fails after the pages were there gives their port back too.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        node = Node("a", registry=registry_url, http_port=port, port=taken.getsockname()[1])
        with pytest.raises(OSError, match="listen"):
            await node.start()
    async with nodes(registry_url, "a", http_port=port) as (a,):
        assert a.http_port == port


async def test_a_connection_that_stays_open_does_not_hold_up_the_close(registry_url: str) -> None:
    async with nodes(registry_url, "a", http_port=0) as (a,):
        assert a.http_port is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", a.http_port)
        writer.write(f"GET /ping HTTP/1.1\r\nHost: localhost:{a.http_port}\r\n\r\n".encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        await asyncio.wait_for(a.close(), 0.9)
        assert (await reader.read()).endswith(b"pong\n")
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def test_a_forked_child_does_not_keep_the_port(registry_url: str) -> None:
    async with nodes(registry_url, "a", http_port=0) as (a,):
        port = a.http_port
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(tell)
            os.read(told, 1)  # until the parent has looked
            os._exit(0)
        try:
            await a.close()
            with pytest.raises(OSError, match="onnect"):
                await ask(port, "/ping")
        finally:
            os.close(tell)
            os.waitpid(child, 0)
            os.close(told)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("http_port", value) for value in (-1, 65536, "80", 1.5, True)),
        *(("admin_token", value) for value in ("short", "with a space in it", "ü" * 20, b"x" * 20)),
    ],
)
def test_settings_that_are_refused(registry_url: str, setting: str, value: object) -> None:
    settings: dict[str, Any] = {"http_port": 0, setting: value}
    with pytest.raises((ValueError, TypeError), match=setting) as refused:
        Node("a", registry=registry_url, **settings)
    if setting == "admin_token":
        assert repr(value) not in str(refused.value)


def test_a_token_needs_a_port_and_is_not_shown(registry_url: str) -> None:
    token = "a-token-of-this-test"
    with pytest.raises(ValueError, match="http_port"):
        Node("a", registry=registry_url, admin_token=token)
    node = Node("a", registry=registry_url, http_port=0, admin_token=token)
    assert token not in repr(node.config)


def test_a_missing_package_is_named_with_its_extra() -> None:
    script = (
        "import asyncio, sys\n"
        "sys.modules['aiohttp'] = None\n"
        "from domi_fast import Node\n"
        "asyncio.run(Node('a', registry='memory://a', http_port=0).start())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "pip install 'domi-fast[admin]'" in done.stderr.splitlines()[-1]
    assert DomiError.__name__ in done.stderr.splitlines()[-1]
