"""domi run, pause, resume, drain and exit, against programs that domi run has started."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from domi_fast import Tls
from domi_fast.cli.commands import domi as command
from domi_fast.config import NodeConfig
from domi_fast.membership import NodeInfo, nodes_prefix
from domi_fast.registry import open_registry
from tests.certificates import Authority
from tests.cli.conftest import Cluster, Here, Shell
from tests.cli.nodes import TOKEN
from tests.cli.test_looking import read_terminal
from tests.support import until_now

pytestmark = pytest.mark.command

APP = """\
import asyncio
from domi_fast import Node

node = Node("server", http_port=0, drain_timeout=0.2, lease_ttl=10.0)
plain = 5
asked = asyncio.Event()


@node.subscribe(50)
def ping(ctx):
    ctx.reply(b"pong")


@node.subscribe(51)
async def work(ctx):
    await asyncio.sleep(float(ctx.data))
    ctx.reply(b"worked")
"""


@pytest.fixture
def server(shell: Shell, here: Here) -> Iterator[subprocess.Popen[bytes]]:
    """A program of one node, in the default cluster of the shell's own runtime directory."""
    (shell.folder / "app.py").write_text(APP)
    process = shell.start("run", "app:node")
    try:
        until_now((shell.folder / "runtime" / "domi" / "default.sqlite").exists, 20)
        until_now(lambda: here.run("nodes", "--json").json() != [], 20, pause=0)
        yield process
    finally:
        process.kill()
        process.communicate()


def work(shell: Shell, here: Here, seconds: float) -> subprocess.Popen[bytes]:
    """A request that takes so long and is under way."""
    process = shell.start("request", "51", str(seconds), "--timeout", "20")
    until_now(lambda: in_flight(here) == 1, 20, pause=0)
    return process


def in_flight(here: Here) -> int:
    (row,) = here.run("top", "--once", "--json").json()
    return int(row["in_flight"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run(
    shell: Shell, here: Here, server: subprocess.Popen[bytes], number: signal.Signals
) -> None:
    assert shell.run("request", "50", "").out == b"pong\n"
    server.send_signal(number)
    ended = shell.end(server)
    assert (ended.code, ended.out) == (0, b"")
    assert "listens on" in ended.said
    assert here.run("nodes", "--json").json() == []


def test_a_cluster_with_a_secret(shell: Shell, here: Here) -> None:
    """The program has it from its environment, the command from there or from a file."""
    secret = "the secret of this test"
    (shell.folder / "app.py").write_text(APP)
    (shell.folder / "secret").write_text(f"{secret}\n")
    (shell.folder / "another").write_text("the secret of another")
    (shell.folder / "short").write_text("short")
    process = shell.start("run", "app:node", env={**shell.environment, "DOMI_SECRET": secret})
    try:
        until_now((shell.folder / "runtime" / "domi" / "default.sqlite").exists, 20)
        until_now(lambda: here.run("nodes", "--json").json() != [], 20, pause=0)
        ask = ("request", "50", "")
        here.run(*ask).fails(3, "does it ask for TLS; does it ask for a secret?")
        here.run(*ask, "--secret-file", "another").fails(
            3, "does it ask for TLS; has it this secret?"
        )
        assert here.run(*ask, "--secret-file", "secret").out == b"pong\n"
        short = here.run(*ask, "--secret-file", "short")
        assert short.code == 2
        assert "short of 5 bytes: 16 to 1024 are wanted" in short.said
        missing = here.run(*ask, "--secret-file", "nowhere")
        assert missing.code == 2
        assert "--secret-file" in missing.said
        shell.environment["DOMI_SECRET"] = secret
        assert shell.run(*ask).out == b"pong\n"
        shell.environment["DOMI_SECRET"] = "short"
        short = shell.run(*ask)
        assert short.code == 2
        assert "DOMI_SECRET of 5 bytes" in short.said
        process.send_signal(signal.SIGTERM)
    finally:
        ended = shell.end(process)
    assert ended.code == 0
    assert secret not in ended.said


def test_a_cluster_with_tls(shell: Shell, here: Here) -> None:
    """The command shows a certificate, of files that are named or stand in the environment."""
    authority = Authority(shell.folder / "authority")
    tls, foreign = authority.issue("app"), Authority(shell.folder / "foreign").issue("tool")
    (shell.folder / "app.py").write_text(
        APP.replace("import Node", "import Node, Tls").replace(
            'Node("server"', f'Node("app", tls={tls!r}'
        )
    )
    process = shell.start("run", "app:node")
    try:
        until_now((shell.folder / "runtime" / "domi" / "default.sqlite").exists, 20)
        until_now(lambda: here.run("nodes", "--json").json() != [], 20, pause=0)
        ask = ("request", "50", "")
        here.run(*ask).fails(3, "does it ask for TLS; does it ask for a secret?")
        here.run(*ask, *files(foreign)).fails(3, "self-signed certificate")
        assert here.run(*ask, *files(authority.issue("tool"))).out == b"pong\n"
        part = here.run(*ask, "--tls-key", tls.key)
        assert part.code == 2
        assert "give all three" in part.said
        wrong = here.run(*ask, *files(Tls(tls.certificate, foreign.key, tls.authority)))
        assert wrong.code == 2
        assert "key values mismatch" in wrong.said
        for field in ("certificate", "key", "authority"):
            shell.environment[f"DOMI_TLS_{field.upper()}"] = getattr(tls, field)
        assert shell.run(*ask).out == b"pong\n"
        process.send_signal(signal.SIGTERM)
    finally:
        ended = shell.end(process)
    assert ended.code == 0


def files(tls: Tls) -> list[str]:
    """The options that name these files."""
    fields = ("certificate", "key", "authority")
    return [part for field in fields for part in (f"--tls-{field}", getattr(tls, field))]


def test_run_says_in_json_when_it_is_there_and_when_it_has_ended(shell: Shell, here: Here) -> None:
    (shell.folder / "app.py").write_text(APP)
    process = shell.start("run", "app:node", "--json")
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        (node,) = here.run("nodes", "--json").json()
        assert node.pop("epoch") > 0
        assert ready == {"event": "ready", "nodes": [node]}
        process.send_signal(signal.SIGTERM)
    finally:
        ended = shell.end(process)
    assert (ended.code, ended.lines) == (0, ['{"event": "ended"}'])


def test_run_that_cannot_start_says_nothing_in_json(shell: Shell) -> None:
    (shell.folder / "app.py").write_text(
        "from domi_fast import Node\nnode = Node('a', registry='sqlite:///proc/none/there.db')\n"
    )
    shell.run("run", "app", "--json").fails(3, "/proc/none/there.db")


@pytest.mark.parametrize(
    ("target", "code", "words"),
    [
        ("nothing:node", 2, ["no module 'nothing'"]),
        ("nothing.deeper:node", 2, ["no module 'nothing.deeper'"]),
        ("app:other", 2, ["no attribute 'other'"]),
        ("app:node.other", 2, ["no attribute 'node.other'"]),
        ("app:plain", 2, ["app:plain is 5", "Node"]),
        ("app:Node", 2, ["class", "Node"]),
        ("app:", 2, ["app:node"]),
        (":node", 2, ["MODULE:ATTRIBUTE"]),
    ],
)
def test_what_cannot_be_run(
    here: Here, tmp_path: Path, target: str, code: int, words: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "app", raising=False)
    (tmp_path / "app.py").write_text(APP)
    here.run("run", target).fails(code, *words)


@pytest.mark.parametrize("wrong", ["import no_such_thing_at_all", "open('no_such_thing_at_all')"])
def test_what_goes_wrong_in_the_module_has_its_traceback(shell: Shell, wrong: str) -> None:
    (shell.folder / "app.py").write_text(f"{wrong}\n")
    ended = shell.run("run", "app")
    assert ended.code == 1
    assert "Traceback" in ended.said
    assert "no_such_thing_at_all" in ended.said.splitlines()[-1]


def test_a_node_that_cannot_start(shell: Shell) -> None:
    (shell.folder / "app.py").write_text(
        "from domi_fast import Node\nnode = Node('a', registry='sqlite:///proc/none/there.db')\n"
    )
    shell.run("run", "app").fails(3, "/proc/none/there.db")
    shell.run("run", "app", "app:node").fails(2, "named twice")


def test_pause_and_resume(shell: Shell, server: subprocess.Popen[bytes]) -> None:
    found = shell.run("pause", "server")
    assert (found.code, found.lines, found.said) == (0, ["node 0 (server): paused"], "")
    shell.run("request", "50", "", "--timeout", "1").fails(4, "50")
    answer: Any = shell.run("resume", "0", "--json").json()
    assert answer == {"node": 0, "name": "server", "state": "serving"}
    assert shell.run("request", "50", "").out == b"pong\n"


PEER = """\
from domi_fast import Node

node = Node("peer")
"""


def test_a_peer_that_hangs_holds_up_the_answer_and_not_the_pause(
    shell: Shell, here: Here, server: subprocess.Popen[bytes]
) -> None:
    """It is said that the node is paused; within the default time such a peer is given up."""
    (shell.folder / "peer.py").write_text(PEER)
    peer = shell.start("run", "peer")
    try:
        until_now(lambda: len(here.run("peers", "server", "--json").json()) == 1, 20, pause=0)
        peer.send_signal(signal.SIGSTOP)
        found = here.run("pause", "server", "--timeout", "0.2")
        found.fails(5, "node 0 (server) is paused", "not every peer")
        found = here.run("resume", "server", "--timeout", "0.2")
        found.fails(5, "node 0 (server) is serving", "not every peer")
    finally:
        peer.kill()
        peer.communicate()
    assert here.run("pause", "server").code == 0
    for name in ("pause", "resume"):
        default = {each.name: each.default for each in command.commands[name].params}["timeout"]
        assert isinstance(default, float)
        assert default > NodeConfig.heartbeat_timeout


def test_exit(shell: Shell, here: Here, server: subprocess.Popen[bytes]) -> None:
    """When the command is done the node has left, and then its program ends."""
    found = shell.run("exit", "server")
    assert (found.code, found.lines, found.said) == (0, ["node 0 (server): gone"], "")
    assert here.run("nodes", "--json").json() == []
    assert shell.end(server).code == 0


def test_drain(shell: Shell, here: Here, server: subprocess.Popen[bytes]) -> None:
    """It waits for the work, and the work is done."""
    request = work(shell, here, 1.0)
    answer: Any = shell.run("drain", "server", "--json").json()
    assert answer == {"node": 0, "name": "server", "finished": True}
    assert here.run("nodes", "--json").json() == []
    ended = shell.end(request)
    assert (ended.code, ended.out) == (0, b"worked\n")
    assert shell.end(server).code == 0


def test_drain_on_a_terminal_shows_what_it_waits_for(
    shell: Shell, here: Here, server: subprocess.Popen[bytes]
) -> None:
    request = work(shell, here, 15.0)
    shell.environment |= {"TERM": "xterm", "COLUMNS": "120"}
    master, slave = pty.openpty()
    process = shell.start("drain", "server", "--deadline", "1", stderr=slave)
    os.close(slave)
    shown = read_terminal(master)
    os.close(master)
    ended = shell.end(process)
    assert (ended.code, ended.lines) == (5, ["node 0 (server): gone with work unfinished"])
    assert "node 0 (server): draining" in shown
    assert "1 requests in flight" in shown
    assert shell.end(request).code == 1
    assert shell.end(server).code == 0


def test_tokens(domi: Shell, here: Here, cluster: Cluster) -> None:
    here.join(cluster)
    here.run("pause", "beta").fails(1, "401", "--token", "DOMI_ADMIN_TOKEN")
    here.run("pause", "beta", "--token", "not-the-token-of-the-node").fails(1, "401")
    assert domi.run("pause", "beta", "--token", TOKEN).code == 0
    domi.environment["DOMI_ADMIN_TOKEN"] = TOKEN
    assert domi.run("resume", "beta").lines == [f"node {cluster.ids[1]} (beta): serving"]


async def register_ghost(url: str) -> NodeInfo:
    """Leave the claim of a node that is gone, and whose ports another one has now."""
    registry = open_registry(url)
    await registry.open()
    try:
        key = f"{nodes_prefix('default')}0000"
        entry = await registry.get(key)
        assert entry is not None
        ghost = dataclasses.replace(NodeInfo.decode(entry), id=7, name="ghost")
        await registry.put(f"{nodes_prefix('default')}0007", ghost.encode())
    finally:
        await registry.close()
    return ghost


@pytest.mark.parametrize("words", ["pause", "drain", "exit"])
def test_a_port_that_another_node_has_taken(
    shell: Shell, here: Here, server: subprocess.Popen[bytes], words: str
) -> None:
    asyncio.run(register_ghost(f"sqlite://{shell.folder}/runtime/domi/default.sqlite"))
    here.run(words, "ghost").fails(4, "node 7 (ghost)", "node 0 (server)")
    assert here.run("request", "50", "").out == b"pong\n"


def test_an_admin_port_that_nobody_serves(
    shell: Shell, here: Here, server: subprocess.Popen[bytes]
) -> None:
    """A node that was killed is in the registry until its lease ends."""
    assert here.run("nodes", "--json").json() != []
    server.kill()
    server.wait()
    found = shell.run("exit", "server")
    found.fails(3, "node 0 (server)", "http://127.0.0.1:")
