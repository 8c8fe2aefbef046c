"""``domi pause``, ``resume``, ``drain`` and ``exit``: a node's life, through its admin pages."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlencode

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..membership import NodeInfo
from ..registry import Registry
from .admin_client import ask
from .cluster import Where, title, until_left
from .options import Seconds, command, registry_options, timeout_option, token_option
from .outcome import NOT_FOUND, OK, TIMEOUT, Failure
from .output import Output, printable

HEARING = 15.0
"""Seconds until every peer knows: one that hangs is given up after its node's 10, as a rule."""
LEAVING = 10.0
"""Seconds that a node that is drained has to leave in."""


@command(
    "pause",
    """
    domi pause server
    DOMI_ADMIN_TOKEN=... domi pause 3
    """,
)
@click.argument("node")
@token_option
@timeout_option(HEARING, "Seconds to wait until every peer of the node knows.")
@registry_options
async def pause(node: str, token: str | None, timeout: float, where: Where, out: Output) -> None:
    """Have NODE take no new work until it is resumed. It keeps its place in the cluster."""
    await _change("/pause", "paused", node, token, timeout, where, out)


@command("resume", "domi resume server")
@click.argument("node")
@token_option
@timeout_option(HEARING, "Seconds to wait until every peer of the node knows.")
@registry_options
async def resume(node: str, token: str | None, timeout: float, where: Where, out: Output) -> None:
    """Have NODE, which was paused, take work again."""
    await _change("/resume", "serving", node, token, timeout, where, out)


@command(
    "drain",
    """
    domi drain server
    domi drain 3 --deadline 300
    """,
)
@click.argument("node")
@click.option(
    "--deadline",
    type=Seconds(0, 86400),
    default=30.0,
    metavar="SECONDS",
    help="Seconds for the work that is there; the node leaves then in any case. [default: 30]",
)
@token_option
@registry_options
async def drain(node: str, deadline: float, token: str | None, where: Where, out: Output) -> int:
    """Have NODE take no new work, finish what it has, and leave; and wait for that.

    Exit code 5: it has left, and its work was not finished by the deadline.
    """
    async with where.opened() as registry:
        info = await _target(registry, where, node)
        path = f"/drain?{urlencode({'deadline': deadline})}"
        async with _shown(info):
            answer = await ask(info, path, method="POST", token=token, timeout=deadline + LEAVING)
            await _left(registry, where, info, LEAVING)
    finished = bool(answer["finished"])
    if out.json:
        out.document({"node": info.id, "name": info.name, "finished": finished})
    else:
        out.line(
            f"{printable(title(info))}: drained, and gone"
            if finished
            else f"{printable(title(info))}: gone with work unfinished"
        )
    return OK if finished else TIMEOUT


@command("exit", "domi exit server")
@click.argument("node")
@token_option
@timeout_option(10.0, "Seconds for the node to leave in.")
@registry_options
async def exit_node(
    node: str, token: str | None, timeout: float, where: Where, out: Output
) -> None:
    """Have NODE leave at once, in order, and wait for that. Its program ends with its last node."""
    async with where.opened() as registry:
        info = await _target(registry, where, node)
        await ask(info, "/exit", method="POST", token=token, timeout=timeout)
        await _left(registry, where, info, timeout)
    if out.json:
        out.document({"node": info.id, "name": info.name, "left": True})
    else:
        out.line(printable(f"{title(info)}: gone"))


async def _target(registry: Registry, where: Where, given: str) -> NodeInfo:
    """The node that is meant, and that answers where the registry says.

    One that died is registered until its lease ends, and another may have its port by then.
    """
    info = await where.node(registry, given)
    page = await ask(info, "/node", timeout=5.0)
    if (page["id"], page["name"], page["port"]) != (info.id, info.name, info.port):
        raise Failure(
            NOT_FOUND,
            f"{title(info)} is gone: node {page['id']} ({page['name']}) answers at its address",
        )
    return info


async def _change(
    path: str, state: str, node: str, token: str | None, timeout: float, where: Where, out: Output
) -> None:
    async with where.opened() as registry:
        info = await _target(registry, where, node)
    try:
        answer = await ask(info, path, method="POST", token=token, timeout=timeout)
    except Failure as failure:
        if failure.code != TIMEOUT:
            raise
        # The node changes its state first, and answers when each of its peers knows.
        page = await ask(info, "/node", timeout=5.0)
        if page["state"] != state:
            raise
        raise Failure(
            TIMEOUT, f"{title(info)} is {state}, and not every peer of it knows after {timeout:g} s"
        ) from failure
    if out.json:
        out.document({"node": info.id, "name": info.name, "state": answer["state"]})
    else:
        out.line(printable(f"{title(info)}: {answer['state']}"))


async def _left(registry: Registry, where: Where, info: NodeInfo, timeout: float) -> None:
    try:
        await asyncio.wait_for(until_left(registry, where, info), timeout)
    except asyncio.TimeoutError:
        raise Failure(
            TIMEOUT, f"{title(info)} is still in the registry after {timeout:g} s"
        ) from None


@asynccontextmanager
async def _shown(info: NodeInfo) -> AsyncIterator[None]:
    """Show on a terminal, for the length of the block, what the node still has to do."""
    if not sys.stderr.isatty():
        yield
        return
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=Console(stderr=True, highlight=False),
        transient=True,
    )
    with progress:
        follower = asyncio.ensure_future(_follow(info, progress))
        try:
            yield
        finally:
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)


async def _follow(info: NodeInfo, progress: Progress) -> None:
    name = printable(title(info))
    task = progress.add_task(f"{name}: draining", total=None)
    while True:
        await asyncio.sleep(0.25)
        try:
            page = await ask(info, "/node", timeout=2.0)
        except Failure:
            progress.update(task, description=f"{name}: leaving")
            return
        in_flight = page["counters"]["in_flight"]
        progress.update(
            task,
            description=f"{name}: {page['state']}, {page['queued']} bytes queued, "
            f"{in_flight} requests in flight",
        )
