"""From a registry's URL to nodes, and from a node to a guest of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from ..channels import LibraryChannel
from ..client import Client, connect
from ..errors import DeadlineExceeded, DomiError, PeerLost, RegistryError
from ..membership import NodeInfo, decode_nodes, nodes_prefix
from ..registry import Registry, default_url, open_registry
from ..tls import Tls
from .outcome import FAILED, NOT_FOUND, UNREACHABLE, USAGE, Failure


@dataclass(frozen=True)
class Where:
    """The cluster that is meant.

    :ivar registry: the URL; None is the default registry of the cluster.
    :ivar connect: the URL of one node, which is then asked for nothing of the registry.
    :ivar secret: the cluster's; None is the environment's.
    :ivar tls: the certificate to show, where the nodes show theirs.
    :ivar patience: seconds to reach a node in. Registries have a patience of their own.
    """

    cluster: str
    registry: str | None = field(default=None, repr=False)
    connect: str | None = None
    patience: float = 5.0
    secret: bytes | None = field(default=None, repr=False)
    tls: Tls | None = None

    @asynccontextmanager
    async def opened(self, *, make: bool = False) -> AsyncIterator[Registry]:
        """The registry, open.

        :param make: make the file of a SQLite registry when there is none.
        """
        try:
            registry = open_registry(self.registry or default_url(self.cluster))
        except RegistryError as error:
            # An extra that is missing, or a directory: the URL may well be right.
            lacks = isinstance(error.__cause__, (ImportError, LookupError, OSError))
            raise Failure(FAILED if lacks else USAGE, str(error)) from error
        parts = urlsplit(registry.url)
        if parts.scheme == "memory":
            raise Failure(
                USAGE, f"{registry.url} lives inside one process: name the registry of the nodes"
            )
        if parts.scheme == "sqlite" and not (make or os.path.exists(unquote(parts.path))):
            raise Failure(
                UNREACHABLE,
                f"there is no registry {registry.url}: start a node of cluster {self.cluster!r}, "
                "or name another one with --registry or --cluster",
            )
        await registry.open()
        try:
            yield registry
        finally:
            await registry.close()

    async def nodes(self, registry: Registry) -> dict[int, NodeInfo]:
        """The registered nodes by machine id."""
        snapshot = await registry.list(nodes_prefix(self.cluster))
        return decode_nodes(self.cluster, snapshot.entries)

    async def node(self, registry: Registry, given: str) -> NodeInfo:
        """The node that a machine id or a name of one node alone means."""
        nodes = await self.nodes(registry)
        if given.isascii() and given.isdigit() and int(given) in nodes:
            return nodes[int(given)]
        named = [info for info in nodes.values() if info.name == given]
        if len(named) == 1:
            return named[0]
        if named:
            ids = ", ".join(str(info.id) for info in named)
            raise Failure(NOT_FOUND, f"{len(named)} nodes are named {given!r}: give an id ({ids})")
        there = ", ".join(f"{info.id} ({info.name})" for info in nodes.values()) or "none at all"
        raise Failure(
            NOT_FOUND, f"no node {given!r} in cluster {self.cluster!r}; there are {there}"
        )

    @asynccontextmanager
    async def guest(self, **settings: Any) -> AsyncIterator[Client]:
        """A guest of the first node that takes it. Settings are those of ``connect``."""
        client = await self._join(**settings)
        try:
            yield client
        finally:
            await client.close()

    async def _join(self, **settings: Any) -> Client:
        settings |= {
            "name": "domi",
            "timeout": self.patience,
            "secret": self.secret,
            "tls": self.tls,
        }
        if self.connect is not None:
            try:
                return await connect(self.connect, **settings)
            except ValueError as error:
                raise Failure(USAGE, str(error)) from error
            except (OSError, asyncio.TimeoutError, DomiError) as error:
                raise Failure(UNREACHABLE, f"{self.connect}: {_why(error)}") from error
        async with self.opened() as registry:
            nodes = await self.nodes(registry)
            shown = registry.url
        if not nodes:
            raise Failure(
                UNREACHABLE, f"there is no node in cluster {self.cluster!r} at {shown}: start one"
            )
        refusals = []
        for info in nodes.values():
            url = f"tcp://{address(info.host, info.port)}"
            try:
                return await connect(url, cluster=self.cluster, **settings)
            except (OSError, asyncio.TimeoutError, DomiError) as error:
                refusals.append(f"{title(info)}: {_why(error)}")
        raise Failure(UNREACHABLE, f"no node can be reached: {'; '.join(refusals)}")

    async def target(self, given: str | None) -> int | None:
        """The machine id that ``--to`` means."""
        if given is None:
            return None
        if self.connect is None:
            async with self.opened() as registry:
                return (await self.node(registry, given)).id
        if given.isascii() and given.isdigit() and int(given) < 1024:
            return int(given)
        raise Failure(USAGE, f"--to {given!r}: with --connect, which asks no registry, give an id")


async def settle(client: Client, timeout: float) -> None:
    """Wait until the node has dealt with what was sent to it before.

    It answers in order, and refuses what nobody can subscribe to.
    """
    try:
        await client.request(LibraryChannel.NIL, b"", timeout, to=client.node_id)
    except (PeerLost, DeadlineExceeded):
        raise
    except DomiError:
        pass


async def until_left(registry: Registry, where: Where, info: NodeInfo) -> None:
    """Wait until the node's claim on its id is gone from the registry."""
    key = f"{nodes_prefix(where.cluster)}{info.id:04d}"
    snapshot = await registry.list(key)
    watch = registry.watch(key, since=snapshot.cursor)
    try:
        while True:
            entry = await registry.get(key)
            if entry is None or entry.epoch != info.epoch:
                return
            await anext(watch)
    finally:
        await watch.aclose()


def address(host: str, port: int) -> str:
    """The two as a URL has them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def title(info: NodeInfo) -> str:
    """What a node is called in messages."""
    return f"node {info.id} ({info.name})"


def admin_address(info: NodeInfo) -> str:
    """Where the node's admin pages are. Raises Failure when it has none."""
    if info.http is None:
        raise Failure(
            FAILED,
            f"{title(info)} has no admin pages: start it with http_port= "
            "(pip install 'domi-fast[admin]')",
        )
    return address(info.host, info.http)


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__
