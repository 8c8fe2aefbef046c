"""domi nodes, peers, channels, top and registry check; help, usage, and where the cluster is."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from domi_fast.cli import main
from domi_fast.cli.commands import domi as command
from domi_fast.cli.outcome import MEANINGS
from tests.cli.conftest import Cluster, Here, Shell
from tests.cli.nodes import TOKEN
from tests.support import ROOT

pytestmark = pytest.mark.command

SUBCOMMANDS = [
    *("run", "nodes", "peers", "channels", "top", "notify", "publish", "request", "sub"),
    *("pause", "resume", "drain", "exit", "registry check"),
]


ARGUMENTS = {"node": "gamma", "channel": "50", "data": "x", "targets": "app"}


def flattened(group: click.Group) -> dict[str, click.Command]:
    """Every command of the group, and of groups in it, by the words that call it."""
    found: dict[str, click.Command] = {}
    for name, part in group.commands.items():
        if isinstance(part, click.Group):
            found |= {f"{name} {inner}": each for inner, each in flattened(part).items()}
        else:
            found[name] = part
    return found


def taking(parameter: str) -> list[str]:
    """The commands that have this argument or option."""
    return [
        name
        for name, each in flattened(command).items()
        if parameter in {found.name for found in each.params}
    ]


def words_of(name: str, **given: str) -> list[str]:
    """A command line for it, with all of its arguments."""
    arguments = [
        {**ARGUMENTS, **given}[str(found.name)]
        for found in flattened(command)[name].params
        if isinstance(found, click.Argument)
    ]
    return [*name.split(), *arguments]


def read_terminal(master: int) -> str:
    """All that was written to the terminal until its last writer closed it."""
    data = b""
    while True:
        try:
            more = os.read(master, 65536)
        except OSError:  # the end, as Linux says it
            return data.decode()
        if not more:
            return data.decode()
        data += more


# ----------------------------------------------------------------------------------- help and usage


def test_the_console_script_is_the_command() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^domi = "domi_fast\.cli:main"$', text, re.MULTILINE)
    assert callable(main)


def test_every_subcommand_has_help_with_examples(shell: Shell) -> None:
    found = shell.run("--help")
    assert found.code == 0
    for code, meaning in MEANINGS.items():
        assert re.search(rf"^ +{code}  {re.escape(meaning)}$", found.out.decode(), re.MULTILINE)
    assert set(flattened(command)) == set(SUBCOMMANDS)
    for name in SUBCOMMANDS:
        from click.testing import CliRunner

        text = CliRunner().invoke(command, [*name.split(), "--help"], prog_name="domi").output
        examples = text.partition("Examples:\n")[2].splitlines()
        assert examples
        assert any(line.strip().startswith(f"domi {name}") for line in examples), text
        assert len(text.splitlines()[2]) > 20, text


def test_exit_codes_are_documented() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    for code, meaning in MEANINGS.items():
        assert re.search(rf"^\| {code} \| {re.escape(meaning)}", page, re.MULTILINE), code
    for name in SUBCOMMANDS:
        assert f"`domi {name}" in page


@pytest.mark.parametrize("words", [[], ["registry"]])
def test_a_group_alone_is_a_usage_error_and_shows_its_help(here: Here, words: list[str]) -> None:
    found = here.run(*words)
    assert (found.code, found.out) == (2, b"")
    assert "\nCommands:\n" in found.said


def test_json_is_to_be_had_everywhere() -> None:
    assert taking("as_json") == list(flattened(command))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("bogus", "No such command 'bogus'"),
        ("nodes --bogus", "--bogus"),
        ("request 50", "Missing argument 'DATA'"),
        ("request 49 x", "50<=x<=65499"),
        ("request 65500 x", "50<=x<=65499"),
        ("notify fifty x", "'fifty' is not a valid integer"),
        ("request 50 x --timeout 0", "0.001<=x<=86400"),
        ("request 50 x --timeout nan", "nan is not a number of seconds"),
        ("notify 50 --hex xyz", "hexadecimal"),
        ("sub 50 --count 0", "x>=1"),
        ("request 50 x --output octal", "'utf8', 'hex', 'raw'"),
        ("request 50 x --output raw --json", "choose one"),
        ("drain a --deadline -1", "0<=x<=86400"),
        ("nodes --registry redis://localhost", "redis://localhost"),
        ("nodes --registry sqlite://relative", "sqlite:///"),
        ("nodes --registry memory://x", "inside one process"),
        ("nodes --cluster a/b", "a/b"),
        ("nodes --cluster a/b --registry memory://x", "a/b"),
        ("request 50 x --cluster a/b --connect tcp://localhost:1", "a/b"),
        ("request 50 x --connect http://localhost:1", "tcp://host:port"),
        ("request 50 x --connect tcp://localhost:1 --to alpha", "give an id"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(here: Here, words: str, said: str) -> None:
    here.run(*words.split()).fails(2, said)


@pytest.mark.parametrize(
    "option", ["--secret-file", "--tls-certificate", "--tls-key", "--tls-authority"]
)
@pytest.mark.parametrize("text", ["s3cret", "-----BEGIN PRIVATE KEY-----\ns3cret"])
@pytest.mark.parametrize("by", ["option", "variable"])
def test_what_is_in_a_file_in_place_of_its_name_is_not_repeated(
    here: Here, monkeypatch: pytest.MonkeyPatch, option: str, text: str, by: str
) -> None:
    words = ["request", "50", "x", "--connect", "tcp://127.0.0.1:1"]
    if by == "option":
        words += [f"{option}={text}"]
    else:
        monkeypatch.setenv("DOMI" + option.upper().replace("-", "_")[1:], text)
    ended = here.run(*words)
    ended.fails(2, option, "there is no such file")
    assert "s3cret" not in ended.said


@pytest.mark.parametrize("channel", ["49", "65500", "fifty"])
@pytest.mark.parametrize("name", taking("channel"))
def test_a_channel_that_users_do_not_have(here: Here, name: str, channel: str) -> None:
    here.run(*words_of(name, channel=channel)).fails(2, channel if channel == "fifty" else "50<=x")


@pytest.mark.parametrize("name", [name for name in taking("registry") if name != "registry check"])
def test_without_a_registry(here: Here, name: str, tmp_path: Path) -> None:
    missing = tmp_path / "registry.db"
    url = f"sqlite://{missing}"
    here.run(*words_of(name), "--registry", url).fails(3, str(missing), "start a node")
    assert not missing.exists()


@pytest.mark.parametrize(
    ("package", "words", "said"),
    [
        ("click", "", "domi: the command needs click: pip install 'domi-fast[cli]'\n"),
        ("kazoo", "nodes --registry zookeeper://localhost", "pip install 'domi-fast[zookeeper]'\n"),
        ("consul", "nodes --registry consul://localhost", "pip install 'domi-fast[consul]'\n"),
    ],
)
def test_what_is_missing_is_named_with_its_extra(
    shell: Shell, package: str, words: str, said: str
) -> None:
    """And the command line is not called wrong."""
    script = f"import sys; sys.modules[{package!r}] = None; from domi_fast.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, *words.split()],
        env=shell.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("domi: ")
    assert done.stderr.endswith(said)
    assert done.stderr.count("\n") == 1


# ----------------------------------------------------------------------------- where the cluster is


def test_a_registry_that_is_not_there_is_not_made(shell: Shell) -> None:
    missing = shell.folder / "registry.db"
    shell.run("nodes", "--registry", f"sqlite://{missing}").fails(3, str(missing), "--registry")
    assert not missing.exists()
    shell.run("nodes").fails(3, "default.sqlite", "start a node")


@pytest.mark.external
@pytest.mark.parametrize(
    ("words", "listens", "why"),
    [("registry check", True, "does not answer"), ("nodes", False, "Connection refused")],
)
def test_a_registry_that_cannot_be_reached(
    shell: Shell, words: str, listens: bool, why: str
) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        if listens:
            sock.listen()
        port = sock.getsockname()[1]
        found = shell.run(*words.split(), "--registry", f"etcd://127.0.0.1:{port}")
    found.fails(3, f"etcd at 127.0.0.1:{port}", why)


def test_a_file_that_is_no_registry(shell: Shell) -> None:
    (shell.folder / "file").write_text("no registry" * 100)
    shell.run("nodes", "--registry", f"sqlite://{shell.folder}/file").fails(3, "file")


def test_a_cluster_without_nodes(domi: Shell) -> None:
    assert domi.run("nodes", "--cluster", "other", "--json").json() == []
    domi.run("request", "50", "x", "--cluster", "other").fails(3, "no node in cluster 'other'")
    domi.run("peers", "--cluster", "other").fails(3, "no node in cluster 'other'")


def test_a_node_that_is_not_reached(shell: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    url = f"tcp://127.0.0.1:{port}"
    shell.run("request", "50", "x", "--connect", url).fails(3, url)


def test_the_environment_and_the_command_line(
    here: Here, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = cluster.url
    monkeypatch.setenv("DOMI_REGISTRY", "sqlite:///nothing.db")
    assert len(here.run("nodes", "--registry", url, "--json").json()) == 4
    monkeypatch.setenv("DOMI_REGISTRY", url)
    monkeypatch.setenv("DOMI_CLUSTER", "other")
    assert here.run("nodes", "--json").json() == []
    assert len(here.run("nodes", "--json", "--cluster", "default").json()) == 4


# -------------------------------------------------------------------------------------- the tables


def test_nodes(domi: Shell, cluster: Cluster) -> None:
    found: Any = domi.run("nodes", "--json").json()
    assert [node.pop("epoch") > 0 for node in found] == [True] * 4
    names = ["alpha", "beta", "twin", "twin"]
    assert found == [
        {
            "id": cluster.ids[place],
            "name": name,
            "version": "1.5" if name == "alpha" else "0",
            "host": "127.0.0.1",
            "port": cluster.ports[place],
            "unix_path": cluster.unix_path if name == "alpha" else None,
            "http": cluster.http[place],
        }
        for place, name in enumerate(names)
    ]
    shown = domi.run("nodes")
    assert (shown.code, shown.said) == (0, "")
    assert b"\x1b" not in shown.out
    assert [line.split()[:2] for line in shown.lines] == [
        ["ID", "NAME"],
        *([str(machine), name] for machine, name in zip(cluster.ids, names, strict=True)),
    ]
    # What is piped is not cut, however long it is.
    assert cluster.unix_path in shown.out.decode()


def test_colours_are_for_terminals(domi: Shell) -> None:
    for variables, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        domi.environment |= {"TERM": "xterm-256color", "COLUMNS": "150", **variables}
        master, slave = pty.openpty()
        process = domi.start("nodes", stdout=slave)
        os.close(slave)
        shown = read_terminal(master)
        os.close(master)
        assert domi.end(process).code == 0
        assert "alpha" in shown
        # Without colours a terminal still has bold heads.
        assert bool(re.search(r"\x1b\[[0-9;]*m", shown)) is coloured or not coloured
        assert not re.search(r"\x1b\[(3|4|9)\d", shown) or coloured


def test_peers(domi: Shell, cluster: Cluster) -> None:
    alpha, beta, *_ = cluster.ids
    found: Any = domi.run("peers", "alpha", "--json").json()
    assert [peer["node"] for peer in found] == [alpha] * 3
    assert [peer["id"] for peer in found] == cluster.ids[1:]
    assert found[0]["state"] == "serving"
    assert found[0]["channels"] == [50, 54]
    everybody: Any = domi.run("peers", "--json").json()
    assert {(peer["node"], peer["id"]) for peer in everybody} == {
        (node, peer) for node in (alpha, beta) for peer in cluster.ids if peer != node
    }
    shown = domi.run("peers", str(beta))
    assert shown.code == 0
    assert shown.lines[0].split()[:3] == ["NODE", "PEER", "NAME"]
    assert len(shown.lines) == 4


def test_channels(domi: Shell, cluster: Cluster) -> None:
    alpha, beta, *_ = cluster.ids
    found: Any = domi.run("channels", "--json").json()
    by_channel = {row["channel"]: row["nodes"] for row in found}
    assert by_channel[50] == [alpha, beta]
    assert by_channel[51] == [alpha]
    assert domi.run("channels", "beta", "--json").json() == found
    shown = domi.run("channels")
    assert ["50", str(alpha), str(beta)] in [line.split() for line in shown.lines]


@pytest.mark.parametrize("words", taking("node"))
def test_no_such_node(here: Here, words: str, cluster: Cluster) -> None:
    here.join(cluster)
    here.run(words, "gamma").fails(4, "'gamma'", "alpha")
    here.run(words, "999").fails(4, "'999'", "alpha")
    ids = f"{cluster.ids[2]}, {cluster.ids[3]}"
    here.run(words, "twin").fails(4, "2 nodes are named 'twin'", ids)


@pytest.mark.parametrize("words", taking("node"))
def test_a_node_without_admin_pages(here: Here, words: str, cluster: Cluster) -> None:
    here.join(cluster)
    here.run(words, str(cluster.ids[2])).fails(1, "no admin pages", "http_port=")


def test_top_once(domi: Shell, cluster: Cluster) -> None:
    found: Any = domi.run("top", "--once", "--json").json()
    assert [row["id"] for row in found] == cluster.ids
    alpha, _, twin, _ = found
    assert (alpha["state"], alpha["peers"], alpha["queued"]) == ("serving", 3, 0)
    assert alpha["rss"] > 1 << 20
    assert {"in", "out", "bytes_in", "bytes_out", "in_flight", "channels"} <= set(alpha)
    assert twin == {"id": twin["id"], "name": "twin", "state": None}
    shown = domi.run("top", "--once")
    assert shown.code == 0
    assert shown.lines[0].split()[:3] == ["ID", "NAME", "STATE"]
    assert len(shown.lines) == 5


def test_top_until_it_is_interrupted(domi: Shell) -> None:
    """JSON lines for a pipe, a table for a terminal; Ctrl-C is how both end."""
    process = domi.start("top", "--interval", "0.1", "--json")
    assert process.stdout is not None
    for _ in range(2):
        assert len(json.loads(process.stdout.readline())) == 4
    process.send_signal(signal.SIGINT)
    ended = domi.end(process)
    assert (ended.code, ended.said) == (0, "")

    domi.environment |= {"TERM": "xterm", "COLUMNS": "150"}
    master, slave = pty.openpty()
    process = domi.start("top", "--interval", "0.1", stdout=slave)
    os.close(slave)
    shown = ""
    while shown.count("alpha") < 2:
        shown += os.read(master, 65536).decode()
    process.send_signal(signal.SIGINT)
    read_terminal(master)
    os.close(master)
    assert domi.end(process).code == 0


def test_registry_check(shell: Shell) -> None:
    url = f"sqlite://{shell.folder}/registry.db"
    found: Any = shell.run("registry", "check", "--registry", url, "--json").json()
    assert found["url"] == url
    assert found["limits"] == {"min_ttl": 0.2, "expiry_bound": 0.1, "max_value": 512 * 1024}
    assert set(found["seconds"]) == {
        *("open", "grant", "create", "get", "list", "put", "watch", "delete"),
        *("watch a deletion", "revoke"),
    }
    assert all(0 <= seconds < 5 for seconds in found["seconds"].values())
    shown = shell.run("registry", "check", "--registry", url)
    assert shown.code == 0
    assert shown.lines[0] == f"{url} does what nodes need"
    assert "shortest lease" in shown.out.decode()


def test_what_reads_no_further_ends_it_quietly(domi: Shell) -> None:
    process = domi.start("top", "--interval", "0.1", "--json")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(20) == 1
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.kill()
    process.stderr.close()
    assert process.stdin is not None
    process.stdin.close()


def test_a_token_stays_secret(domi: Shell, cluster: Cluster) -> None:
    domi.environment["DOMI_ADMIN_TOKEN"] = TOKEN
    for words in (["nodes"], ["pause", "999"], ["pause", str(cluster.ids[2])]):
        found = domi.run(*words)
        assert TOKEN not in found.out.decode() + found.said
    assert Path(cluster.unix_path).exists()
