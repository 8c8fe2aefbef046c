"""Balancing: what a policy makes of one slow node among four, and what guards cost a message."""

from __future__ import annotations

from typing import Any

from bench.figures import Figure
from bench.settings import Settings, in_turn
from bench.two_process.processes import Worker

__all__ = ["guards", "slow_node"]


def slow_node(settings: Settings) -> list[Figure]:
    """The p99 of awaited requests by ``peak_ewma``, beside that by ``round_robin``."""
    figure = Figure(
        "balance-slow-node",
        "p99 of awaited requests, one of four nodes takes 20 ms: peak_ewma",
        "s",
        by="p99",
        anchor="round_robin",
        anchor_is_ours=True,
    )
    count = settings.few(4_000)

    def measure(policy: str) -> dict[str, Any]:
        with Worker("bench.one_process.balancing", "--cpu", settings.cpus[0]) as nodes:
            return nodes.ask("latencies", policy=policy, count=count, concurrency=8)

    for number in range(settings.rounds):
        in_turn(
            number,
            lambda: figure.add_anchor_percentiles(measure("round_robin")),
            lambda: figure.add_percentiles(measure("peak_ewma")),
        )
    return [figure]


def guards(settings: Settings) -> list[Figure]:
    """What a circuit breaker, and a node's and a peer's limit, add to a ``notify``.

    Nothing is wrong: the circuit is closed, and the limits let everything pass.
    """
    count = settings.few(1_000_000)
    figures = {
        guard: Figure(
            f"{guard}-cost",
            f"what {what} to a notify",
            "s",
            detail={"count": count, "ns_with": [], "ns_without": []},
        )
        for guard, what in (
            ("breaker", "a circuit breaker adds"),
            ("limits", "limits of bytes a second add"),
        )
    }

    def measure(nodes: Worker, guard: str) -> None:
        taken: dict[bool, list[float]] = {False: [], True: []}
        for guarded in (False, True, True, False):
            taken[guarded].append(
                nodes.ask("sending", guard=guard, guarded=guarded, count=count)["ns"]
            )
        figure = figures[guard]
        figure.values.append((min(taken[True]) - min(taken[False])) * 1e-9)
        figure.detail["ns_with"] += taken[True]
        figure.detail["ns_without"] += taken[False]

    for number in range(settings.rounds):
        with Worker("bench.one_process.balancing", "--cpu", settings.cpus[0]) as nodes:
            in_turn(number, lambda: measure(nodes, "breaker"), lambda: measure(nodes, "limits"))
    return list(figures.values())
