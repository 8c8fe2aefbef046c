"""``domi nodes``, ``peers`` and ``channels``: what the registry and the admin pages say."""

from __future__ import annotations

from typing import Any

import click

from ..membership import NodeInfo
from .admin_client import ask, ask_all
from .cluster import Where, address
from .options import command, registry_options
from .outcome import FAILED, UNREACHABLE, Failure
from .output import Output

PATIENCE = 3.0


@command(
    "nodes",
    """
    domi nodes
    domi nodes --json | jq '.[].name'
    domi nodes --registry etcd://10.0.0.1:2379 --cluster shop
    """,
)
@registry_options
async def nodes(where: Where, out: Output) -> None:
    """List the nodes of the cluster, as the registry has them."""
    async with where.opened() as registry:
        infos = await where.nodes(registry)
    if out.json:
        out.document([_described(info) for info in infos.values()])
        return
    rows = [
        (
            *(info.id, info.name, info.version, address(info.host, info.port)),
            *(info.unix_path, None if info.http is None else address(info.host, info.http)),
        )
        for info in infos.values()
    ]
    out.table(("ID", "NAME", "VERSION", "ADDRESS", "UNIX", "HTTP"), rows)


@command(
    "peers",
    """
    domi peers
    domi peers server --json
    """,
)
@click.argument("node", required=False)
@registry_options
async def peers(node: str | None, where: Where, out: Output) -> int | None:
    """List whom NODE is connected with; every node that has admin pages unless given."""
    infos = await _asked(where, node)
    if node is not None:
        pages: dict[int, Any] = {infos[0].id: await ask(infos[0], "/peers", timeout=PATIENCE)}
    else:
        pages = await ask_all(infos, "/peers", timeout=PATIENCE)
    rows = [
        {"node": machine, **peer}
        for machine, page in pages.items()
        if not isinstance(page, Failure)
        for peer in page
    ]
    if out.json:
        out.document(rows)
    else:
        out.table(
            ("NODE", "PEER", "NAME", "VERSION", "STATE", "ADDRESS", "QUEUED", "CHANNELS"),
            [
                (
                    *(row["node"], row["id"], row["name"], row["version"], row["state"]),
                    *(row["address"], row["queued"], len(row["channels"])),
                )
                for row in rows
            ],
        )
    return _first_failure(pages)


@command(
    "channels",
    """
    domi channels
    domi channels server --json
    """,
)
@click.argument("node", required=False)
@registry_options
async def channels(node: str | None, where: Where, out: Output) -> None:
    """List the channels and who subscribes to them, as NODE sees it.

    Unless given, it is the first node that has admin pages and answers.
    """
    failures = []
    for info in await _asked(where, node):
        try:
            found = await ask(info, "/channels", timeout=PATIENCE)
        except Failure as failure:
            failures.append(failure)
            continue
        if out.json:
            out.document(found)
        else:
            rows = [(row["channel"], " ".join(map(str, row["nodes"]))) for row in found]
            out.table(("CHANNEL", "NODES"), rows)
        return
    raise failures[0]


async def _asked(where: Where, given: str | None) -> list[NodeInfo]:
    """The node that was given, or all that have admin pages: at least one."""
    async with where.opened() as registry:
        if given is not None:
            return [await where.node(registry, given)]
        infos = await where.nodes(registry)
    with_pages = [info for info in infos.values() if info.http is not None]
    if not infos:
        raise Failure(UNREACHABLE, f"there is no node in cluster {where.cluster!r}: start one")
    if not with_pages:
        raise Failure(
            FAILED,
            f"none of the {len(infos)} nodes of cluster {where.cluster!r} has admin pages: start "
            "one with http_port= (pip install 'domi-fast[admin]')",
        )
    return with_pages


def _first_failure(pages: dict[int, Any]) -> int | None:
    """Raise it, once what the others said has been shown."""
    for page in pages.values():
        if isinstance(page, Failure):
            raise page
    return None


def _described(info: NodeInfo) -> dict[str, object]:
    return {
        "id": info.id,
        "name": info.name,
        "version": info.version,
        "host": info.host,
        "port": info.port,
        "unix_path": info.unix_path,
        "http": info.http,
        "epoch": info.epoch,
    }
