"""What the benchmarks measure, and beside whom: the lists that were agreed on."""

from __future__ import annotations

import re

import pytest

from bench import peers_suite, suite
from bench.child import ROOT
from bench.peers.peer import PEERS, named

# By its name: the command that does it, and how much of it.
WORKS = {
    "round-trip-one-core": ("round_trips", {}),
    "round-trip-two-cores": ("round_trips", {}),
    "requests-1": ("requests", {"in_flight": 1}),
    "requests-16": ("requests", {"in_flight": 16}),
    "requests-256": ("requests", {"in_flight": 256}),
    "call-reply": ("calls", {"window": 4096}),
    "notify-16B": ("notifies", {"size": 16}),
    "notify-1KiB": ("notifies", {"size": 1024}),
    "notify-64KiB": ("notifies", {"size": 65_536}),
    "notify-1MiB": ("notifies", {"size": 1_048_576}),
}
MORE = {
    "publish-1": "publish",
    "publish-10": "publish",
    "publish-100": "publish",
    "publish-1000": "publish",
    "idle-connection": "connections",
    "first-answer": "first_answer",
}
BESIDE = {
    "uvloop": "uvloop Protocol",
    "pyzmq": "pyzmq",
    "pyzmq-asyncio": "zmq.asyncio",
    "nats": "nats-py",
    "grpc": "grpc.aio",
    "aiohttp": "aiohttp",
    "ray": "Ray",
}
SINGLE = {
    "codec": {"test_encode_frame", "test_feed"},
    "ring": {"test_ring_put_get", "test_ring_drain"},
    "wheel": {"test_wheel_schedule_cancel", "test_serial_schedule_cancel"},
    "dispatch": {"test_dispatch_frames", "test_local_notify", "test_local_request"},
    "balancing": {
        "test_round_robin",
        "test_weighted_round_robin",
        "test_least_connections",
        "test_peak_ewma",
    },
    "breaker": {"test_breaker"},
}


def test_every_work_that_was_agreed_on_is_measured_beside_others() -> None:
    assert {work.name: (work.do, work.arguments) for work in peers_suite.WORKS} == WORKS
    assert [work.name for work in peers_suite.WORKS if work.is_one_core] == ["round-trip-one-core"]
    assert peers_suite.SUBSCRIBERS == (1, 10, 100, 1000)
    assert {name: do for name, (do, _) in WORKS.items()} | MORE == peers_suite.DONE_BY
    run = {benchmark.run for benchmark in suite.BENCHMARKS if benchmark.peers}
    assert run == {
        peers_suite.messages,
        peers_suite.publish,
        peers_suite.idle_connections,
        peers_suite.first_answers,
        peers_suite.ray,
    }


def test_the_works_are_measured_without_others_too() -> None:
    names = {benchmark.name for benchmark in suite.BENCHMARKS if not benchmark.peers}
    assert names >= {
        *("round-trip-one-core", "round-trip-two-cores", "round-trip-asyncio", "busy"),
        *("round-trip-unix", "busy-unix", "requests-256", "half-load", "call-reply"),
        *("call-reply-lists", "notify", "publish", "fan-out", "idle-session", "first-answer"),
        *("growth-nodes", "growth-peers", "growth-subscriptions"),
    }


def test_everybody_who_was_agreed_on_is_measured() -> None:
    assert {peer.name: peer.title for peer in PEERS} == BESIDE
    assert peers_suite.BY_TURNS + peers_suite.ALONE == PEERS
    assert [peer.name for peer in peers_suite.ALONE] == ["ray"]


def test_a_peer_that_nobody_knows_is_an_error() -> None:
    assert [peer.name for peer in named("nats", "uvloop")] == ["nats", "uvloop"]
    with pytest.raises(KeyError, match="zeromq"):
        named("uvloop", "zeromq")


def test_there_are_three_levels() -> None:
    """Single operations by pytest-benchmark, within a process, and between processes."""
    levels = {level: set[str]() for level in (suite.SINGLE, suite.ONE, suite.SEVERAL)}
    for benchmark in suite.BENCHMARKS:
        levels[benchmark.level].add(benchmark.name)
    assert levels[suite.SINGLE] == {"micro"}
    assert levels[suite.ONE] >= {"dispatch", "one-process"}
    assert levels[suite.SEVERAL] >= {"round-trip-two-cores", "call-reply", "peers-messages"}


def test_each_part_of_the_core_has_its_single_operations() -> None:
    assert set(suite.MICRO) == set().union(*SINGLE.values())
    files = (ROOT / "bench" / "micro").glob("test_*.py")
    there = [re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE) for file in files]
    assert sorted(name for names in there for name in names) == sorted(suite.MICRO)
