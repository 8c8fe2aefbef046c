"""How much of its memory this process's machine, or its cgroup, uses."""

from __future__ import annotations

import os
from collections.abc import Iterator

_PROC = "/proc"
_CGROUPS = "/sys/fs/cgroup"


def used_share(proc: str = _PROC, cgroups: str = _CGROUPS) -> float:
    """What the machine uses of its memory, or a cgroup of ours of its limit: the larger share.

    The page cache that the kernel can take back at once is free memory. Blocks, for some tens of
    microseconds.

    :returns: 0-1.
    :raises OSError: the system does not say.
    """
    shares = [_of_machine(proc), *_of_cgroups(proc, cgroups)]
    return min(1.0, max(0.0, *shares))


def _read(*path: str) -> str:
    with open(os.path.join(*path), encoding="utf-8") as file:
        return file.read()


def _of_machine(proc: str) -> float:
    sizes = {}
    for line in _read(proc, "meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name in {"MemTotal", "MemAvailable"}:
            sizes[name] = int(rest.split()[0])
    if not sizes.get("MemTotal") or "MemAvailable" not in sizes:
        raise OSError(f"{proc}/meminfo does not say what is available of the memory")
    return 1.0 - sizes["MemAvailable"] / sizes["MemTotal"]


def _of_cgroups(proc: str, cgroups: str) -> Iterator[float]:
    """Of each cgroup that we are in and that has a limit: a limit of a parent binds us, too."""
    try:
        lines = _read(proc, "self", "cgroup").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names = ("memory.current", "memory.max", "inactive_file")
            root = cgroups
        elif "memory" in controllers.split(","):
            names = ("memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file")
            root = os.path.join(cgroups, "memory")
        else:
            continue
        inner = [part for part in path.split("/") if part]
        # In a container the path may be the host's: then the root is what we see of it.
        if not os.path.isdir(os.path.join(root, *inner)):
            inner = []
        for depth in range(len(inner) + 1):
            yield from _of_cgroup(os.path.join(root, *inner[:depth]), *names)


def _of_cgroup(folder: str, current: str, limit: str, cache: str) -> Iterator[float]:
    try:
        most = int(_read(folder, limit))  # "max" where there is none
        used = int(_read(folder, current))
        for line in _read(folder, "memory.stat").splitlines():
            if line.startswith(f"{cache} "):
                used -= int(line.split()[1])
    except (OSError, ValueError):
        return
    if 0 < most < 1 << 60:
        yield used / most
