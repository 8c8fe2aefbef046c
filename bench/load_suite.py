"""Load: what a request takes beside half of the load that could be, and beside large messages."""

from __future__ import annotations

import statistics
from functools import partial

from bench.figures import Figure
from bench.settings import Settings, in_turn
from bench.two_process.channels import BULK
from bench.two_process.processes import cluster, start, start_pair

IN_FLIGHT = 256
HALF = 0.5

MIB = 1024 * 1024
LANES = (2, 4)  # beside one

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
    """Awaited requests beside large messages of the same node to the same peer, on another lane;
    and large messages alone, on several lanes at once.
    """
    beside = Figure(
        "lanes",
        f"p99 of awaited requests beside messages of 1 MiB, sessions_per_peer={LANES[0]}",
        "s",
        by="p99",
        anchor="with one session",
        anchor_is_ours=True,
    )
    add_trips = {1: beside.add_anchor_percentiles, LANES[0]: beside.add_percentiles}
    flooded: dict[int, list[float]] = {number: [] for number in add_trips}
    sent: dict[int, list[float]] = {number: [] for number in (1, *LANES)}
    cpus = settings.pair()
    seconds = 0.1 if settings.smoke else 1.0

    def measure(number: int) -> None:
        with cluster() as (stack, folder):
            client = start_pair(stack, folder, cpus, "--lanes", number)
            moved = client.ask("transfer", size=MIB, count=settings.few(200))
            sent[number].append(moved["bytes_per_s"])
            if number in add_trips:
                client.ask("flood", size=MIB)
                trips = client.ask("round_trips", warm_up=settings.few(100), seconds=seconds)
                add_trips[number](trips)
                flooded[number].append(client.ask("stop_flood")["rate"] * MIB)

    for number in range(settings.rounds):
        in_turn(number, *[partial(measure, each) for each in sent])
    beside.detail = {
        "bytes_per_s": statistics.median(flooded[LANES[0]]),
        "anchor_bytes_per_s": statistics.median(flooded[1]),
    }
    transfers = [
        Figure(
            f"lanes-transfer-{number}",
            f"notify of 1 MiB, one way, on {len(BULK)} channels, sessions_per_peer={number}",
            "B/s",
            sent[number],
            anchor="with one session",
            anchor_values=sent[1],
            anchor_is_ours=True,
        )
        for number in LANES
    ]
    return [beside, *transfers]
