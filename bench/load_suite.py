"""Load: what a request takes beside half of the load that could be, and beside large messages."""

from __future__ import annotations

import statistics
from functools import partial

from bench.figures import Figure, write
from bench.processor import kept_waiting
from bench.settings import Settings, in_turn
from bench.two_process.channels import BULK
from bench.two_process.load import PARTS
from bench.two_process.processes import cluster, start, start_pair

IN_FLIGHT = 256
HALF = 0.5
QUEUED = 2.0  # times as long as a round trip beside it, at most, takes a request that is due
WARM_UP = 0.1  # of the time that is measured

MIB = 1024 * 1024
LANES = (2, 4)  # beside one

__all__ = ["half_load", "lanes"]


def half_load(settings: Settings) -> list[Figure]:
    """Awaited round trips beside requests that come at random, at half of the peak; and these."""
    probe = Figure(
        "half-load",
        "p99 of an awaited round trip at 50 % load",
        "s",
        by="p99",
    )
    load = Figure(
        "half-load-arrivals",
        "p99 of the requests that come at random at 50 % load, from when each was due",
        "s",
        by="p99",
    )
    cpus = settings.pair()
    count, seconds = settings.few(400_000), 0.1 if settings.smoke else 1.0
    found: dict[str, list[float]] = {}
    for number in range(settings.rounds):
        with cluster() as (stack, folder):
            server = start(stack, "server", folder, cpus[0])
            client = start(stack, "load", folder, cpus[1])
            peak = client.ask("requests", in_flight=IN_FLIGHT, count=count)["rate"]
            client.ask("arriving", rate=peak * HALF, seconds=seconds * WARM_UP, seed=-1)
            cpu, waited = server.ask("counters")["cpu_s"], kept_waiting(server.pid, client.pid)
            measured = client.ask("arriving", rate=peak * HALF, seconds=seconds, seed=number)
            cpu = server.ask("counters")["cpu_s"] - cpu
            waited = kept_waiting(server.pid, client.pid) - waited
        probe.add_percentiles(measured["probe"])
        load.add_percentiles(measured)
        for of, value in (
            ("peak_per_s", peak),
            ("per_s", measured["rate"]),
            ("arrivals_a_turn", measured["arrivals_a_turn"]),
            ("share_of_the_servers_core", cpu / measured["seconds"]),
            ("share_of_the_clients_core", 1.0 - measured["share_idle"]),
            ("seconds_kept_waiting", waited),
            ("p99_of_parts", measured["p99_of_parts_ns"] * 1e-9),
        ):
            found.setdefault(of, []).append(value)
    medians = {of: statistics.median(values) for of, values in found.items()}
    void = why_void(medians, probe, load)
    for figure in (probe, load):
        figure.detail = dict(medians)
        figure.void = void
    load.remark = (
        f"{write(medians['per_s'], '/s')} of a peak of {write(medians['peak_per_s'], '/s')}, "
        f"{medians['arrivals_a_turn']:.0f} in a turn of the loop; "
        f"the server's core {medians['share_of_the_servers_core']:.0%} busy, "
        f"the client's {medians['share_of_the_clients_core']:.0%}; "
        f"both together waited {write(medians['seconds_kept_waiting'], 's')} for a processor; "
        f"the p99 of the middle one of {PARTS} parts of the round was "
        f"{write(medians['p99_of_parts'], 's')}"
    )
    return [probe, load]


def why_void(medians: dict[str, float], probe: Figure, load: Figure) -> str:
    """What is no load of a half, if so: of a queue that never ends the p99 is near the p50."""
    if medians["per_s"] < 0.9 * HALF * medians["peak_per_s"]:
        return "the requests did not come at the rate that they should have"
    if statistics.median(load.values) > QUEUED * statistics.median(probe.values):
        return "the requests that came at random stood in a queue all the time"
    return ""


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
