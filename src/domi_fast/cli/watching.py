"""``domi top``: the traffic of all nodes, again and again."""

from __future__ import annotations

import asyncio
import time
from typing import Any, TypeAlias

import click
from rich.live import Live

from ..membership import NodeInfo
from .admin_client import ask_all
from .cluster import Where
from .options import Seconds, command, registry_options
from .outcome import Failure
from .output import Output

SHORTEST = 0.5
"""Seconds of ``--once``, in which the rates are counted."""
RATES = {"in": "frames_in", "out": "frames_out", "bytes_in": "bytes_in", "bytes_out": "bytes_out"}
COLUMNS = (
    *("ID", "NAME", "STATE", "PEERS", "CHANNELS", "IN/s", "OUT/s", "KiB/s IN", "KiB/s OUT"),
    *("QUEUED", "IN FLIGHT", "RSS MiB"),
)
Look: TypeAlias = tuple[float, dict[int, Any]]


@command(
    "top",
    """
    domi top
    domi top --interval 0.5
    domi top --once --json
    """,
)
@click.option("--once", is_flag=True, help="Show one table, of half a second, and end.")
@click.option(
    "--interval",
    type=Seconds(0.1, 3600),
    default=2.0,
    metavar="SECONDS",
    help="Seconds between two looks. [default: 2]",
)
@registry_options
async def top(once: bool, interval: float, where: Where, out: Output) -> None:
    """Watch the traffic of all nodes, until Ctrl-C.

    The figures come from the nodes' admin pages; a node without them is listed without figures.
    """
    async with where.opened() as registry:
        live = Live(console=out.console, auto_refresh=False)
        on_screen = out.console.is_terminal and not (once or out.json)
        if on_screen:
            live.start()
        try:
            infos = await where.nodes(registry)
            before = await _look(infos)
            while True:
                await asyncio.sleep(SHORTEST if once else interval)
                infos = await where.nodes(registry)
                now = await _look(infos)
                rows = [_row(info, before, now) for info in infos.values()]
                table = out.make_table(COLUMNS, map(_cells, rows))
                if out.json:
                    out.document(rows)
                elif on_screen:
                    live.update(table, refresh=True)
                else:
                    out.console.print(table)
                if once:
                    return
                before = now
        except asyncio.CancelledError:
            if once:
                raise
            # Ctrl-C is how it ends.
        finally:
            if on_screen:
                live.stop()


async def _look(infos: dict[int, NodeInfo]) -> Look:
    pages = await ask_all(infos.values(), "/node", timeout=2.0)
    return time.monotonic(), pages


def _row(info: NodeInfo, before: Look, now: Look) -> dict[str, Any]:
    row: dict[str, Any] = {"id": info.id, "name": info.name, "state": None}
    old, new = before[1].get(info.id), now[1].get(info.id)
    if isinstance(new, Failure):
        row["state"] = "no answer"
    if not isinstance(new, dict):
        return row
    counters = new["counters"]
    row |= {name: new[name] for name in ("state", "peers", "channels", "queued", "rss")}
    row["in_flight"] = counters["in_flight"]
    seconds = now[0] - before[0]
    # Another process may have the id by now: its figures begin anew.
    if isinstance(old, dict) and old["pid"] == new["pid"]:
        for name, counter in RATES.items():
            row[name] = round((counters[counter] - old["counters"][counter]) / seconds, 3)
    return row


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    def scaled(name: str, unit: int) -> float | None:
        return None if name not in row else row[name] / unit

    return (
        *(row.get(name) for name in ("id", "name", "state", "peers", "channels", "in", "out")),
        *(scaled(name, 1024) for name in ("bytes_in", "bytes_out")),
        *(row.get("queued"), row.get("in_flight"), scaled("rss", 1 << 20)),
    )
