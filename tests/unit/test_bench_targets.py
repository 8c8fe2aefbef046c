"""The targets of the benchmarks: what they were set to, and that each judges a figure."""

from __future__ import annotations

from collections import Counter

import pytest

from bench import peers_suite
from bench.__main__ import measure
from bench.figures import Figure, Target
from bench.peers.peer import PEERS
from bench.settings import Settings, choose_cpus
from bench.suite import BENCHMARKS, Benchmark
from bench.targets import TARGETS

SMOKE = Settings(1, smoke=True, cpus=(choose_cpus() * 2)[:2])
# As they were agreed on: "<=" or ">=", of what, and the bound. None is changed to suit a run.
AGREED = {
    "round-trip-one-core": ("<=", "ratio", 1.3),
    "busy-round-trip": ("<=", "ratio", 1.3),
    "round-trip-unix": ("<=", "ratio", 1.5),
    "busy-unix": ("<=", "ratio", 1.5),
    "call-reply": (">=", "value", 6_000_000),
    "call-reply-lists": (">=", "value", 9_000_000),
    "call-reply-vs-pyzmq": (">=", "ratio", 10),
    "requests-256": (">=", "value", 900_000),
    "requests-256-vs-nats": (">=", "ratio", 12),
    "requests-256-vs-grpc": (">=", "ratio", 100),
    "notify-16B-vs-pyzmq": (">=", "ratio", 6),
    "notify-1MiB": (">=", "ratio", 0.95),
    "fan-out": (">=", "ratio", 0.8),
    "half-load": ("<=", "tail", 3),
    "half-load-arrivals": ("<=", "tail", 3),
    "idle-session": ("<=", "value", 4096),
    "wheel-schedule-cancel": (">=", "ratio", 8),
    "growth-nodes-trip-20": ("<=", "ratio", 1.2),
    "growth-nodes-trip-200": ("<=", "ratio", 1.2),
    "growth-nodes-call-20": ("<=", "ratio", 1.2),
    "growth-nodes-call-200": ("<=", "ratio", 1.2),
    "growth-peers-trip-1023": ("<=", "ratio", 1.2),
    "growth-peers-call-1023": ("<=", "ratio", 1.2),
    "growth-subscriptions-bytes-60000": ("<=", "ratio", 1.2),
    "busy-soon-phase": ("<=", "value", 0.001),
    "busy-timer-phase": ("<=", "value", 0.001),
    "flood": ("<=", "ratio", 3),
    "crowd-nodes": ("<=", "ratio", 2),
    "crowd-guests": ("<=", "ratio", 2),
    **{
        f"stopped-{policy}-{load}": ("<=", "ratio", 2)
        for policy in ("raise", "drop-oldest", "drop-newest", "disconnect")
        for load in ("full", "half")
    },
    "gateway-broadcast": (">=", "ratio", 0.9),
    "gateway-client-memory": ("<=", "value", 16384),
    "gateway-slow-client": ("<=", "ratio", 2),
    "serial-call-reply": (">=", "value", 4_000_000),
    "serial-lists": (">=", "value", 7_000_000),
    "serial-thread-waiting": ("<=", "ratio", 1.2),
    "dispatch": (">=", "ratio", 0.7),
    "balance-slow-node": ("<=", "ratio", 1 / 3),
    "breaker-cost": ("<=", "value", 20e-9),
    "limits-cost": ("<=", "value", 20e-9),
}


def test_the_targets_are_those_that_were_agreed_on() -> None:
    wanted = {
        name: Target(of, bound, at_most=way == "<=") for name, (way, of, bound) in AGREED.items()
    }
    assert wanted == TARGETS


def test_a_figure_gets_the_target_of_its_name() -> None:
    def run(settings: Settings) -> list[Figure]:
        return [
            Figure("call-reply", "", "/s", values=[1.0]),
            Figure("flood", "", "s", void="why"),
            Figure("no-such", "", "s"),
        ]

    figures = measure([Benchmark("one", "", run)], SMOKE).figures
    assert [figure.target for figure in figures] == [TARGETS["call-reply"], TARGETS["flood"], None]
    assert [figure.is_met for figure in figures] == [False, None, None]


@pytest.mark.native
@pytest.mark.timeout(300)
def test_every_target_is_of_one_figure() -> None:
    found = measure([each for each in BENCHMARKS if not each.peers], SMOKE)
    assert found.broken == {}
    names = [figure.name for figure in found.figures]
    names += [
        work.figure(peer).name
        for work in peers_suite.WORKS
        for peer in PEERS
        if work.do in peer.does
    ]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    # Nothing lacks but what this machine cannot run.
    assert not TARGETS.keys() - set(names) or found.skipped
