"""Balancing: what a policy makes of one slow node among four, and what limits cost a message."""

from __future__ import annotations

from bench.figures import Figure, Target
from bench.settings import Settings, in_turn
from bench.two_process.processes import Worker

__all__ = ["limits", "slow_node"]

LIMITS_COST = 20e-9


def slow_node(settings: Settings) -> list[Figure]:
    """The p99 of awaited requests by ``peak_ewma``, beside that by ``round_robin``."""
    figure = Figure(
        "balance-slow-node",
        "p99 of awaited requests, one of four nodes takes 20 ms: peak_ewma",
        "s",
        anchor="round_robin",
        target=Target("ratio", 1 / 3, at_most=True),
    )
    count = settings.few(4_000)

    def measure(policy: str) -> float:
        with Worker("bench.one_process.balancing", "--cpu", settings.cpus[0]) as nodes:
            measured = nodes.ask("latencies", policy=policy, count=count, concurrency=8)
        return float(measured["p99_ns"]) * 1e-9

    for number in range(settings.rounds):
        in_turn(
            number,
            lambda: figure.anchor_values.append(measure("round_robin")),
            lambda: figure.values.append(measure("peak_ewma")),
        )
    figure.samples = count
    return [figure]


def limits(settings: Settings) -> list[Figure]:
    """What a node's and a peer's limit add to a ``notify`` that they let pass.

    A circuit breaker adds nothing: a peer whose circuit is open stands in no route.
    """
    cost = Figure(
        "limits-cost",
        "what limits of bytes a second add to a notify",
        "s",
        target=Target("value", LIMITS_COST, at_most=True),
    )
    count = settings.few(1_000_000)
    cost.detail = {"count": count, "ns_limited": [], "ns_without": []}
    for _ in range(settings.rounds):
        with Worker("bench.one_process.balancing", "--cpu", settings.cpus[0]) as nodes:
            taken: dict[bool, list[float]] = {False: [], True: []}
            for limited in (False, True, True, False):
                taken[limited].append(nodes.ask("sending", limited=limited, count=count)["ns"])
        cost.values.append((min(taken[True]) - min(taken[False])) * 1e-9)
        cost.detail["ns_limited"] += taken[True]
        cost.detail["ns_without"] += taken[False]
    return [cost]
