"""Installs what the peers need, each for itself: what cannot be had is named, and left out."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from bench.peers.peer import nats_server

NATS_SERVER = "nats-server"
EXAMPLE = """\
example:
  python -m bench.peers.install    exit code 1 when nothing of this could be had

what is installed:
"""


def wanted(extra: str) -> Iterator[str]:
    """What the package says that it needs for this, on this Python."""
    for text in metadata.requires("domi-fast") or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker and "extra" in str(marker) and marker.evaluate({"extra": extra}):
            yield f"{requirement.name}{requirement.specifier}"


def succeeds(*command: str) -> bool:
    # The packages of Debian start no service of their own.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    return subprocess.run(command, env=environment, check=False).returncode == 0


def install_nats_server() -> bool:
    """On Debian, as root."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return False
    install = ("apt-get", "install", "-y", "-qq", "--no-install-recommends", NATS_SERVER)
    # The lists may be old or absent.
    return succeeds(*install) or (succeeds("apt-get", "update", "-qq") and succeeds(*install))


def arguments() -> argparse.ArgumentParser:
    listed = "".join(f"  {name}\n" for name in [*wanted("peers"), NATS_SERVER])
    return argparse.ArgumentParser(
        prog="python -m bench.peers.install",
        description=(__doc__ or "").splitlines()[0],
        epilog=EXAMPLE + listed,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def main() -> int:
    arguments().parse_args()
    needed = list(wanted("peers"))
    absent = [
        requirement
        for requirement in needed
        if not succeeds(sys.executable, "-m", "pip", "install", "-q", requirement)
    ]
    if nats_server() is None and not install_nats_server():
        absent.append(NATS_SERVER)
    for name in absent:
        print(f"domi_fast: not installed, and left out of the benchmarks: {name}", file=sys.stderr)
    return int(len(absent) > len(needed))


if __name__ == "__main__":
    sys.exit(main())
