"""What the peers' programs have in common: a command line with roles, for their driver."""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable, Coroutine
from typing import Any

from bench.two_process.commands import pin, run

Role = Callable[[argparse.Namespace], Coroutine[Any, Any, None]]

__all__ = ["Role", "main"]


def main(about: str | None, **roles: Role) -> None:
    """Run the role that the command line asks for, pinned to its CPU."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("role", choices=roles)
    parser.add_argument("--cpu", type=int)
    parser.add_argument("--address", default="", help="of the server, as it has said itself")
    parser.add_argument("--count", type=int, default=0, help="how many subscribe")
    given = parser.parse_args()
    pin(given.cpu)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    run(roles[given.role](given))
