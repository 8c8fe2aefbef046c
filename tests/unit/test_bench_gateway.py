"""The benchmarks of the gateway: what its clients say, and the program that they are."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.child import BenchError, Child
from bench.gateway import wire
from bench.gateway_suite import open_files
from bench.settings import Skip
from bench.websocket import processes
from bench.websocket.processes import ask, compiled
from domi_fast import encode_frame
from domi_fast.gateway.frames import welcome

SIZE = 30  # bytes of a frame that is watched for
AGE = 0.005  # seconds since it was sent


def test_descriptors_are_raised_for_the_children_alone() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open_files(100):
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
    too_many = before[1] + 1
    wanted = f"a process may not open {too_many} files, but {before[1]}: ulimit -Hn"
    with pytest.raises(Skip, match=wanted), open_files(too_many):
        pass


def test_what_a_client_gets_has_the_size_that_is_waited_for() -> None:
    joined = encode_frame(wire.JOINED, b"")
    greeted = welcome((7).to_bytes(8, "little") + bytes(16), 30.0)
    assert len(greeted) + len(joined) + 2 * 2 == wire.WELCOMED
    assert wire.user_of(b"\x82\x24" + greeted) == 7
    assert (wire.size_of(117), wire.size_of(118)) == (127, 130)


# ----------------------------------------------------------------------------- the program in C


def frame(stamp: int) -> bytes:
    return b"\x82" + bytes(SIZE - 9) + wire.STAMP.pack(stamp)


class Server:
    """Takes two connections, and sends what it is told to."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.taken: list[socket.socket] = []
        self._thread = threading.Thread(target=self._take)
        self._thread.start()

    def _take(self) -> None:
        for _ in range(2):
            taken, _ = self._listening.accept()
            taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            got = b""
            while b"\r\n\r\n" not in got:
                got += taken.recv(4096)
            taken.sendall(b"HTTP/1.1 101 yes\r\n\r\n")
            self.taken.append(taken)

    def close(self) -> None:
        self._thread.join()
        for each in (self._listening, *self.taken):
            each.close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def load(tmp_path: Path, server: Server) -> Iterator[Child]:
    """The program, with two connections to the server."""
    with Child("load", [str(compiled(tmp_path))], timeout=20.0) as load:
        ask(load, f"connect {server.port} 2")
        yield load


@pytest.mark.native
def test_the_program_compiles_without_a_warning(tmp_path: Path) -> None:
    compiler = (os.environ.get("CC") or "cc").split()
    source = Path(processes.__file__).with_name("load.c")
    strict = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*compiler, *strict, str(source), "-o", str(tmp_path / "load")], check=True)


@pytest.mark.native
def test_each_connection_says_it_once_and_waits_for_the_answer(server: Server, load: Child) -> None:
    load.say("say 00ff10 4")
    for each in server.taken:
        assert each.recv(100) == b"\x00\xff\x10"
        each.sendall(b"four")
    assert load.answer() == {}
    assert ask(load, "say 00ff10 4") == {}  # by nobody
    for each in server.taken:
        each.setblocking(False)
        with pytest.raises(BlockingIOError):
            each.recv(1)


@pytest.mark.native
def test_what_comes_is_counted_time_by_time(server: Server, load: Child) -> None:
    load.say("drain 10 2")
    server.taken[0].sendall(bytes(7))
    began = time.monotonic()
    server.taken[1].sendall(bytes(8))
    first = load.answer()["ended"]
    assert first >= began - 1e-6  # it is written with microseconds
    # Five of the second ten are there.
    server.taken[0].sendall(bytes(5))
    assert load.answer()["ended"] >= first


@pytest.mark.native
def test_the_time_on_the_way_is_that_since_the_stamp(server: Server, load: Child) -> None:
    load.say(f"watch 6 {SIZE}")
    sent = time.monotonic_ns() - int(AGE * 1e9)
    whole = frame(0) + frame(sent) + frame(sent)
    server.taken[0].sendall(whole)
    for start in range(0, len(whole), 7):  # in pieces that end amid a stamp, too
        server.taken[1].sendall(whole[start : start + 7])
    found = load.answer()
    elapsed = time.monotonic_ns() - sent
    assert found["count"] == 4
    assert AGE * 1e9 <= found["p50_ns"] <= found["p99_ns"] <= found["p999_ns"] <= elapsed


@pytest.mark.native
def test_what_is_no_such_frame_ends_the_program(server: Server, load: Child) -> None:
    load.say(f"watch 1 {SIZE}")
    server.taken[0].sendall(bytes(SIZE))
    with pytest.raises(BenchError, match="load ended with code 1"):
        load.answer()
