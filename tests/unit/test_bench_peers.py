"""The peers of the benchmarks: each answers right, and who is missing or fails is named."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import peers_suite, report
from bench.__main__ import measure
from bench.child import BenchError
from bench.figures import LEAST_FOR_P999, Figure
from bench.latency_suite import time_to_answer
from bench.peers import install, loads, uvloop_protocol
from bench.peers.peer import PEERS, Peer, named, nats_server, versions
from bench.settings import Settings, Skip, choose_cpus
from bench.suite import BENCHMARKS, Benchmark
from bench.two_process.processes import module_command
from tests.servers import absent

pytestmark = pytest.mark.native

ONE_WORK = [work for work in peers_suite.WORKS if work.name == "requests-16"]
CPUS = (choose_cpus() * 2)[:2]
SETTINGS = Settings(1, smoke=True, cpus=CPUS)
BY_NAME = {peer.name: peer for peer in peers_suite.BY_TURNS}


def that(does: str) -> list[str]:
    return [name for name, peer in BY_NAME.items() if does in peer.does]


def here(name: str) -> Peer:
    """The peer, whose packages come with what the tests need."""
    peer = BY_NAME[name]
    if peer.broker and nats_server() is None:
        absent("nats-server", "nats-server")
    assert not peer.missing()
    return peer


# -------------------------------------------------------------------------------- missing, failing


def test_a_peer_that_is_missing_is_named_and_the_rest_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NATS_SERVER", str(tmp_path / "nowhere"))
    monkeypatch.setattr(peers_suite, "WORKS", ONE_WORK)
    monkeypatch.setattr(peers_suite, "BY_TURNS", named("uvloop", "nats"))
    peers = named("uvloop", "nats")
    benchmark = Benchmark("peers-messages", "", peers_suite.messages, peers=peers)
    found = measure([benchmark], SETTINGS)
    assert found.broken == found.skipped == {}
    assert [figure.name for figure in found.figures] == ["requests-16-vs-uvloop"]
    assert found.figures[0].ratios[0] > 0
    reason = "no nats-server was found, neither on PATH nor by NATS_SERVER"
    assert found.left_out == {"nats-py": reason}
    report.show(found, judge=False)
    shown = capsys.readouterr().out
    assert f"nats-py: left out, {reason}\n" in shown
    assert f"beside uvloop {metadata.version('uvloop')}" in shown
    saved = tmp_path / "run.json"
    report.save(found, saved)
    assert report.read(saved) == found


def test_without_any_peer_the_benchmark_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nobody = replace(named("uvloop")[0], package="no-such-package")
    monkeypatch.setattr(peers_suite, "BY_TURNS", [nobody])
    with pytest.raises(Skip, match="the package no-such-package is not installed"):
        peers_suite.messages(SETTINGS)


def test_a_peer_that_fails_is_let_go_of(capfd: pytest.CaptureFixture[str]) -> None:
    (uvloop,) = named("uvloop")
    failing = replace(uvloop, name="failing", title="One that ends", module="c_echo")
    with pytest.raises(BenchError, match=r"^One that ends, at its start: .* ended") as raised:
        peers_suite.compare(ONE_WORK, [failing, uvloop], SETTINGS)
    assert [figure.name for figure in raised.value.figures] == ["requests-16-vs-uvloop"]
    assert "usage: python -m bench.peers.c_echo" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("measure", "name", "figures"),
    [
        (peers_suite.publish, "pyzmq", ["publish-1", "publish-3"]),
        (peers_suite.idle_connections, "uvloop", ["idle-connection"]),
        (peers_suite.first_answers, "uvloop", ["first-answer"]),
    ],
)
def test_who_fails_takes_nobody_else_along(
    monkeypatch: pytest.MonkeyPatch,
    measure: Callable[[Settings], list[Figure]],
    name: str,
    figures: list[str],
) -> None:
    peer = here(name)
    failing = replace(peer, name="failing", title="One that ends", module="c_echo")
    monkeypatch.setattr(peers_suite, "BY_TURNS", [failing, peer])
    with pytest.raises(BenchError, match=r"^One that ends, .* ended") as raised:
        measure(SETTINGS)
    assert [figure.name for figure in raised.value.figures] == [
        f"{figure}-vs-{name}" for figure in figures
    ]
    assert all(figure.ratios for figure in raised.value.figures)


def test_every_peer_is_a_part_of_the_benchmarks() -> None:
    measured = {peer for benchmark in BENCHMARKS for peer in benchmark.peers}
    assert measured == set(PEERS)


def test_the_versions_are_those_of_what_is_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = tmp_path / "a-server"
    server.write_text("#!/bin/sh\necho nats-server: v2.9.10\n")
    server.chmod(0o755)
    monkeypatch.setenv("NATS_SERVER", str(server))
    absent = replace(named("uvloop")[0], package="no-such-package")
    assert versions([*named("uvloop"), absent]) == {
        "uvloop": metadata.version("uvloop"),
        "nats-server": "2.9.10",
    }


def test_what_is_installed_for_the_peers_is_what_they_need() -> None:
    wanted = {requirement.partition(">=")[0] for requirement in install.wanted("peers")}
    needed = {peer.package for peer in PEERS} - {"uvloop"}
    assert needed - {"ray"} <= wanted <= needed  # not on every Python


# --------------------------------------------------------------------------------------- real runs


@pytest.mark.parametrize("name", [*that("requests"), "pyzmq"])
def test_a_peer_answers_right(name: str) -> None:
    peer = here(name)
    works = [work for work in peers_suite.WORKS if work.do in peer.does]
    assert works
    with ExitStack() as stack:
        client = peers_suite.start_peer(stack, peer, CPUS)
        for work in works:
            measured = peers_suite.ask(work, client, CPUS, {**work.arguments, "seconds": 0.01})
            assert measured[work.of] > 0
        assert os.sched_getaffinity(client.pid) == {CPUS[1]}


@pytest.mark.parametrize("name", that("publish"))
def test_a_peer_publishes_to_all(name: str) -> None:
    attempts = peers_suite.Attempts()
    [figure] = peers_suite.publish_to(3, [here(name)], SETTINGS, CPUS, attempts)
    assert not attempts.failed
    assert figure.name == f"publish-3-vs-{name}"
    assert figure.values[0] > 0
    assert figure.anchor_values[0] > 0


@pytest.mark.parametrize("name", that("connections"))
def test_a_peer_opens_connections_that_stay(name: str) -> None:
    peer = here(name)
    with ExitStack() as stack:
        server = peers_suite.program(stack, peer, "server", CPUS[0])
        address = ["--address", server.ready["address"]]
        opener = peers_suite.program(stack, peer, "connections", CPUS[1], *address)
        for opened in (20, 40):
            assert opener.ask("open", count=20) == {"open": opened}
        assert server.ask("memory")["rss"] > 1 << 20


@pytest.mark.parametrize("name", that("first_answer"))
def test_a_program_gets_its_first_answer(name: str) -> None:
    peer = here(name)
    with ExitStack() as stack:
        server = peers_suite.program(stack, peer, "server", CPUS[0])
        address = server.ready["address"]
        command = module_command("bench.peers.first_answers", name, address)
        assert time_to_answer(command, CPUS[1]) > 0


@pytest.mark.parametrize("size", [1, 4, 30, 1000])
@pytest.mark.parametrize("piece", [1, 3, 4, 64, 1000])
def test_messages_are_cut_out_of_whatever_pieces_come(size: int, piece: int) -> None:
    sent = [os.urandom(size) for _ in range(20)]
    stream = b"".join(sent) + b"not a whole one"[: size - 1]
    cutting = uvloop_protocol.Messages(size)
    pieces = [stream[start : start + piece] for start in range(0, len(stream), piece)]
    assert [message for each in pieces for message in cutting.cut(each)] == sent


class Writes(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []

    def write(self, data: Any) -> None:
        self.written.append(data)


@pytest.mark.parametrize("piece", [1, 3, 4, 70, 1000])
def test_large_messages_are_counted_in_whatever_pieces_come(piece: int) -> None:
    size = 70
    sent = [os.urandom(size) for _ in range(5)]
    stream = size.to_bytes(uvloop_protocol.SIZE, "little") + b"".join(sent)
    sink, transport = uvloop_protocol.BlockSink(), Writes()
    sink.connection_made(transport)
    while stream:
        block = sink.get_buffer(-1)
        came = min(piece, len(block), len(stream))
        block[:came] = stream[:came]
        stream = stream[came:]
        sink.buffer_updated(came)
    sink.eof_received()
    assert transport.written == [b"!", loads.tally(len(sent), len(sent) * size, sent[-1])]


@pytest.mark.parametrize(
    ("came", "wrong"), [(b"ababab", 0), (b"abaab", -1), (b"abacab", 1), (b"abababab", 1)]
)
def test_a_subscriber_compares_each_and_counts_them(came: bytes, wrong: int) -> None:
    said: list[int] = []
    subscriber = uvloop_protocol.Subscriber(said.append)
    subscriber.expect(3, b"ab")
    subscriber.data_received(came)
    assert said == [wrong] * (wrong >= 0)


async def test_what_a_turn_of_the_loop_asks_is_written_together() -> None:
    asker, transport = uvloop_protocol.Asker(), Writes()
    asker.connection_made(transport)
    asked: list[Any] = []
    for turn in (loads.SENT[:3], loads.SENT[3:7]):
        asked += [asker.ask(data) for data in turn]
        await asyncio.sleep(0)
    asked.append(asker.ask_alone(loads.SENT[7]))
    assert transport.written == [b"000000010002", b"0003000400050006", b"0007"]
    for piece in (b"00000001000", b"20003", b"0004000500060007"):
        asker.data_received(piece)
    assert [future.result() for future in asked] == loads.SENT[:8]


def test_what_such_a_program_imports_is_kept_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of the peers is, which were installed."""
    program = "import sys; print('wrong' if sys.dont_write_bytecode else 'right')"
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert time_to_answer([sys.executable, "-c", program], CPUS[1]) > 0


# ----------------------------------------------------------------------------- what is not let pass


def of_every_kind(ask: loads.Ask) -> Sequence[Any]:
    return [loads.round_trips(ask, 0.01), loads.requests(ask, 4, 0.01)]


async def test_who_is_slow_has_longer_for_as_many_as_a_p999_wants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0

    async def answer_after(nanoseconds: int, data: bytes) -> bytes:
        nonlocal now
        now += nanoseconds
        return data

    monkeypatch.setattr(loads, "time", SimpleNamespace(perf_counter_ns=lambda: now))
    # Half as many as are wanted are answered in time, and five times as many would be in the
    # longest.
    measured = await loads.round_trips(partial(answer_after, 20_000), 0.01)
    assert measured["count"] == LEAST_FOR_P999
    measured = await loads.round_trips(partial(answer_after, 1_000_000), 0.01)
    assert measured["count"] == 10 * loads.PROLONGED


async def test_a_wrong_answer_breaks_the_measurement() -> None:
    async def wrong(data: bytes) -> bytes:
        return b"pong"

    for measuring in of_every_kind(wrong):
        with pytest.raises(RuntimeError, match="answers were wrong"):
            await measuring


async def test_so_do_answers_that_are_mixed_up() -> None:
    async def always_alike(data: bytes) -> bytes:
        return b"ping"

    for measuring in of_every_kind(always_alike):
        with pytest.raises(RuntimeError, match="mixed up"):
            await measuring
    with pytest.raises(RuntimeError, match="mixed up"):
        await loads.calls(always_alike, lambda: always_alike(b""), 8, 0.01)


async def test_so_does_a_wrong_answer_to_the_last_call() -> None:
    async def wrong(data: bytes = b"") -> bytes:
        await asyncio.sleep(0)
        return b"pong"

    with pytest.raises(RuntimeError, match="the last answer was b'pong'"):
        await loads.calls(wrong, wrong, 8, 0.01)


async def test_so_does_a_message_that_is_lost() -> None:
    sent: list[bytes] = []

    async def send(data: bytes) -> None:
        sent.append(data)

    async def counted() -> bytes:
        tally = loads.Tally()
        for data in sent[1:]:
            tally.add(data)
        return tally.told()

    with pytest.raises(RuntimeError, match="the receiver counted"):
        await loads.notifies(lambda: loads.Stream(send, counted), 16, 0.01)
