"""domi notify, publish, request and sub, against live nodes."""

from __future__ import annotations

import json
import os
import re
import signal
from typing import Any

import pytest

from tests.cli.conftest import Cluster, Here, Shell
from tests.cli.nodes import (
    BYTES,
    ECHO,
    FAIL,
    KEEP,
    KEPT,
    MESSAGES,
    NEWS,
    NEWS_CHANNEL,
    NOBODY,
    RAW,
    SLOW,
)

pytestmark = pytest.mark.command


def kept(here: Here) -> list[str]:
    """What the nodes have kept of channel KEEP since they were asked last."""
    found = here.run("request", str(KEPT), "", "--to", "alpha")
    assert found.code == 0, found
    answer: list[str] = json.loads(found.out)
    return answer


# ----------------------------------------------------------------------------------------- requests


def test_request(domi: Shell) -> None:
    found = domi.run("request", str(ECHO), "hello")
    assert (found.code, found.out, found.said) == (0, b"hello\n", "")
    answer: Any = domi.run("request", str(ECHO), "grüße", "--json").json()
    assert 0 < answer.pop("seconds") < 5
    assert answer == {"channel": ECHO, "data": "grüße", "encoding": "utf8"}


def test_data_come_from_the_standard_input_and_from_digits(domi: Shell) -> None:
    data = bytes(range(256)) * 1000
    found = domi.run("request", str(ECHO), "-", "--output", "raw", stdin=data)
    assert (found.code, found.out) == (0, data)
    found = domi.run("request", str(ECHO), "00ff 10", "--hex", "--output", "hex")
    assert (found.code, found.out) == (0, b"00ff10\n")


def test_what_would_steer_a_terminal_is_shown_as_text(here: Here, cluster: Cluster) -> None:
    here.join(cluster)
    found = here.run("request", str(BYTES), "")
    assert found.out == b"\\xff\\x00\\x1b[31m\n"
    assert here.run("request", str(BYTES), "", "--output", "raw").out == RAW
    answer: Any = here.run("request", str(BYTES), "", "--json").json()
    assert (answer["data"], answer["encoding"]) == (RAW.hex(), "hex")


def test_the_one_who_is_asked(here: Here, cluster: Cluster) -> None:
    here.join(cluster)
    for node in ("beta", str(cluster.ids[1])):
        assert here.run("notify", str(KEEP), "x", "--to", node).code == 0
    assert kept(here) == ["beta 78", "beta 78"]


@pytest.mark.parametrize("by", ["tcp", "unix"])
def test_through_one_node_without_a_registry(shell: Shell, cluster: Cluster, by: str) -> None:
    urls = {"tcp": f"tcp://127.0.0.1:{cluster.ports[2]}", "unix": f"unix://{cluster.unix_path}"}
    words = ("request", str(ECHO), "x", "--connect", urls[by])
    assert shell.run(*words, "--to", str(cluster.ids[1])).out == b"x\n"
    shell.run(*words, "--to", "1000").fails(4, "node '1000'")


def test_requests_that_fail(here: Here, cluster: Cluster) -> None:
    here.join(cluster)
    here.run("request", str(NOBODY), "x").fails(4, str(NOBODY))
    here.run("request", str(FAIL), "x").fails(1, "LookupError", "of this test\\x1b[31m")
    here.run("request", str(SLOW), "x", "--timeout", "0.05").fails(5, str(SLOW))
    here.run("request", str(ECHO), "x", "--to", "gamma").fails(4, "'gamma'")
    here.run("request", str(FAIL), "x", "--to", "beta").fails(4, str(FAIL))


def test_a_request_that_is_interrupted(domi: Shell) -> None:
    process = domi.start("request", str(SLOW), "x", "--timeout", "60", "--json")
    try:
        wait_connected(process.pid)
        process.send_signal(signal.SIGINT)
    finally:
        ended = domi.end(process)
    assert (ended.code, ended.out, ended.said) == (130, b"", "")


def wait_connected(pid: int) -> None:
    """Wait until the process has a socket that is connected: it runs its command by then."""
    from tests.support import until_now

    def connected() -> bool:
        inodes = set()
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{name}"))
            except FileNotFoundError:
                continue
            inodes |= {found[1]} if found else set()
        with open("/proc/net/tcp", encoding="ascii") as table:
            rows = [line.split() for line in table.readlines()[1:]]
        return any(row[9] in inodes and row[3] == "01" for row in rows)

    until_now(connected, timeout=20)


# ------------------------------------------------------------------------------- notify and publish


def test_notify_and_publish(domi: Shell, here: Here, cluster: Cluster) -> None:
    here.join(cluster)
    found = domi.run("notify", str(KEEP), "one")
    assert (found.code, found.out, found.said) == (0, b"", "")
    assert domi.run("publish", str(KEEP), "--json", "-", stdin=b"two").json() == {
        "channel": KEEP,
        "bytes": 3,
        "sent": True,
    }
    once, *both = kept(here)
    assert once.endswith(b"one".hex())
    assert sorted(both) == [f"alpha {b'two'.hex()}", f"beta {b'two'.hex()}"]


def test_nobody_hears_it(here: Here, cluster: Cluster) -> None:
    here.join(cluster)
    here.run("notify", str(NOBODY), "x").fails(4, str(NOBODY))
    here.run("notify", str(KEEP), "x", "--to", str(cluster.ids[2])).fails(4)
    found = here.run("publish", str(NOBODY), "x")
    assert (found.code, found.out, found.said) == (0, b"", "")


def test_a_message_that_is_too_large(domi: Shell, here: Here, cluster: Cluster) -> None:
    here.join(cluster)
    found = domi.run("notify", str(KEEP), "-", stdin=bytes(17 << 20))
    found.fails(1, str(16 << 20))
    assert kept(here) == []


# ---------------------------------------------------------------------------------------------- sub


@pytest.mark.parametrize("form", ["utf8", "hex", "raw", "json"])
def test_sub(domi: Shell, here: Here, cluster: Cluster, form: str) -> None:
    here.join(cluster)
    option = ["--json"] if form == "json" else ["--output", form]
    process = domi.start("sub", str(NEWS_CHANNEL), "--count", "3", *option)
    try:
        assert here.run("request", str(NEWS), "", "--timeout", "20").out == b"sent\n"
    finally:
        ended = domi.end(process)
    assert (ended.code, ended.said) == (0, "")
    if form == "utf8":
        assert ended.lines == ["one", r"\xff\x00\x1b[31m", r"two\nlines"]
    elif form == "hex":
        assert ended.lines == [data.hex() for data in MESSAGES]
    elif form == "raw":
        assert ended.out == b"".join(MESSAGES)
    else:
        found = [json.loads(line) for line in ended.lines]
        assert {(row["channel"], row["request"]) for row in found} == {(NEWS_CHANNEL, False)}
        assert [(row["data"], row["encoding"]) for row in found] == [
            ("one", "utf8"),
            (RAW.hex(), "hex"),
            ("two\nlines", "utf8"),
        ]


@pytest.mark.parametrize(("count", "code"), [([], 0), (["--count", "9"], 130)])
def test_sub_until_it_is_interrupted(
    domi: Shell, here: Here, cluster: Cluster, count: list[str], code: int
) -> None:
    """Without a count Ctrl-C is how it ends; with one it ends too early."""
    here.join(cluster)
    process = domi.start("sub", str(NEWS_CHANNEL), *count)
    try:
        assert here.run("request", str(NEWS), "", "--timeout", "20").code == 0
        assert process.stdout is not None
        assert process.stdout.readline() == b"one\n"
        process.send_signal(signal.SIGINT)
    finally:
        ended = domi.end(process)
    assert (ended.code, ended.said) == (code, "")


def test_sub_has_a_time(here: Here, cluster: Cluster) -> None:
    here.join(cluster)
    here.run("sub", str(NEWS_CHANNEL), "--timeout", "0.3").fails(5, str(NEWS_CHANNEL))
