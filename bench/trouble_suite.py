"""Trouble: what strangers who crowd a node, or a subscriber that is stopped, cost the others."""

from __future__ import annotations

import json
import os
import resource
import signal
import statistics
from functools import partial

from bench.child import BenchError
from bench.figures import Figure
from bench.processor import below_everybody
from bench.settings import Settings, Skip, in_turn
from bench.two_process.processes import Worker, cluster, start

STRANGERS = 10_000
POLICIES = ("raise", "drop_oldest", "drop_newest", "disconnect")

__all__ = ["crowd", "stopped"]


def crowd(settings: Settings) -> list[Figure]:
    """Joining a node from 127.0.0.1, beside strangers from 127.0.0.2 who say no more than hello.

    Who is closed comes again at once. They share the joiner's processor, below everybody else.
    ``alone_p99`` is without the time that what else runs here has kept node and joiner waiting.
    """
    figures = {
        who: Figure(
            f"crowd-{who}",
            f"p99 of joining: a {who[:-1]}, beside 10,000 half-open handshakes",
            "s",
            by="p99",
            anchor="without them",
            anchor_is_ours=True,
        )
        for who in ("nodes", "guests")
    }
    cpus = settings.pair()
    strangers = settings.few(STRANGERS)
    counts = {"nodes": 2 if settings.smoke else 300, "guests": 2 if settings.smoke else 2000}
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < strangers + 1000:
        raise Skip(f"a process may not open {strangers + 1000} files")
    held, refused, busy = [], [], []
    with cluster() as (stack, folder):
        node = start(stack, "crowded", folder, cpus[0])
        port = node.ready["port"]
        to_there = ["--url", f"tcp://127.0.0.1:{port}", "--pid", node.pid]
        joiner = start(stack, "crowded", folder, cpus[1], *to_there)

        def join(beside: bool) -> None:
            for who, figure in figures.items():
                joiner.ask(who, count=max(1, counts[who] // 10))
                measured = joiner.ask(who, count=counts[who])
                add = figure.add_percentiles if beside else figure.add_anchor_percentiles
                add(measured)
                alone = figure.detail.setdefault(f"{'' if beside else 'anchor_'}alone_p99", [])
                alone.append(measured["alone_p99_ns"] * 1e-9)

        def besieged() -> None:
            given = {"port": port, "source": "127.0.0.2", "count": strangers}
            with Worker("tests.faults.crowd", json.dumps(given)) as crowd:
                os.sched_setaffinity(crowd.pid, {cpus[1]})
                below_everybody(crowd.pid)
                before = node.ask("counters")
                join(beside=True)
                after = node.ask("counters")
            held.append(after["held"])
            refused.append(after["refused_handshakes"] - before["refused_handshakes"])
            busy.append(after["cpu_s"] - before["cpu_s"])
            if settings.few(STRANGERS) == STRANGERS and not refused[-1]:
                raise BenchError("the strangers were not so many that one was refused")

        for number in range(settings.fewer_rounds):
            in_turn(number, lambda: join(beside=False), besieged)
    for figure in figures.values():
        figure.detail |= {
            "connections_held": statistics.median(held),
            "handshakes_refused": statistics.median(refused),
            "cpu_s_of_the_node": statistics.median(busy),
        }
    return list(figures.values())


def stopped(settings: Settings) -> list[Figure]:
    """Publishing to three, of which one is stopped, and not.

    As fast as the two others take it: what they wait is mostly the length of full buffers, and who
    is stopped leaves them its share of the processor. Then half as fast, where nothing hides what
    one publish holds up the next for; counted from when it was due.
    """
    return [figure for policy in POLICIES for figure in stopped_with(policy, settings)]


def stopped_with(policy: str, settings: Settings) -> list[Figure]:
    full, half = (
        Figure(
            f"stopped-{policy.replace('_', '-')}-{load}",
            f"p99 of a publish to arrive, {load} load, another subscriber is stopped: {policy}",
            "s",
            by="p99",
            anchor="while it is not",
            anchor_is_ours=True,
            detail={"per_s": [], "anchor_per_s": [], "missed": []},
        )
        for load in ("full", "half")
    )
    cpus = settings.pair()
    # As long as it takes to fill a queue.
    warm_up, seconds = (0.1, 0.1) if settings.smoke else (0.7, 1.0)
    with cluster() as (stack, folder):
        names = ("one", "other", "third")
        *live, third = (start(stack, "stopped", folder, cpus[1], "--name", name) for name in names)
        publisher = start(stack, "stopped", folder, cpus[0], "--when-full", policy)
        ids = [each.ready["id"] for each in live]

        def measure(figure: Figure, beside: bool) -> None:
            rate = 0.0 if figure is full else min(full.detail["anchor_per_s"]) / 2
            # Half as fast it takes twice as long to fill a queue, and to have as many to count.
            times = 1 if figure is full else 2
            fed = publisher.ask(
                "feed", live=ids, rate=rate, warm_up=times * warm_up, seconds=times * seconds
            )
            found = [each.ask("latencies", count=fed["counted"]) for each in live]
            # The worse of the two, of each.
            worst = {of: max(each[of] for each in found) for of in found[0]}
            add = figure.add_percentiles if beside else figure.add_anchor_percentiles
            add(worst)
            figure.detail[f"{'' if beside else 'anchor_'}per_s"].append(fed["rate"])
            if beside:
                figure.detail["missed"].append(fed["missed"])

        def phase(figure: Figure, beside: bool) -> None:
            if beside:
                os.kill(third.pid, signal.SIGSTOP)
            try:
                measure(figure, beside)
            finally:
                os.kill(third.pid, signal.SIGCONT)
            publisher.ask("recovered")
            third.ask("forget")

        for number in range(settings.fewer_rounds):
            for figure in (full, half):
                # Half of the load is known once all of it was measured: the anchor's goes first.
                in_turn(
                    number,
                    partial(phase, figure, beside=False),
                    partial(phase, figure, beside=True),
                )
    for figure in (full, half):
        if not settings.smoke and not min(figure.detail["missed"]):
            figure.void = "the queue for who was stopped was never full"
    return [full, half]
