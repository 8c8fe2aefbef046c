"""asyncio's own selector loop at both ends, beside uvloop at both: round trips, and rates."""

from __future__ import annotations

from functools import partial
from typing import Any

from bench.child import BenchError
from bench.figures import Figure
from bench.latency_suite import BUSY_POLL
from bench.processor import stay
from bench.settings import Settings, in_turn
from bench.two_process.processes import cluster, start_pair

__all__ = ["own_loop"]

TITLES = {
    "round-trip-asyncio-1-core": "Awaited request on asyncio's own loop, 2 processes, 1 core",
    "round-trip-asyncio-2-cores": "Awaited request on asyncio's own loop, 2 processes, 2 cores",
    "call-reply-asyncio": "call + reply on asyncio's own loop, 4,096 under way",
    "requests-256-asyncio": "Awaited requests on asyncio's own loop, 256 in flight",
    "round-trip-asyncio-unix": "Awaited request on asyncio's own loop, UNIX socket, 1 core",
    "busy-asyncio": "Awaited request on asyncio's own loop, both ends polling, 2 cores",
}
RATES = ("call-reply-asyncio", "requests-256-asyncio")
UNIX, POLLING = "round-trip-asyncio-unix", "busy-asyncio"


def own_loop(settings: Settings) -> list[Figure]:
    figures = {
        name: Figure(
            name,
            title,
            "/s" if name in RATES else "s",
            anchor="on uvloop",
            anchor_is_ours=True,
        )
        for name, title in TITLES.items()
    }

    def measure(loop: str, number: int) -> None:
        found = over_tcp(settings, loop)
        # These differ from those over TCP by what the loop has no part in.
        if number < settings.fewer_rounds:
            found |= {UNIX: over_unix(settings, loop), POLLING: polling(settings, loop)}
        for name, measured in found.items():
            add(figures[name], loop, measured)

    for number in range(settings.rounds):
        in_turn(number, *[partial(measure, loop, number) for loop in ("uvloop", "asyncio")])
    return list(figures.values())


def add(figure: Figure, loop: str, measured: dict[str, Any]) -> None:
    """A round on one of the two loops."""
    is_anchor = loop == "uvloop"
    if figure.unit == "/s":
        (figure.anchor_values if is_anchor else figure.values).append(measured["rate"])
    elif is_anchor:
        figure.add_anchor_percentiles(measured)
    else:
        figure.add_percentiles(measured)


def over_tcp(settings: Settings, loop: str) -> dict[str, dict[str, Any]]:
    """All that one pair of processes is asked; it begins on one core."""
    first, second = settings.pair()
    with cluster() as (stack, folder):
        client = start_pair(stack, folder, (first, first), "--loop", loop)
        check_loop(client.ready, loop)
        one = client.ask("round_trips", **counts(settings, 10_000))
        stay(client.pid, second)
        return {
            "round-trip-asyncio-1-core": one,
            # A core that has to be woken makes a round trip several times as long.
            "round-trip-asyncio-2-cores": client.ask("round_trips", **counts(settings, 3_000)),
            "call-reply-asyncio": client.ask("calls", count=settings.few(600_000), window=4096),
            "requests-256-asyncio": client.ask(
                "requests", count=settings.few(200_000), in_flight=256
            ),
        }


def over_unix(settings: Settings, loop: str) -> dict[str, Any]:
    first = settings.cpus[0]
    with cluster() as (stack, folder):
        client = start_pair(stack, folder, (first, first), "--loop", loop, unix=True)
        check_loop(client.ready, loop)
        measured = client.ask("round_trips", **counts(settings, 10_000))
    if not measured["address"].startswith("unix:"):
        raise BenchError(f"the session went over {measured['address']}")
    return measured


def polling(settings: Settings, loop: str) -> dict[str, Any]:
    more = "--loop", loop, "--busy-poll", BUSY_POLL
    with cluster() as (stack, folder):
        client = start_pair(stack, folder, settings.pair(), *more)
        check_loop(client.ready, loop)
        return client.ask("round_trips", **counts(settings, 10_000))


def counts(settings: Settings, count: int) -> dict[str, int]:
    few = settings.few(count)
    return {"warm_up": max(1, few // 4), "count": few}


def check_loop(ready: dict[str, Any], loop: str) -> None:
    if ready["loop"] != loop:
        raise BenchError(f"the client ran on {ready['loop']}, not on {loop}")
