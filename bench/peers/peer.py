"""Who else does the same work: what each is, what it needs, and whether that is here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata

__all__ = ["PEERS", "Peer", "named", "nats_server", "versions"]


@dataclass(frozen=True)
class Peer:
    """Another way to do the work.

    :ivar module: its program in this folder: a server and a client that talk as workers do.
    :ivar package: what has to be installed for it.
    :ivar does: the commands and roles that it has.
    :ivar does_not: the others, with the reason: it cannot, or another peer here does it better.
    :ivar broker: it needs a ``nats-server`` too.
    :ivar stays: its start is so slow that its processes are kept over the rounds.
    """

    name: str
    title: str
    module: str
    package: str
    does: frozenset[str]
    does_not: dict[str, str] = field(compare=False)
    broker: bool = False
    stays: bool = False

    def missing(self) -> str:
        """What is not installed; empty when it can run."""
        if _version(self.package) is None:
            return f"the package {self.package} is not installed"
        if self.broker and nats_server() is None:
            return "no nats-server was found, neither on PATH nor by NATS_SERVER"
        return ""


NO_PUBLISH = "no publish of its own"

PEERS = (
    Peer(
        "uvloop",
        "uvloop Protocol",
        "uvloop_protocol",
        "uvloop",
        frozenset(
            {
                *("round_trips", "requests", "calls", "notifies"),
                *("publish", "connections", "first_answer"),
            }
        ),
        {},
    ),
    Peer(
        "pyzmq",
        "pyzmq",
        "pyzmq_blocking",
        "pyzmq",
        frozenset({"round_trips", "calls", "notifies", "publish"}),
        dict.fromkeys(("requests", "connections", "first_answer"), "see zmq.asyncio"),
    ),
    Peer(
        "pyzmq-asyncio",
        "zmq.asyncio",
        "pyzmq_asyncio",
        "pyzmq",
        frozenset({"round_trips", "requests", "connections", "first_answer"}),
        dict.fromkeys(("calls", "notifies", "publish"), "see pyzmq, which is faster"),
    ),
    Peer(
        "nats",
        "nats-py",
        "nats_py",
        "nats-py",
        frozenset(
            {
                *("round_trips", "requests", "calls", "notifies"),
                *("publish", "connections", "first_answer"),
            }
        ),
        {},
        broker=True,
    ),
    Peer(
        "grpc",
        "grpc.aio",
        "grpc_aio",
        "grpcio",
        frozenset({"round_trips", "requests", "calls", "notifies", "connections", "first_answer"}),
        {"publish": NO_PUBLISH},
    ),
    Peer(
        "aiohttp",
        "aiohttp",
        "aiohttp_http",
        "aiohttp",
        frozenset({"round_trips", "requests", "calls", "notifies", "connections", "first_answer"}),
        {"publish": NO_PUBLISH},
    ),
    Peer(
        "ray",
        "Ray",
        "ray_actor",
        "ray",
        frozenset({"round_trips", "requests", "calls", "notifies", "first_answer"}),
        {"publish": NO_PUBLISH, "connections": "no connection but a process's"},
        stays=True,
    ),
)


def named(*names: str) -> tuple[Peer, ...]:
    """
    :raises KeyError: of a name that none of them has.
    """
    by_name = {peer.name: peer for peer in PEERS}
    return tuple(by_name[name] for name in names)


def nats_server() -> str | None:
    """Where the program is: what NATS_SERVER says, or on PATH, or where Debian puts servers."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])
    return shutil.which(os.environ.get("NATS_SERVER") or "nats-server", path=path)


def versions(peers: Sequence[Peer] = PEERS) -> dict[str, str]:
    """Of the packages and programs that are here."""
    found = {peer.package: _version(peer.package) for peer in peers}
    if program := nats_server():
        done = subprocess.run(
            [program, "--version"], check=False, capture_output=True, text=True, timeout=10
        )
        version = re.search(r"v?(\d[\w.+-]*)", done.stdout)
        found["nats-server"] = version[1] if version else "unknown"
    return {name: version for name, version in found.items() if version is not None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
