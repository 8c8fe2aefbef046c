"""Load: what a request takes beside half of the load that could be, and beside large messages."""

from __future__ import annotations

import statistics
from typing import Any

from bench.figures import Figure
from bench.settings import Settings, in_turn
from bench.two_process.processes import cluster, start, start_pair

IN_FLIGHT = 256
HALF = 0.5

MIB = 1024 * 1024
LANES = 2

__all__ = ["half_load", "lanes"]


def half_load(settings: Settings) -> list[Figure]:
    """The p99 of awaited round trips beside their p50, and that of the load itself."""
    probe = Figure(
        "half-load",
        "p99 of an awaited round trip at 50 % load",
        "s",
        by="p99",
    )
    load = Figure(
        "half-load-arrivals",
        "p99 of the requests that come at random, from when each was due",
        "s",
        by="p99",
    )
    cpus = settings.pair()
    count, seconds = settings.few(200_000), 0.1 if settings.smoke else 1.0
    found: dict[str, list[float]] = {"peak_per_s": [], "per_s": [], "arrivals_a_turn": []}
    for number in range(settings.rounds):
        with cluster() as (stack, folder):
            start(stack, "server", folder, cpus[0])
            client = start(stack, "load", folder, cpus[1])
            peak = client.ask("peak", in_flight=IN_FLIGHT, count=count)["rate"]
            measured = client.ask("arriving", rate=peak * HALF, seconds=seconds, seed=number)
        probe.add_percentiles(measured["probe"])
        load.add_percentiles(measured)
        found["peak_per_s"].append(peak)
        found["per_s"].append(measured["rate"])
        found["arrivals_a_turn"].append(measured["arrivals_a_turn"])
    medians = {of: statistics.median(values) for of, values in found.items()}
    for figure in (probe, load):
        figure.detail = dict(medians)
        if medians["per_s"] < 0.9 * HALF * medians["peak_per_s"]:
            figure.void = "the requests did not come at the rate that they should have"
    return [probe, load]


def lanes(settings: Settings) -> list[Figure]:
    """Awaited requests beside large messages of the same node to the same peer, on another lane."""
    figure = Figure(
        "lanes",
        f"p99 of awaited requests beside messages of 1 MiB, sessions_per_peer={LANES}",
        "s",
        by="p99",
        anchor="with one session",
        anchor_is_ours=True,
    )
    cpus = settings.pair()
    seconds = 0.1 if settings.smoke else 1.0
    transferred: dict[int, list[float]] = {1: [], LANES: []}

    def measure(number: int) -> dict[str, Any]:
        with cluster() as (stack, folder):
            client = start_pair(stack, folder, cpus, "--lanes", number)
            client.ask("flood", size=MIB)
            measured = client.ask("round_trips", warm_up=settings.few(100), seconds=seconds)
            transferred[number].append(client.ask("stop_flood")["rate"] * MIB)
        return measured

    for number in range(settings.rounds):
        in_turn(
            number,
            lambda: figure.add_anchor_percentiles(measure(1)),
            lambda: figure.add_percentiles(measure(LANES)),
        )
    figure.detail = {
        "bytes_per_s": statistics.median(transferred[LANES]),
        "anchor_bytes_per_s": statistics.median(transferred[1]),
    }
    return [figure]
