"""``domi registry check``: whether a registry does what nodes need of it, and how fast."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable
from typing import TypeVar

import click

from ..config import NodeConfig
from ..registry import Put, Registry, Reset, Watch
from .cluster import Where
from .options import command, registry_options, show_help_alone, timeout_option
from .outcome import FAILED, TIMEOUT, Failure
from .output import Output

T = TypeVar("T")
TTL = 5.0


@click.group("registry", invoke_without_command=True)
@click.pass_context
def registry(ctx: click.Context) -> None:
    """Look at the registry itself."""
    show_help_alone(ctx)


@command(
    "check",
    """
    domi registry check
    domi registry check --registry etcd://10.0.0.1:2379
    """,
)
@timeout_option(10.0, "Seconds for all of it.")
@registry_options
async def check(timeout: float, where: Where, out: Output) -> None:
    """Do what nodes do, under a key that no node has, and print how long each step takes.

    A SQLite registry is made when it is not there yet.
    """
    begun = time.perf_counter()
    async with where.opened(make=True) as opened:
        steps = _Steps({"open": time.perf_counter() - begun})
        try:
            await asyncio.wait_for(_round_trip(opened, where.cluster, steps), timeout)
        except asyncio.TimeoutError:
            raise Failure(
                TIMEOUT,
                f"{opened.url}: {steps.under_way!r} was not done within {timeout:g} s",
            ) from None
        limits = opened.limits
        url = opened.url
    # Seconds from its end by which the keys of a node's lease are gone.
    gone = limits.gone_after(max(NodeConfig.lease_ttl, limits.min_ttl))
    found = {
        "min_ttl": limits.min_ttl,
        "expiry_bound": gone,
        "max_value": limits.max_value,
    }
    if out.json:
        seconds = {name: round(value, 6) for name, value in steps.seconds.items()}
        out.document({"url": url, "limits": found, "seconds": seconds})
        return
    out.line(f"{url} does what nodes need")
    out.table(("STEP", "ms"), [(name, value * 1000) for name, value in steps.seconds.items()])
    out.table(
        ("LIMIT", "VALUE"),
        [
            ("shortest lease", f"{limits.min_ttl:g} s"),
            ("a dead holder's keys are gone", f"its lease and {gone:g} s later"),
            ("largest value", f"{limits.max_value:,} bytes"),
        ],
    )


registry.add_command(check)


class _Steps:
    """How long each step took, in seconds, in order."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.under_way = ""

    async def take(self, name: str, step: Awaitable[T]) -> T:
        self.under_way = name
        begun = time.perf_counter()
        found = await step
        self.seconds[name] = time.perf_counter() - begun
        return found


async def _round_trip(registry: Registry, cluster: str, steps: _Steps) -> None:
    key = f"domi/{cluster}/check/{os.urandom(8).hex()}"
    lease = await steps.take("grant", registry.grant(max(TTL, registry.limits.min_ttl)))
    try:
        await steps.take("create", registry.create(key, b"one", lease=lease))
        entry = await steps.take("get", registry.get(key))
        snapshot = await steps.take("list", registry.list(key))
        if entry is None or entry.value != b"one" or len(snapshot.entries) != 1:
            raise Failure(FAILED, f"{registry.url}: what was created is not what is read")
        watch = registry.watch(key, since=snapshot.cursor)
        try:
            await steps.take("put", registry.put(key, b"two", expect=entry.version, lease=lease))
            await steps.take("watch", _until(watch, b"two"))
            await steps.take("delete", registry.delete(key))
            await steps.take("watch a deletion", _until(watch, None))
        finally:
            await watch.aclose()
    finally:
        await steps.take("revoke", lease.revoke())


async def _until(watch: Watch, value: bytes | None) -> None:
    """Wait until the watch has shown the key at this value, or gone."""
    async for event in watch:
        if isinstance(event, Reset):
            values = [entry.value for entry in event.snapshot.entries]
        else:
            values = [event.entry.value] if isinstance(event, Put) else []
        if values == ([] if value is None else [value]):
            return
