"""Serial mode: what it costs a message, and what a handler that is slow costs everybody else."""

from __future__ import annotations

import statistics

from bench.figures import Figure
from bench.settings import Settings, in_turn
from bench.two_process.processes import cluster, start, start_pair

WINDOW = 4096
IDLE, WAITING, COMPUTING = "", "wait", "compute"

__all__ = ["call_reply", "thread"]


def call_reply(settings: Settings) -> list[Figure]:
    """Handlers and verbs of a Serial at each end, beside those of the nodes themselves."""
    cpus = settings.pair()
    figures = {
        "calls": Figure(
            "serial-call-reply",
            "call + reply in serial mode, 4,096 under way",
            "/s",
            anchor="at the node",
            anchor_is_ours=True,
        ),
        "list_calls": Figure(
            "serial-lists",
            "call_many + reply_many in serial mode, handlers of lists",
            "/s",
            anchor="at the node",
            anchor_is_ours=True,
        ),
    }
    count = settings.few(3_000_000)
    cpu: dict[str, list[float]] = {do: [] for do in figures}
    anchor_cpu: dict[str, list[float]] = {do: [] for do in figures}

    def ours() -> None:
        with cluster() as (stack, folder):
            client = start_pair(stack, folder, cpus, "--serial")
            for do, figure in figures.items():
                measured = client.ask(do, count=count, window=WINDOW)
                figure.values.append(measured["rate"])
                cpu[do].append(measured["cpu_ns"])

    def anchor() -> None:
        with cluster() as (stack, folder):
            client = start_pair(stack, folder, cpus)
            for do, figure in figures.items():
                measured = client.ask(do, count=count, window=WINDOW)
                figure.anchor_values.append(measured["rate"])
                anchor_cpu[do].append(measured["cpu_ns"])

    for number in range(settings.rounds):
        in_turn(number, anchor, ours)
    for do, figure in figures.items():
        figure.detail = {
            "count": count,
            "client_cpu_ns": statistics.median(cpu[do]),
            "client_cpu_ns_at_the_node": statistics.median(anchor_cpu[do]),
        }
    return list(figures.values())


def thread(settings: Settings) -> list[Figure]:
    """Awaited requests to a node whose serial thread waits or computes, 50 ms at a time."""
    figures = {
        WAITING: Figure(
            "serial-thread-waiting",
            "p99 of awaited requests beside a serial thread that waits",
            "s",
            by="p99",
            anchor="that is idle",
            anchor_is_ours=True,
        ),
        COMPUTING: Figure(
            "serial-thread-computing",
            "p99 of awaited requests beside a serial thread that computes",
            "s",
            by="p99",
            anchor="that is idle",
            anchor_is_ours=True,
        ),
    }
    cpus = settings.pair()
    # Short phases by turns, whose samples are put together: a p99 moves with the machine's mood.
    phases, seconds = (2, 0.05) if settings.smoke else (6, 0.4)
    for _ in range(settings.fewer_rounds):
        with cluster() as (stack, folder):
            start(stack, "serial_thread", folder, cpus[0])
            client = start(stack, "client", folder, cpus[1])
            measured = client.ask(
                "round_trips_beside", kinds=[IDLE, *figures], phases=phases, seconds=seconds
            )
        for kind, figure in figures.items():
            figure.add_percentiles(measured[kind])
            figure.add_anchor_percentiles(measured[IDLE])
    return list(figures.values())
