"""Membership: this node's place in the registry, and who else is there.

A node holds one of the keys ``domi/<cluster>/nodes/0000`` to ``1023`` under a lease, and the key is
its machine id. Past the lease's end it keeps its sessions and opens no new ones; when it can, it
takes the same id again, and when another node has that, a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ._core import printable
from .config import NodeConfig, parse_version
from .errors import ClusterFull, DomiError, RegistryError, VersionTooOld
from .handshake import Offer
from .registry.base import (
    Claim,
    CompareFailed,
    Delete,
    Entry,
    Event,
    NoKeyFree,
    Put,
    Registry,
    Reset,
    Service,
    Snapshot,
)

log = logging.getLogger(__name__)

MACHINES = 1024
REGISTER_PAUSE = 0.2


def nodes_prefix(cluster: str) -> str:
    """What the registry's keys of the cluster's nodes begin with; four digits follow."""
    return f"domi/{cluster}/nodes/"


def _machine_key() -> str:
    """What two processes of one machine have in common, and others have not."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""


@dataclass(frozen=True)
class NodeInfo:
    """What the registry says of a node.

    :ivar mark: of the instance in its offer: who reads it does not know the instance.
    :ivar http: the TCP port of its admin pages, on ``host``; None when it has none.
    """

    id: int
    epoch: int
    name: str
    version: str
    host: str
    port: int
    unix_path: str | None
    mark: bytes
    machine: str
    weight: float = 1.0
    http: int | None = None

    def is_of(self, offer: Offer) -> bool:
        """Whether it was this node that registered: the same life of the same name."""
        return (offer.mark, offer.name) == (self.mark, self.name)

    @property
    def claim(self) -> tuple[int, bytes]:
        """What one claim on a machine id has that no other has."""
        return self.epoch, self.mark

    @property
    def listener(self) -> str:
        """Where its TCP listener is, as text."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def encode(self) -> bytes:
        return json.dumps(
            {
                "name": self.name,
                "version": self.version,
                "host": self.host,
                "port": self.port,
                "unix_path": self.unix_path,
                "mark": self.mark.hex(),
                "machine": self.machine,
                "weight": self.weight,
                "http": self.http,
            }
        ).encode()

    @classmethod
    def decode(cls, entry: Entry) -> NodeInfo:
        """Raises ValueError for an entry that no node wrote."""
        machine = entry.key[-4:]
        if not (machine.isascii() and machine.isdigit() and int(machine) < MACHINES):
            raise ValueError("its key does not end with a machine id, 0000 to 1023")
        try:
            fields = json.loads(entry.value)
            info = cls(
                id=int(machine),
                epoch=entry.epoch,
                name=str(fields["name"]),
                version=str(fields["version"]),
                host=str(fields["host"]),
                port=int(fields["port"]),
                unix_path=None if fields["unix_path"] is None else str(fields["unix_path"]),
                mark=bytes.fromhex(fields["mark"]),
                machine=str(fields["machine"]),
                weight=float(fields.get("weight", 1.0)),
                http=None if fields.get("http") is None else int(fields["http"]),
            )
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"its value is not what a node writes: {error!r}") from None
        for port in (info.port, info.http or 0):
            if not 0 <= port <= 65535:
                raise ValueError(f"port {port} is not a port")
        if not 0 < info.weight < math.inf:
            raise ValueError(f"weight {info.weight} is not above 0")
        parse_version(info.version)
        return info


def decode_nodes(cluster: str, entries: Iterable[Entry]) -> dict[int, NodeInfo]:
    """The cluster's nodes of these entries by machine id; what is no node's is logged."""
    prefix = nodes_prefix(cluster)
    found = {}
    for entry in entries:
        try:
            info = NodeInfo.decode(entry)
            if entry.key != f"{prefix}{info.id:04d}":
                raise ValueError("its key is not that of a node")
        except ValueError as error:
            log.warning(
                "registry entry %s is not a node's: %s", printable(entry.key), printable(str(error))
            )
            continue
        found[info.id] = info
    return found


class Follower(Protocol):
    """What hears of changes: the mesh."""

    def identified(self, machine: int) -> None:
        """This node has this machine id from now on."""

    def displaced(self) -> None:
        """Another node has this node's machine id: let go of everything that goes by it."""

    def seen(self, infos: Iterable[NodeInfo]) -> None:
        """These nodes are registered, perhaps anew, under these ids."""

    def members_changed(self, joined: set[int]) -> None:
        """``Membership.view`` has changed; these ids were not there before."""


class Membership:
    """A node's claim on its machine id, and its view of the others. Belongs to the loop's thread.

    :ivar view: the registered nodes by machine id, this one among them.
    :ivar machine: what tells processes of this machine from others; may be empty.
    """

    def __init__(self, config: NodeConfig, registry: Registry, follower: Follower) -> None:
        self._config = config
        self._registry = registry
        self._follower = follower
        self._prefix = nodes_prefix(config.cluster)
        self._instance = os.urandom(16)
        self._claim: Claim | None = None
        self.port = 0
        self._http: int | None = None
        self.machine = _machine_key()
        self.view: dict[int, NodeInfo] = {}

    @property
    def id(self) -> int:
        """This node's machine id; -1 before it has one."""
        return int(self._claim.key[-4:]) if self._claim else -1

    @property
    def valid(self) -> bool:
        """Whether this node holds its machine id at this moment."""
        return self._claim is not None and time.monotonic() < self._claim.lease.valid_until

    @property
    def offer(self) -> Offer:
        """What this node says of itself in a handshake."""
        return Offer(
            name=self._config.name,
            version=self._config.version,
            cluster=self._config.cluster,
            epoch=self._claim.epoch if self._claim else 0,
            instance=self._instance,
            features=Offer.features_of(self._config.sessions_per_peer),
        )

    async def join(self, port: int, http: int | None = None) -> Snapshot:
        """Take a machine id; who is there, this node among them.

        Raises ClusterFull, VersionTooOld and RegistryError.
        """
        self.port = port
        self._http = http
        await self._registry.open()
        self._check_version(await self._registry.list(self._prefix))
        await self._register(self._keys())
        snapshot = await self._registry.list(self._prefix)
        try:
            self._check_version(snapshot)  # a newer one may have come at the same time
        except VersionTooOld:
            await self.leave()
            raise
        self._replace(snapshot)
        return snapshot

    async def leave(self) -> None:
        """Give the machine id back and disconnect from the registry."""
        if self._claim is not None:
            with contextlib.suppress(DomiError):
                await self._claim.lease.revoke()
            self._claim = None

    async def follow(self, snapshot: Snapshot) -> None:
        """Keep the view up to date, for ever; a watch that failed begins anew with a list."""
        while True:
            try:
                watch = self._registry.watch(self._prefix, since=snapshot.cursor)
                async with contextlib.aclosing(watch):
                    async for event in watch:
                        self._changed(event)
            except (RegistryError, OSError) as error:
                log.warning("%s: cannot watch the registry: %s", self._config.name, error)
            await asyncio.sleep(REGISTER_PAUSE * random.uniform(0.5, 1.5))
            with contextlib.suppress(RegistryError, OSError):
                snapshot = await self._registry.list(self._prefix)
                self._changed(Reset(snapshot))

    def _changed(self, event: Event) -> None:
        before = set(self.view)
        if isinstance(event, Reset):
            self._replace(event.snapshot)
        elif isinstance(event, Put):
            self._put(self._decode([event.entry]))
        elif isinstance(event, Delete):
            self.view = {
                machine: info
                for machine, info in self.view.items()
                if self._key(machine) != event.key
            }
        self._follower.members_changed(set(self.view) - before)

    async def keep(self) -> None:
        """Take a machine id again each time the lease is lost, for ever."""
        while True:
            claim = self._claim
            assert claim is not None
            await claim.lease.lost.wait()
            log.warning("%s: the lease on %s was lost", self._config.name, claim.key)
            while self._claim is claim:
                await self._register_again(claim.key)

    async def is_claimed_by(self, machine: int, offer: Offer) -> bool:
        """Ask the registry itself whether this claim holds. Raises RegistryError."""
        entry = await self._registry.get(self._key(machine))
        infos = self._decode([] if entry is None else [entry])
        info = infos.get(machine)
        return info is not None and info.epoch == offer.epoch and info.is_of(offer)

    def locate(self, mark: bytes) -> int | None:
        """The machine id of that node, if it is registered."""
        return next((info.id for info in self.view.values() if info.mark == mark), None)

    def _key(self, machine: int) -> str:
        return f"{self._prefix}{machine:04d}"

    def _keys(self) -> list[str]:
        return [self._key(machine) for machine in range(MACHINES)]

    def _check_version(self, snapshot: Snapshot) -> None:
        mine = parse_version(self._config.version)
        for info in self._decode(snapshot.entries).values():
            if info.name == self._config.name and parse_version(info.version) > mine:
                raise VersionTooOld(
                    f"{self._config.name} {info.version} is in the cluster as node {info.id}: "
                    f"version {self._config.version} may not join any more",
                    peer=info.id,
                )

    async def _register(self, keys: list[str]) -> None:
        config = self._config
        lease = await self._registry.grant(max(config.lease_ttl, self._registry.limits.min_ttl))
        info = NodeInfo(
            id=-1,
            epoch=0,
            name=config.name,
            version=config.version,
            host=config.host,
            port=self.port,
            unix_path=config.unix_path and os.path.abspath(config.unix_path),
            mark=self.offer.mark,
            machine=self.machine,
            weight=config.weight,
            http=self._http,
        )
        try:
            claim = await self._registry.claim(keys, info.encode(), lease)
        except BaseException as error:
            # The registry would keep alive what nobody knows of.
            with contextlib.suppress(DomiError):
                await lease.revoke()
            if isinstance(error, NoKeyFree):
                raise ClusterFull(
                    f"all machine ids of cluster {config.cluster!r} are taken", limit=MACHINES
                ) from None
            raise
        self._claim = claim
        self._announce(claim)
        self._follower.identified(self.id)

    def _announce(self, claim: Claim) -> None:
        config = self._config
        service = Service(
            name=config.name,
            id=f"domi-{config.cluster}-{self.id:04d}",
            host=config.host,
            port=self.port,
            tags=(config.cluster,),
            meta={"version": config.version, "machine_id": str(self.id)},
        )
        self._registry.announce(service, claim.lease)

    async def _register_again(self, key: str) -> None:
        try:
            try:
                await self._register([key])
            except ClusterFull:
                if await self._remove_own(key):
                    return
                self._follower.displaced()
                await self._register(self._keys())
        except (RegistryError, OSError) as error:
            log.warning("%s: cannot register again: %s", self._config.name, error)
            await asyncio.sleep(REGISTER_PAUSE * random.uniform(0.5, 1.5))

    async def _remove_own(self, key: str) -> bool:
        """Whether the key is free by now: it is gone, or stood for an earlier claim of this node.

        A registry that was away itself may have given the lease its whole length again.
        """
        entry = await self._registry.get(key)
        if entry is None:
            return True
        if all(info.mark != self.offer.mark for info in self._decode([entry]).values()):
            return False
        try:
            await self._registry.delete(key, expect=entry.version)
        except CompareFailed:
            return False
        return True

    def _replace(self, snapshot: Snapshot) -> None:
        self.view = {}
        self._put(self._decode(snapshot.entries))

    def _put(self, infos: dict[int, NodeInfo]) -> None:
        self.view.update(infos)
        self._follower.seen(infos.values())

    def _decode(self, entries: Iterable[Entry]) -> dict[int, NodeInfo]:
        return decode_nodes(self._config.cluster, entries)
